"""Configuration: inheritance, overrides, and an error with key, value and fix for everything that cannot work."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from moba_megatron.config import Config, ConfigError, check_world, config_from_dict, load_config
from moba_megatron.config.named import names_in
from moba_megatron.config.overrides import as_override
from moba_megatron.config.reference import reference

ROOT = Path(__file__).parents[2]

SMALL: dict[str, Any] = {
    "run": {"dir": "runs/test"},
    "model": {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2},
    "attention": {"block_size": 32},
    "data": {"train": "train", "validation": "validation", "tokenizer": "tokenizer", "sequence_length": 128},
    "training": {"steps": 10, "global_batch_size": 4},
    "optimizer": {"lr": 1e-3},
}


def changed(**changes: Any) -> dict[str, Any]:
    """SMALL with `section__key=value` changes."""
    values = copy.deepcopy(SMALL)
    for name, value in changes.items():
        section, key = name.split("__")
        values.setdefault(section, {})[key] = value
    return values


def test_a_written_configuration_reads_back_equal(tmp_path):
    stages = [{"until": 0.9, "layers": {1: {"kind": "full"}}}, {"until": 1.0, "kind": "full"}]
    config = config_from_dict(changed(attention__stages=stages, attention__layers={3: {"top_k": 2}}))
    assert config_from_dict(json.loads(config.model_dump_json())) == config
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert load_config(path) == config


def test_files_inherit_and_the_command_line_wins(tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared/base.yaml").write_text(config_from_dict(SMALL).to_yaml())
    child = tmp_path / "child.yaml"
    child.write_text("base: shared/base.yaml\noptimizer: {lr: 5e-4}\ntraining: {steps: 20}\n")
    config = load_config(child, ["training.steps=30", "attention.full_layers=[4]", "run.dir=elsewhere"])
    assert (config.optimizer.lr, config.training.steps, config.attention.full_layers) == (5e-4, 30, [4])
    assert config.run.dir == "elsewhere"
    assert config.model.hidden_size == 64


def test_words_that_yaml_reads_otherwise_are_taken_as_written(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(config_from_dict(changed(logging__wandb="offline")).to_yaml())
    config = load_config(path, ["logging.wandb=off", "attention.layers.3.kind=full"])
    assert config.logging.wandb == "off" and config.attention.layers[3].kind == "full"


@pytest.mark.parametrize(
    "text", ["runs/exp #2", "2024_11_05", "007", "12:30:45", "true", "null", "1e3", "a: b", "[1", "*.py", "${run.seed}"]
)
def test_a_string_on_the_command_line_is_what_it_says(tmp_path, text):
    path, written = tmp_path / "config.yaml", tmp_path / "written.yaml"
    path.write_text(config_from_dict(changed(data__train=[{"path": "a"}])).to_yaml())
    config = load_config(path, [f"run.dir={text}", f"data.train.0.path={text}", "data.train.0.weight=2"])
    assert (config.run.dir, config.data.train[0].path, config.data.train[0].weight) == (text, text, 2)
    written.write_text(config.to_yaml())
    assert load_config(written) == config


def test_null_and_lists_on_the_command_line_are_what_the_type_allows(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(config_from_dict(changed(attention__layers={3: {"top_k": 2}})).to_yaml())
    config = load_config(path, ["data.validation=null", 'data.train=[{path: "a #2"}]', "data.tokenizer=[x]"])
    assert (config.data.validation, config.data.train[0].path, config.data.tokenizer) == (None, "a #2", "[x]")
    layer = load_config(path, ["attention.layers.3.kind=full"]).attention.layers[3]
    assert (layer.kind, layer.top_k) == ("full", 2)


def test_references_in_files_follow_the_command_line(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump(changed(optimizer__min_lr="${optimizer.lr}", data__tokenizer="${run.dir}/tokenizer"))
    )
    config = load_config(path, ["run.dir=runs/${x}", "optimizer.lr=2e-4"])
    assert (config.data.tokenizer, config.optimizer.min_lr) == ("runs/${x}/tokenizer", 2e-4)


def test_a_leading_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    path, base = tmp_path / "config.yaml", tmp_path / "base.yaml"
    base.write_text(config_from_dict(changed(data__train=[{"path": "~/train"}], data__tokenizer="~/t")).to_yaml())
    path.write_text("base: base.yaml\n")
    config = load_config(path, ["run.dir=~/runs/a", "data.validation=~", "checkpoint.resume=~/old/step_3"])
    data = config.data
    assert [config.run.dir, data.train[0].path, data.validation, data.tokenizer, config.checkpoint.resume] == [
        f"/home/somebody{rest}" for rest in ("/runs/a", "/train", "", "/t", "/old/step_3")
    ]


@pytest.mark.parametrize(
    ("values", "overrides", "expected"),
    [
        ({"run__dir": "???"}, [], r"run.dir = \?{3}: give this value"),
        ({}, ["run.dir=???"], r"run.dir = \?{3}: give this value"),
        ({}, ["training.steps=???"], r"training.steps = \?{3}: give this value"),
        ({}, ["run.dir="], "'run.dir=' has no value"),
        ({}, ["data.validation="], r"'data.validation=' has no value.*\(null for none\)"),
        ({}, ["training.step=#3"], "training.step: unknown key; did you mean training.steps"),
        ({"data__train": [{"path": "a"}]}, ["data.train.1.path=b"], "data.train is a list; its members are 0 to 0"),
    ],
)
def test_an_override_without_a_meaning_is_refused(tmp_path, values, overrides, expected):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(changed(**values)))
    with pytest.raises(ConfigError, match=expected):
        load_config(path, overrides)


@pytest.mark.parametrize("value", ["a #2", "null", "[x", "", "${run.dir}/x", None, 3, [{"path": "x"}], "~/x"])
@pytest.mark.parametrize("key", ["data.train", "data.validation", "data.tokenizer", "attention.selector"])
def test_the_override_of_a_value_says_what_a_file_says(tmp_path, key, value):
    path, said = tmp_path / "config.yaml", tmp_path / "said.yaml"
    path.write_text(config_from_dict(SMALL).to_yaml())
    section, name = key.split(".")
    said.write_text("base: config.yaml\n" + yaml.safe_dump({section: {name: value}}))

    def outcome(file: Path, *overrides: str) -> Any:
        try:
            return load_config(file, list(overrides))
        except ConfigError as error:
            return error.problems

    assert outcome(path, as_override(key, value, Config)) == outcome(said)


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("base: 3\n", [], "base = 3 must be a path"),
        ("base: nowhere.yaml\n", [], "no such configuration file"),
        ("[1, 2]\n", [], "must hold a mapping"),
        ("a: [1\n", [], "is not valid YAML"),
        ("", ["attention.full_layers=[4"], "not valid YAML"),
    ],
)
def test_what_is_no_configuration_is_refused(tmp_path, text, overrides, expected):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "config.yaml", overrides)
    assert expected in str(error.value)


def test_a_file_that_includes_itself_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ConfigError, match="includes itself"):
        load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model__num_layer": 4}, "model.num_layer: unknown key; did you mean model.num_layers"),
        ({"attention__top_k": 0}, "attention.top_k = 0"),
        ({"attention__block_size": 256}, "attention.block_size = 256 is over data.sequence_length = 128"),
        ({"attention__layers": {9: {"kind": "full"}}}, "names layer 9: layers are counted from 1 to 4"),
        ({"attention__stages": [{"until": 0.5}]}, "the last `until` must be 1.0"),
        ({"attention__stages": [{"until": 0.5}, {"until": 0.4}]}, "`until` must rise"),
        ({"attention__backend": "cuda"}, "attention.backend = 'cuda'"),
        (
            {"model__num_query_groups": 3},
            "model.num_attention_heads = 4 is not a multiple of model.num_query_groups = 3: use 1, 2 or 4 groups",
        ),
        ({"model__hidden_size": 66}, "model.hidden_size = 66 is not a multiple of model.num_attention_heads = 4"),
        ({"model__hidden_size": "64"}, "model.hidden_size = '64'"),
        ({"parallel__tensor": 4}, "parallel.tensor = 4 does not divide model.num_query_groups = 2: use 1 or 2"),
        ({"parallel__tensor": 3}, "parallel.tensor = 3 does not divide model.num_attention_heads = 4: use 1 or 2"),
        ({"parallel__sequence": True}, "parallel.sequence = true needs parallel.tensor"),
        (
            {"parallel__pipeline": 3},
            "model.num_layers = 4 is not a multiple of parallel.pipeline x virtual_pipeline = 3 x 1 = 3: use 3 or 6 "
            "layers, or give the layers of each stage by parallel.pipeline_layers",
        ),
        (
            {"training__micro_batch_size": 3},
            "training.global_batch_size = 4 is not a multiple of training.micro_batch_size = 3: use 3 or 6",
        ),
        ({"training__stop_after": 11}, "training.stop_after = 11 is over training.steps = 10"),
        (
            {"training__recompute_layers": 1},
            "training.recompute_layers = 1 belongs to training.recompute: full, not none",
        ),
        (
            {"training__recompute": "full", "training__recompute_layers": 5},
            "training.recompute_layers = 5: no pipeline stage has over 4 layers in a row",
        ),
        (
            {"training__recompute": ["mlp"], "training__mlp_chunk_size": 64},
            "training.mlp_chunk_size = 64 computes the feed-forward again already: take mlp out",
        ),
        (
            {"training__offload": ["attn_proj"]},
            "training.offload = ['attn_proj']: the input of attn_proj is the output",
        ),
        ({"training__offload": ["moe_act"]}, "no layer has experts, so there is no moe_act to offload"),
        ({"training__offload": ["core_attn", "core_attn"]}, "names one twice"),
        (
            {"training__offload": ["core_attn"], "training__recompute": "full"},
            "training.offload = ['core_attn'] has nothing to offload with training.recompute: full",
        ),
        (
            {"training__offload": ["core_attn"], "training__recompute": "selective"},
            "core_attn is computed again (training.recompute = selective), so it keeps nothing to offload",
        ),
        (
            {"training__precision": "fp32", "training__gradient_precision": "bf16"},
            "training.gradient_precision = bf16 needs training.precision = bf16, not fp32",
        ),
        (
            {"training__precision": "bf16", "training__gradient_precision": "bf16"},
            "training.gradient_precision = bf16 needs parallel.distributed_optimizer = true",
        ),
        ({"training__precision": "fp8"}, "training.precision = 'fp8'"),
        ({"optimizer__warmup_steps": 10}, "optimizer.warmup_steps = 10 must be below training.steps = 10"),
        ({"optimizer__min_lr": 1.0}, "optimizer.min_lr = 1.0 is over optimizer.lr = 0.001"),
        ({"optimizer__decay": "WSD"}, "optimizer.wsd_decay_steps"),
        ({"evaluation__trailing_tokens": 129}, "evaluation.trailing_tokens = 129 is over data.sequence_length = 128"),
        ({"data__validation": None, "evaluation__every": 5}, "evaluation.every = 5 needs data.validation"),
        ({"logging__profile_steps": [3]}, "logging.profile_steps = [3]"),
    ],
)
def test_what_cannot_work_is_named(changes, expected):
    with pytest.raises(ConfigError) as error:
        config_from_dict(changed(**changes))
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("parallel", "data", "expected"),
    [
        ({"pipeline_layers": [4]}, {}, "parallel.pipeline_layers = [4] needs parallel.pipeline of at least 2"),
        (
            {"pipeline": 2, "pipeline_layers": [2, 1, 1]},
            {},
            "has 3 entries, but parallel.pipeline x virtual_pipeline =",
        ),
        ({"pipeline": 2, "virtual_pipeline": 2, "pipeline_layers": [3, 1]}, {}, "= 2 x 2 = 4: give 4"),
        ({"pipeline": 2, "pipeline_layers": [2, 3]}, {}, "[2, 3] adds up to 5, but model.num_layers = 4: take out 1"),
        ({"pipeline": 2, "pipeline_layers": [1, 1]}, {}, "[1, 1] adds up to 2, but model.num_layers = 4: add 2"),
        ({"pipeline": 2, "pipeline_layers": [5, -1]}, {}, "parallel.pipeline_layers.1 = -1"),
        (
            {"context": 3},
            {"cross_document_attention": True},
            "data.sequence_length = 128 is not a multiple of 2 x parallel.context = 2 x 3: use 126 or 132",
        ),
        (
            {"context": 32, "tensor": 2, "sequence": True},
            {"cross_document_attention": True, "sequence_length": 100},
            "data.sequence_length = 100 is not a multiple of 2 x parallel.context = 2 x 32 and parallel.context x "
            "parallel.tensor = 32 x 2: use 64 or 128",
        ),
        (
            {"tensor": 2, "sequence": True},
            {"sequence_length": 127},
            "data.sequence_length = 127 is not a multiple of parallel.tensor = 2 (parallel.sequence): use 126 or 128",
        ),
        (
            {"context": 4, "exchange": "a2a+p2p", "hierarchical_context": [2, 3]},
            {},
            "parallel.hierarchical_context = [2, 3] multiplies to 6, not to parallel.context = 4: use [2, 2]",
        ),
        (
            {"context": 12, "hierarchical_context": [2, 2]},
            {},
            "not to parallel.context = 12: use [2, 6], [3, 4], [4, 3] or [6, 2]",
        ),
        ({"context": 3, "hierarchical_context": [2, 2]}, {}, "parallel.context = 3: leave it out"),
        (
            {"context": 4, "exchange": "p2p", "hierarchical_context": [2, 2]},
            {},
            "has no effect with parallel.exchange = p2p: it belongs to a2a+p2p",
        ),
        ({"exchange": "ring"}, {}, "parallel.exchange.moba = 'ring': input should be 'auto', 'p2p', 'all_gather'"),
        ({"exchange": {"moba": "a2a", "ful": "p2p"}}, {}, "parallel.exchange.ful: unknown key; did you mean"),
    ],
)
def test_parallel_sizes_that_cannot_work_name_the_nearest_that_do(parallel, data, expected):
    values = changed()
    values["parallel"] = parallel
    values["data"] |= data
    with pytest.raises(ConfigError) as error:
        config_from_dict(values)
    assert expected in str(error.value)


def test_packs_are_padded_so_their_length_does_not_matter():
    parallel = {"context": 3, "tensor": 2, "sequence": True}
    assert config_from_dict({**changed(data__sequence_length=127), "parallel": parallel}).packed


def test_layers_of_chunks_are_in_the_order_of_the_model():
    assert config_from_dict(changed(parallel__pipeline=2)).chunk_layers == [2, 2]
    uneven = {"pipeline": 2, "virtual_pipeline": 2, "pipeline_layers": [2, 1, 1, 0]}
    assert config_from_dict({**SMALL, "parallel": uneven}).chunk_layers == [2, 1, 1, 0]


def test_an_exchange_is_one_word_or_one_for_each_kind(tmp_path):
    path = tmp_path / "config.yaml"
    for given, expected in (("a2a", ("a2a", "a2a")), ({"moba": "dispatch"}, ("dispatch", "auto"))):
        path.write_text(config_from_dict(changed(parallel__exchange=given)).to_yaml())
        exchange = load_config(path).parallel.exchange
        assert (exchange.moba, exchange.full) == expected
        assert load_config(path, ["parallel.exchange=p2p"]).parallel.exchange.full == "p2p"
        assert load_config(path, ["parallel.exchange.full=all_gather"]).parallel.exchange.full == "all_gather"
    path.write_text(yaml.safe_dump({**SMALL, "parallel": {"exchange": "a2a"}}))
    exchange = load_config(path, ["parallel.exchange.moba=dispatch"]).parallel.exchange
    assert (exchange.moba, exchange.full) == ("dispatch", "a2a")


def test_all_problems_come_at_once():
    with pytest.raises(ConfigError) as error:
        config_from_dict(changed(attention__block_size=256, optimizer__min_lr=1.0, training__stop_after=11))
    assert len(error.value.problems) == 3


@pytest.mark.parametrize("override", ["training.steps", "--lr=3"])
def test_an_override_of_another_form_is_refused(tmp_path, override):
    path = tmp_path / "config.yaml"
    path.write_text(config_from_dict(SMALL).to_yaml())
    with pytest.raises(ConfigError, match=r"key\.path=value"):
        load_config(path, [override])


@pytest.mark.parametrize(
    ("changes", "world_size", "expected"),
    [
        ({"parallel__tensor": 2}, 3, "= 2 does not divide the 3 processes: start 2 or 4"),
        ({"parallel__context": 4}, 2, "context 4 = 4 does not divide the 2 processes: start 4"),
        ({}, 3, "= 1 x 3 = 3: use 3 or 6"),
        (
            {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2, "training__global_batch_size": 3},
            2,
            "training.global_batch_size = 3 makes 3 microbatches, but the interleaved schedule needs a multiple",
        ),
    ],
)
def test_sizes_are_held_against_the_number_of_processes(changes, world_size, expected):
    with pytest.raises(ConfigError) as error:
        check_world(config_from_dict(changed(**changes)), world_size)
    assert expected in str(error.value)


def test_tokens_of_a_chunk_of_the_loss_by_device():
    default, own = config_from_dict(SMALL), config_from_dict(changed(training__loss_chunk_size=24))
    assert [default.training.tokens_of_loss_chunk(device) for device in ("cuda", "cpu")] == [4096, 512]
    assert [own.training.tokens_of_loss_chunk(device) for device in ("cuda", "cpu")] == [24, 24]


def test_the_data_parallel_size_is_what_is_left():
    assert check_world(config_from_dict(changed(parallel__tensor=2)), 4) == 2
    interleaved = {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2, "evaluation__samples": 3}
    assert check_world(config_from_dict(changed(**interleaved, data__validation=None)), 2) == 1


def test_the_reference_in_docs_is_the_schema():
    assert (ROOT / "docs/configuration.md").read_text() == reference(), (
        "run python -m moba_megatron.config.reference > docs/configuration.md"
    )


SHIPPED = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if "base" not in path.stem]
SWEEPS = [path for path in SHIPPED if "\naxes:" in path.read_text()]


@pytest.mark.parametrize("path", sorted({*SHIPPED} - {*SWEEPS}), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_shipped_configuration_loads(path):
    config = load_config(path)
    assert load_config(path, [f"run.seed={config.run.seed}"]) == config


def test_variants_of_a_file(tmp_path):
    """`FILE.yaml:NAME` is the file with the changes of one variant; a file that it is a base of has none."""
    (tmp_path / "small.yaml").write_text(config_from_dict(SMALL).to_yaml())
    text = "base: small.yaml\nvariants:\n  two: {run: {seed: 2}}\n  three: {run: {seed: 3}, training: {steps: 3}}\n"
    path = tmp_path / "file.yaml"
    path.write_text(text)
    (tmp_path / "below.yaml").write_text("base: file.yaml:three\nvariants: {four: {run: {seed: 4}}}\n")
    steps = load_config(path).training.steps
    found = {
        name: load_config(f"{tmp_path}/{name}") for name in ("file.yaml:two", "file.yaml:three", "below.yaml:four")
    }
    seeds_and_steps = [(config.run.seed, config.training.steps) for config in found.values()]
    assert seeds_and_steps == [(2, steps), (3, 3), (4, 3)] and names_in(path) == ["two", "three"]
    assert load_config(f"{path}:two", ["run.seed=5"]).run.seed == 5
    for name in ("file.yaml:four", "below.yaml:two"):
        with pytest.raises(ConfigError, match=f"has no variant '{name.partition(':')[2]}'; its variants: "):
            load_config(f"{tmp_path}/{name}")
    with pytest.raises(ConfigError, match="no such configuration file: .*missing.yaml"):
        load_config(tmp_path / "missing.yaml:two")
    path.write_text("base: small.yaml\nvariants: [two]\n")
    with pytest.raises(ConfigError, match="variants must hold a mapping of sections for each name"):
        load_config(f"{path}:two")

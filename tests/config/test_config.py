"""Configuration: inheritance, overrides, and an error with key, value and mend for everything that cannot work."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from moba_megatron.config import ConfigError, check_world, config_from_dict, load_config
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
            "model.num_attention_heads = 4 is not a multiple of model.num_query_groups = 3",
        ),
        ({"model__hidden_size": 66}, "model.hidden_size = 66 is not a multiple of model.num_attention_heads = 4"),
        ({"model__hidden_size": "64"}, "model.hidden_size = '64'"),
        ({"parallel__tensor": 4}, "parallel.tensor = 4 does not divide model.num_query_groups = 2"),
        ({"parallel__sequence": True}, "parallel.sequence = true needs parallel.tensor"),
        ({"parallel__pipeline": 3}, "model.num_layers = 4 is not a multiple of pipeline stages x chunks = 3"),
        ({"parallel__context": 2}, "parallel.context = 2"),
        ({"training__micro_batch_size": 3}, "training.global_batch_size = 4 is not a multiple"),
        ({"training__stop_after": 11}, "training.stop_after = 11 is over training.steps = 10"),
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
        ({"parallel__tensor": 2}, 3, "does not divide the 3 processes"),
        ({}, 3, "the nearest that is: 3"),
        (
            {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2, "training__global_batch_size": 3},
            2,
            "training.global_batch_size = 3 makes 3 microbatches, but the interleaved schedule wants a multiple",
        ),
    ],
)
def test_sizes_are_held_against_the_number_of_processes(changes, world_size, expected):
    with pytest.raises(ConfigError) as error:
        check_world(config_from_dict(changed(**changes)), world_size)
    assert expected in str(error.value)


def test_the_data_parallel_size_is_what_is_left():
    assert check_world(config_from_dict(changed(parallel__tensor=2)), 4) == 2


def test_the_reference_in_docs_is_the_schema():
    assert (ROOT / "docs/configuration.md").read_text() == reference(), (
        "run python -m moba_megatron.config.reference > docs/configuration.md"
    )


@pytest.mark.parametrize(
    "path", [p for p in sorted((ROOT / "configs").rglob("*.yaml")) if "base" not in p.stem], ids=lambda p: p.stem
)
def test_every_shipped_configuration_loads(path):
    config = load_config(path)
    assert load_config(path, [f"run.seed={config.run.seed}"]) == config

"""Plans: the arithmetic of time, bytes and layouts, and every full-size configuration through the command."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_run import small_config
from typer.testing import CliRunner

from moba_megatron.cli import app
from moba_megatron.config import ConfigError, check_world, load_config
from moba_megatron.config.checks import combination_problems
from moba_megatron.config.named import names_in
from moba_megatron.model.schedule import AttentionSchedule
from moba_megatron.parallel.ring_load import random_choice_factor
from moba_megatron.planning.kernel_model import LAUNCH_SECONDS, AttentionSizes, backward_work, forward_work
from moba_megatron.planning.plan_layouts import _cut, suggest_layouts
from moba_megatron.planning.plan_machines import GPUS, LINK_SHARE, Cluster
from moba_megatron.planning.plan_target import own_cluster
from moba_megatron.planning.plan_time import step_time
from moba_megatron.planning.run_plan import RunPlan, plan_run
from moba_megatron.training.dry_run import print_dry_run

CONFIGS = Path(__file__).parents[2] / "configs"
SWEEPS = ("scaling_8k", "scaling_32k", "granularity", "sparse_then_full", "layer_hybrid")
STAGES = [path for path in sorted((CONFIGS / "continued_pretraining").glob("*/*.yaml")) if path.stem != "base"]
FULL_SIZE = [
    *(f"paper/{sweep}.yaml:{name}" for sweep in SWEEPS for name in names_in(CONFIGS / f"paper/{sweep}.yaml")),
    *(f"{path.relative_to(CONFIGS)}{name and ':'}{name}" for path in STAGES for name in ("", *names_in(path))),
]
MOBA_1M = CONFIGS / "continued_pretraining/llama3.1_8b/1m_moba.yaml"


def schedule_of(config):
    return AttentionSchedule.from_config(config.attention, config.model.num_layers)


def call(*arguments: object, code: int = 0) -> str:
    result = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, ["plan", *map(str, arguments)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


def gpus_of(name: str) -> int:
    """How many GPUs a configuration is meant for."""
    if not name.startswith("continued_pretraining"):
        return 32
    return next((count for count in (256, 1024) if f":{count}gpus" in name), 64)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_every_full_size_configuration_fits_its_gpus(name):
    def plan(*overrides: str) -> RunPlan:
        config = load_config(CONFIGS / name, list(overrides))
        return plan_run(config, schedule_of(config), config.model.vocab_size, Cluster(GPUS["h100"], gpus_of(name)))

    own = plan()
    assert own.fits and 0.05 < own.mfu < 0.6, (own.peak, own.mfu)
    if own.config.training.loss_chunk_size is not None:  # only where the default has no room
        assert not plan("training.loss_chunk_size=null").fits


@pytest.mark.parametrize(
    "name",
    [
        "paper/scaling_32k.yaml:2.1b_full",
        "paper/sparse_then_full.yaml:moba_then_full",
        "continued_pretraining/qwen2.5_7b/1m_moba.yaml",
    ],
)
def test_a_dry_run_of_a_full_size_configuration(capsys, name):
    print_dry_run(load_config(CONFIGS / name), 1)
    output = capsys.readouterr().out
    for words in ("parameters", "tokens in all", "memory per rank", "GPU hours", "activations"):
        assert words in output


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_dry_run_of_every_full_size_configuration(capsys, name):
    print_dry_run(load_config(CONFIGS / name), 1)
    assert "GPU hours" in capsys.readouterr().out


def test_the_settings_of_the_report():
    for blocks in (8, 16, 32, 64, 128):
        config = load_config(CONFIGS / f"paper/granularity.yaml:{blocks // 4}_of_{blocks}")
        assert config.attention.block_size * blocks == config.data.sequence_length == 32768
        assert config.attention.top_k * 4 == blocks
    hybrid = schedule_of(load_config(CONFIGS / "paper/sparse_then_full.yaml:moba_then_full"))
    assert hybrid.until == (0.9, 1.0) and {layer.kind for layer in hybrid.stages[1]} == {"full"}
    assert (hybrid.stages[0][0].block_size, hybrid.stages[0][0].top_k) == (2048, 3)
    for size, tokens in (("545m", 10.8), ("822m", 15.3), ("1.1b", 20.6), ("1.5b", 27.4), ("2.1b", 36.9)):
        moba, full = (load_config(CONFIGS / f"paper/scaling_32k.yaml:{size}_{kind}") for kind in ("moba", "full"))
        assert moba.tokens_per_step * moba.training.steps == pytest.approx(tokens * 1e9, rel=1e-3)
        assert (moba.optimizer, moba.training, moba.model) == (full.optimizer, full.training, full.model)
    for count in (0, 1, 3, 5, 10):
        layers = schedule_of(load_config(CONFIGS / f"paper/layer_hybrid.yaml:last_{count}_full")).stages[0]
        assert [layer.kind for layer in layers] == ["moba"] * (20 - count) + ["full"] * count
    for model, interpolated in (("llama3.1_8b", "rotary_interpolation"), ("qwen2.5_7b", "rotary_scaling_factor")):
        folder = CONFIGS / "continued_pretraining" / model
        at_once = load_config(folder / "128k_moba.yaml")
        assert getattr(at_once.model, interpolated) == 1.0 and at_once.data.sequence_length == 2**17
        assert [layer.kind for layer in schedule_of(at_once).stages[0][-4:]] == ["moba", "full", "full", "full"]
        for stage, length in (("128k", 2**17), ("256k", 2**18), ("512k", 2**19), ("1m", 2**20), ("1m_moba", 2**20)):
            config = load_config(folder / f"{stage}.yaml")
            assert config.data.sequence_length == length and config.tokens_per_step == 2**23
            assert getattr(config.model, interpolated) == length / 2**17
        last = schedule_of(config).stages[0]
        assert {layer.kind for layer in last[-3:]} == {"full"} and (last[0].block_size, last[0].top_k) == (4096, 12)
        assert config.tokens_per_step * config.training.steps == pytest.approx(1e11, rel=1e-3)


def test_the_command_prints_a_plan_and_writes_it(tmp_path):
    output = call(MOBA_1M, "--gpus", 64, "--gpu", "H100", "--price-per-hour", 2, "--json", tmp_path / "new/plan.json")
    for words in ("64 x H100", "activations", "fits", "pipeline bubble", "GPU hours", "at 2 a GPU hour", "assumptions"):
        assert words in output
    written = json.loads((tmp_path / "new/plan.json").read_text())
    plan = written["plan"]
    parts = sum(plan["stages_of_training"][0]["seconds"].values())
    assert plan["step_seconds"] == pytest.approx(parts) and plan["fits"]
    assert plan["gpu_hours"] == pytest.approx(parts * 11921 * 64 / 3600)
    assert plan["tokens_per_second"] == pytest.approx(2**23 / parts)
    assert plan["step_seconds_full_attention"] > 2.5 * plan["step_seconds"]
    assert len(written["layouts"]) == 5
    # Each way to save memory, and what it costs in this layout.
    found = written["alternatives"]
    savings = ["none", "selective", "mlp", "core_attn mlp", "mlp by 8192", "selective, mlp by 8192", "full"]
    savings += ["full, mlp by 8192", "none; offload attention", "mlp; offload attention"]
    names = [*(f"recompute {words}" for words in savings), "gradients in bf16"]
    names[2] += " (as configured)"
    table = output.split("memory of this layout")[1].splitlines()
    lines = [[cell.strip() for cell in line.strip("│┃").split("│")] for line in table if line.startswith("│")]
    room = 0.9 * 80e9
    assert lines[: len(names)] == [
        [name, f"{one['memory'] / 2**30:.1f}", f"{one['step_seconds']:.3g}", "yes" if one["memory"] <= room else "no"]
        for name, one in zip(names, found, strict=True)
    ]
    assert {cells[3] for cells in lines[: len(names)]} == {"yes", "no"}
    assert [one["recompute"] for one in found[:4]] == ["none", "selective", ["mlp"], ["core_attn", "mlp"]]
    assert found[4]["mlp_chunk_size"] == 8192 and found[9]["offload"] == ["qkv_linear", "core_attn", "attn_proj"]
    assert found[10].keys() == {"memory", "step_seconds", "gradient_precision"}
    own = max(m["total"] for m in plan["memory_bytes"])
    assert (found[2]["memory"], found[2]["step_seconds"]) == (own, pytest.approx(plan["step_seconds"]))
    needed = plan["evaluation_bytes"]
    assert needed["weights"] + needed["working"] == needed["total"] < max(m["total"] for m in plan["memory_bytes"])
    assert f"{needed['weights'] / 2**30:.1f} GiB of weights" in output
    # The overrides of a suggestion ask for that layout, whatever the configuration has.
    first = written["layouts"][0]
    again = call(MOBA_1M, *first["overrides"], "--gpus", 64, "--layouts", 0, "--json", tmp_path / "again.json")
    assert "layouts that fit" not in again
    assert json.loads((tmp_path / "again.json").read_text())["plan"]["step_seconds"] == pytest.approx(
        first["step_seconds"]
    )


@pytest.mark.parametrize(
    ("name", "overrides", "count"),
    [
        ("continued_pretraining/llama3.1_8b/128k.yaml", [], 64),
        ("continued_pretraining/llama3.1_8b/1m.yaml:256gpus", [], 256),
        ("paper/scaling_8k.yaml:545m_moba", [], 8),
        ("paper/scaling_8k.yaml:545m_moba", ["training.global_batch_size=6"], 6),
        ("continued_pretraining/llama3.1_8b/128k.yaml", ["parallel.context=1"], 8),  # which does not fit any
    ],
)
def test_without_a_number_of_gpus_the_layout_says_it(name, overrides, count):
    config = load_config(CONFIGS / name, overrides)
    assert own_cluster(config, Cluster(GPUS["h100"], 1)).count == count


def test_a_model_without_a_configuration_is_planned(tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
    more = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", **sizes, **more}))
    output = call(tmp_path, "--length", "128K", "--gpus", 8, "--json", tmp_path / "plan.json")
    assert "MoBA (block_size 1024, top_k 16, the last 3 layers full) at 131,072 tokens, 8,388,608 a step" in output
    written = json.loads((tmp_path / "plan.json").read_text())
    layout = written["layouts"][0]["parallel"]
    assert layout.items() <= written["plan"]["parallel"].items() and written["plan"]["fits"]
    assert "8 x H100" in call(tmp_path, "attention.kind=full", "--length", "8K", "--layouts", 0)
    assert "--length 128K" in call(tmp_path, code=2)
    assert "'128k' is not a number of tokens" in call(tmp_path, "--length", "128k", code=2)
    assert "give data.sequence_length=N" in call(MOBA_1M, "--length", "128K", code=2)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--gpu", "v100"), 2, "--gpu v100: choose one of a100, h100, h200, b200"),
        (("--gpus", "0"), 2, "Invalid value"),
        (("training.precision=fp32",), 2, "training.precision=bf16"),
        (("model.vocab_size=null",), 2, "model.vocab_size is not set"),
        (("model.layers=3",), 2, "unknown key"),
        (("attention.block_size=9999999",), 2, "over data.sequence_length"),
        (("--gpus", "48"), 1, "does not divide the 48 processes"),
        (("parallel.context=1", "--gpus", "4"), 1, "DOES NOT FIT"),
        (("parallel.exchange=a2a", "--gpus", "64"), 2, "exchange a2a"),
    ],
)
def test_mistakes_end_with_what_would_work(arguments, code, words):
    assert words in call(MOBA_1M, *arguments, code=code)


def test_layouts_pass_the_checks_of_a_run():
    config = load_config(MOBA_1M)
    cluster = Cluster(GPUS["h200"], 128)
    layouts = suggest_layouts(config, schedule_of(config), 128256, cluster, 1000)
    assert len(layouts) > 20
    uneven = [layout.parallel.pipeline_layers for layout in layouts if layout.parallel.pipeline_layers]
    assert uneven and all(sum(layers) == 32 and layers[-1] < layers[0] for layers in uneven)
    for layout in layouts:
        trial = config.model_copy(update={"parallel": layout.parallel})
        assert not combination_problems(trial) and check_world(trial, 128) == layout.data


def test_nothing_fits_where_nothing_can():
    config = load_config(MOBA_1M)
    assert suggest_layouts(config, schedule_of(config), 128256, Cluster(GPUS["a100"], 4)) == []
    assert "no layout of these GPUs fits" in call(MOBA_1M, "--gpus", 4, "--gpu", "a100", code=1)


def longest(seconds, counts, tail):
    """Of consecutive stages with so many layers each; the tail belongs to the last."""
    ends = list(itertools.accumulate(counts))
    stages = [sum(seconds[end - count : end]) for count, end in zip(counts, ends, strict=True)]
    return max([*stages[:-1], stages[-1] + tail])


def test_pipeline_stages_are_cut_as_well_as_can_be():
    torch.manual_seed(3)
    for layers, stages in ((1, 1), (6, 2), (7, 3), (9, 4)):
        for _ in range(10):
            seconds, tail = (torch.rand(layers) ** 3).tolist(), float(torch.rand(()))
            counts = _cut(seconds, stages, tail)
            assert len(counts) == stages and sum(counts) == layers and min(counts) >= 1
            every = [cut for cut in itertools.product(range(1, layers + 1), repeat=stages) if sum(cut) == layers]
            assert longest(seconds, counts, tail) == pytest.approx(min(longest(seconds, cut, tail) for cut in every))


def times(folder, gpus: int = 8, **changes):
    config = small_config(
        folder, training__precision="bf16", training__global_batch_size=64, training__micro_batch_size=1, **changes
    )
    cluster = Cluster(GPUS["h100"], gpus)
    return config, step_time(config, schedule_of(config).stages[0], 128, check_world(config, gpus), cluster)


def test_bubble_and_transfers_of_a_pipeline(tmp_path):
    config, one = times(tmp_path, parallel__pipeline=4)
    slowest = max(one.stages)
    # 64 samples on 2 data-parallel ranks: 32 microbatches; the others once more.
    work = sum(one.parts[name] for name in ("matrix products", "attention", "pipeline transfers"))
    assert work == pytest.approx(32 * slowest)
    assert one.parts["pipeline bubble"] == pytest.approx(sum(one.stages) - slowest)
    stream = config.data.sequence_length * config.model.hidden_size * 2
    assert one.received["pipeline"] == 32 * 2 * stream
    _, interleaved = times(tmp_path, parallel__pipeline=2, parallel__virtual_pipeline=2)
    assert interleaved.parts["pipeline transfers"] == 0 < interleaved.received["pipeline"]


def test_bytes_of_tensor_and_data_parallelism(tmp_path):
    config, tensor = times(tmp_path, parallel__tensor=2, gpus=2)
    stream = config.data.sequence_length * config.model.hidden_size * 2
    # Eight halves of the stream for each of four layers, and two for embedding and loss each.
    assert tensor.received["tensor"] == 64 * (4 * 8 + 2 + 2) * stream / 2
    assert tensor.received["data"] == 0
    _, sequence = times(tmp_path, parallel__tensor=2, parallel__sequence=True, gpus=2)
    assert sequence.received["tensor"] == 64 * (4 * 10 + 2 + 2) * stream / 2
    _, data = times(tmp_path, gpus=4)
    _, split = times(tmp_path, gpus=4, parallel__distributed_optimizer=True)
    assert split.received["data"] / data.received["data"] == 6 / 8
    assert split.parts["optimizer"] == pytest.approx(data.parts["optimizer"] / 4)


def test_overlapped_gradients_hide_behind_the_last_backward_pass(tmp_path):
    def waited(**changes):
        return times(tmp_path, gpus=4, **changes)[1].parts["data parallelism"]

    for sharded, left in ((False, 0), (True, 1 / 3)):  # weights in bf16 are still gathered
        one, other = (
            waited(parallel__distributed_optimizer=sharded, parallel__overlap_grad_reduce=overlap)
            for overlap in (False, True)
        )
        assert other == pytest.approx(left * one)


def test_recomputation_takes_time(tmp_path):
    found = {
        recompute: times(tmp_path, training__recompute=recompute)[1] for recompute in ("none", "selective", "full")
    }
    products = {recompute: step.parts["matrix products"] for recompute, step in found.items()}
    attention = {recompute: step.parts["attention"] for recompute, step in found.items()}
    assert products["none"] == products["selective"] < products["full"]
    assert attention["none"] < attention["selective"] == attention["full"]


def test_a_small_workspace_takes_more_launches(tmp_path):
    def attention(**changes):
        config, step = times(tmp_path, attention__last_n_full=0, **changes)
        return config, step.parts["attention"]

    config, default = attention()
    # 64 samples, 4 layers, each cut into more passes, forward and backward.
    small, model, length = 2**14, config.model, config.data.sequence_length
    sizes = AttentionSizes(length, model.num_attention_heads, model.query_groups, model.head_size, 16, 3)
    cut = replace(sizes, workspace_bytes=small)
    assert sizes.forward_passes == sizes.backward_passes == 1 < cut.forward_passes <= cut.backward_passes
    more = sum(launches(cut)) - sum(launches(sizes))
    _, found = attention(attention__workspace_bytes=small)
    microbatches = 64 // 8
    assert found - default == pytest.approx(microbatches * model.num_layers * more * LAUNCH_SECONDS, rel=1e-6)


def launches(sizes: AttentionSizes) -> list[int]:
    return [work.launches for work in (*forward_work(sizes), *backward_work(sizes))]


def test_a_ring_waits_for_its_busiest_rank(tmp_path):
    def attention(exchange: str, **changes):
        return times(tmp_path, parallel__context=4, parallel__exchange=exchange, **changes)[1].parts["attention"]

    factor = random_choice_factor(4, 128 / 16, 3)
    assert factor > 1.1
    for last_full in (0, 4):  # full layers work evenly
        ring, whole = (attention(name, attention__last_n_full=last_full) for name in ("p2p", "all_gather"))
        assert ring / whole == pytest.approx(1.0 if last_full else factor)
    half = attention("a2a+p2p", attention__last_n_full=0) / attention("all_gather", attention__last_n_full=0)
    assert half == pytest.approx(random_choice_factor(2, 128 / 16, 3))


def test_links_within_a_node_and_between_nodes():
    cluster = Cluster(GPUS["h100"], 64)
    assert cluster.link(1, 8) == LINK_SHARE * 450e9 and cluster.link(1, 16) == LINK_SHARE * 50e9
    assert cluster.scatter_seconds(8e9, 1, 8) == pytest.approx(8e9 / (LINK_SHARE * 450e9))
    # Half a node a group: 12 of 15 others are elsewhere.
    assert cluster.scatter_seconds(15e9, 2, 16) == pytest.approx(12e9 / (LINK_SHARE * 50e9))
    assert cluster.reduce_seconds(1e9, 8, 8) == pytest.approx(1e9 / (LINK_SHARE * 50e9))
    assert cluster.reduce_seconds(1e9, 1, 64) == pytest.approx(1e9 / (LINK_SHARE * 400e9))


def test_a_precision_without_a_model_is_refused(tmp_path):
    config = small_config(tmp_path)
    with pytest.raises(ConfigError, match="training.precision=bf16"):
        plan_run(config, schedule_of(config), 128, Cluster(GPUS["h100"], 1))

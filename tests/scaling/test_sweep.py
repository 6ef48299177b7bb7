"""What a sweep file stands for, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from scaling.sweep_examples import write_sweep

from moba_megatron.config import ConfigError, load_config
from moba_megatron.config.named import names_in
from moba_megatron.config.sweep import run_of
from moba_megatron.config.sweep_file import Figure, read_sweep
from moba_megatron.ops.pairs import attended_pairs
from moba_megatron.scaling.actions import print_tables
from moba_megatron.scaling.laws import left_out
from moba_megatron.scaling.plots import draw
from moba_megatron.scaling.results import Result, read_result
from moba_megatron.scaling.runner import default_jobs, gpus_of, run_sweep, visible_gpus
from moba_megatron.scaling.sweep import load_sweep
from moba_megatron.scaling.tables import gap_rows, plan_rows, provenance, result_rows

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = [path for path in sorted(CONFIGS.rglob("*.yaml")) if "\naxes:" in path.read_text()]


def test_points_are_the_product_of_the_axes(tmp_path):
    sweep = load_sweep(write_sweep(tmp_path, tokens_per_parameter=4))
    assert [point.name for point in sweep.points] == ["small_moba", "small_full", "large_moba", "large_full"]
    small, large = sweep.points[0], sweep.points[2]
    # One layer: queries and output 32 x 32 each, two key/value heads of 8, three matrices of 32 x 64.
    layer = 2 * 32 * 32 + 2 * 2 * 8 * 32 + 3 * 32 * 64
    assert (small.parameters, large.parameters) == (2 * layer, 4 * layer)
    assert small.config.training.steps == round(4 * 2 * layer / (4 * 128))
    assert small.tokens == small.config.training.steps * 4 * 128
    assert small.flops_6nd == 6 * small.parameters * small.tokens
    assert small.config.attention.kind == "moba" and sweep.points[1].config.attention.kind == "full"
    assert sweep.point("2") is large and sweep.point("large_moba") is large


def test_sizes_of_mixtures_are_what_works_for_a_token(tmp_path, capsys):
    mixture = {"model.num_moe_experts": 8, "model.moe_router_topk": 2, "model.moe_ffn_hidden_size": 32}
    experts = {"dense": {}, "2 of 8": mixture | {"model.moe_layer_freq": [0, 1, 1, 1]}}
    rule = {"value": 1e-3, "parameters": 1000, "exponent": -0.5}
    axes = {"size": {"small": {"model.hidden_size": 32}, "large": {"model.hidden_size": 64}}, "experts": experts}
    figures = [{"kind": "scaling", "axis": "experts"}]
    path = write_sweep(tmp_path, axes=axes, figures=figures, tokens_per_parameter=4, learning_rate=rule)
    sweep = load_sweep(path)
    dense, sparse = sweep.points[:2]
    # Two experts of 32 channels are as wide as the feed-forward; what is more is a router of 32 x 8 in three layers.
    assert sparse.parameters == dense.parameters + 3 * 32 * 8
    assert sparse.total_parameters == sparse.parameters + 3 * 6 * 3 * 32 * 32
    assert dense.total_parameters == dense.parameters
    assert sparse.config.training.steps == round(4 * sparse.parameters / (4 * 128))
    assert sparse.config.optimizer.lr == pytest.approx(1e-3 * (sparse.parameters / 1000) ** -0.5, rel=1e-3)
    assert sparse.flops_true - dense.flops_true == pytest.approx(
        6 * 3 * 32 * 8 * sparse.tokens + dense.flops_true * (sparse.tokens / dense.tokens - 1)
    )
    results = [Result(point, "finished", loss=3.0 + n) for n, point in enumerate(sweep.points)]
    headings, rows = result_rows(sweep, results)
    assert headings[2:6] == ["active parameters", "all parameters", "tokens", "PFLOP/s-days (6 N D, N active)"]
    assert rows[1][2:4] == [f"{sparse.parameters:,}", f"{sparse.total_parameters:,}"]
    assert plan_rows(sweep, results)[0][1:3] == headings[2:4]
    assert draw(sweep, results, sweep.file.figures[0], tmp_path / "sizes.png").is_file()
    print_tables(path, None)
    assert "- N: parameters that are active for a token" in capsys.readouterr().out
    assert not load_sweep(write_sweep(tmp_path)).has_mixtures


def test_true_operations_follow_the_stages(tmp_path):
    axes = {
        "attention": {
            "full": {"attention.kind": "full", "attention.last_n_full": 0},
            "moba": {"attention.last_n_full": 0},
            "half": {"attention.last_n_full": 0, "attention.stages": [{"until": 0.5}, {"until": 1.0, "kind": "full"}]},
        }
    }
    full, moba, half = load_sweep(write_sweep(tmp_path, axes=axes, figures=[{"kind": "curves"}])).points
    pairs = [attended_pairs(128, 16, 3), attended_pairs(128)]
    # 12 operations for each pair, channel and head, forward and backward; four layers, four heads of 8.
    assert full.flops_true - moba.flops_true == pytest.approx(
        12 * 8 * 4 * 4 * (pairs[1] - pairs[0]) / 128 * full.tokens
    )
    assert half.flops_true == pytest.approx((full.flops_true + moba.flops_true) / 2)


def test_options_say_what_a_file_would_say(tmp_path):
    data = {"data.train": "web #2/train", "data.tokenizer": "${data.train}/007", "optimizer.lr": "1e-3"}
    sweep = load_sweep(write_sweep(tmp_path, axes={"data": {"one": data}}, figures=[], dir=str(tmp_path / "a #1")))
    config = sweep.points[0].config
    assert (config.data.train, config.data.tokenizer) == ("web #2/train", "web #2/train/007")
    assert (config.optimizer.lr, config.run.dir) == (1e-3, str(tmp_path / "a #1" / "one"))
    with pytest.raises(ConfigError, match="data.train = 7"):
        load_sweep(write_sweep(tmp_path, axes={"data": {"one": {"data.train": 7}}}, figures=[]))


def test_learning_rate_follows_the_size(tmp_path):
    rule = {"value": 1e-3, "parameters": 20000, "exponent": -0.5, "final_share": 0.2}
    sweep = load_sweep(write_sweep(tmp_path, learning_rate=rule, warmup_share=0.25))
    for point in sweep.points:
        expected = 1e-3 * (point.parameters / 20000) ** -0.5
        assert point.config.optimizer.lr == pytest.approx(expected, rel=1e-3)
        assert point.config.optimizer.min_lr == pytest.approx(0.2 * expected, rel=1e-3)
        assert point.config.optimizer.warmup_steps == 2


def test_an_option_may_set_keys_of_the_sweep(tmp_path):
    axes = {"rate": {"low": {"learning_rate": 1e-4}, "high": {"learning_rate": 1e-2}}, "much": {"x": {"tokens": 4096}}}
    sweep = load_sweep(write_sweep(tmp_path, axes=axes, tokens_per_parameter=1, figures=[{"kind": "curves"}]))
    assert [point.config.optimizer.lr for point in sweep.points] == [1e-4, 1e-2]
    assert {point.config.training.steps for point in sweep.points} == {8}


def test_digits_are_the_number_of_a_run(tmp_path):
    axes = {"seed": {"1": {"run.seed": 1}, "2": {"run.seed": 2}}}
    sweep = load_sweep(write_sweep(tmp_path, axes=axes, figures=[]))
    assert [sweep.point(str(number)).name for number in range(2)] == ["1", "2"]
    with pytest.raises(ConfigError, match="The run called 2 has number 1"):
        sweep.point("2")
    with pytest.raises(ConfigError, match="has no run '3': give a number below 2$"):
        sweep.point("3")


def test_numbers_may_name_options(tmp_path):
    """As YAML reads them, they are numbers."""
    axes = {"seed": {1234: {"run.seed": 1234}, 7: {"run.seed": 7}}, "rate": {0.5: {"optimizer.lr": 0.5}}}
    sweep = load_sweep(write_sweep(tmp_path, axes=axes, figures=[], skip=[{"seed": 7, "rate": 0.5}]))
    assert [point.name for point in sweep.points] == ["1234_0.5"]


def test_skipped_combinations(tmp_path):
    sweep = load_sweep(write_sweep(tmp_path, skip=[{"size": "large", "attention": "full"}]))
    assert [point.name for point in sweep.points] == ["small_moba", "small_full", "large_moba"]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"axes": {"size": {}}}, "axes.size has no options"),
        ({"axes": {"size": {"a": {"model.layers": 2}}}, "figures": []}, "run a: model.layers: unknown key"),
        ({"best_of": ["seed"]}, "best_of names 'seed'"),
        ({"skip": [{"size": "huge"}]}, "skip names size: huge"),
        ({"figures": [{"kind": "options", "axis": "depth"}]}, "needs axis, one of size, attention, not 'depth'"),
        ({"figures": [{"kind": "scaling", "metric": "needle"}]}, "shows loss or trailing_loss, not 'needle'"),
        (
            {"axes": {"x": {"a": {"attention.layers": {1: {"kind": "full", "block_size": 8}}}}}, "figures": []},
            "run a: attention.layers gives layer 1 block_size, but it is full in every stage",
        ),
        ({"axes": {"x": {"a": {"run.dir": "b"}}}, "figures": []}, "run a: run.dir: the folder of a run is"),
        ({"axes": {"x": {"a": {"tokens": "1e6", "start_from": 3}}}, "figures": []}, "start_from: Input should be"),
        ({"axes": {"x": {"a": {"tokens": -1}}}, "figures": []}, "tokens: Input should be greater than 0"),
        ({"axes": {"x": {"a": {"learning_rate": "fast"}}}, "figures": []}, "run a: learning_rate"),
        ({"axes": {"x": {"a": {"lr": 1.0}}}, "figures": []}, "run a: lr: Extra inputs"),
        ({"tokens": 4096, "axes": {"x": {"a": {"training.steps": 3}}}, "figures": []}, "training.steps: set by an op"),
        (
            {"axes": {"x": {"a": {"run.seed": 1}}, "y": {"b": {"run.seed": 2}}}, "figures": []},
            "run a_b: run.seed: set by b and by an option of another axis",
        ),
        ({"tokens": 1.0, "tokens_per_parameter": 1.0}, "not both"),
        ({"bases": 1}, "bases: Extra inputs"),
        ({"skip": [{"attention": "moba"}, {"attention": "full"}]}, "skip leaves no run"),
        (
            {"axes": {"x": {"a": {"start_from": "b"}, "b": {}}}, "figures": []},
            "run a: start_from = b: give a run before",
        ),
        ({"axes": {"x": {"a b": {}, "a-b": {"run.seed": 2}}}, "figures": []}, "two runs would be named a-b"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        load_sweep(write_sweep(tmp_path, **changes))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_shipped_sweep_loads(path):
    sweep = load_sweep(path)
    assert len({point.folder for point in sweep.points}) == len(sweep.points) > 0
    assert len({point.config.model_dump_json() for point in sweep.points}) == len(sweep.points)


@pytest.mark.parametrize("path", [path for path in SHIPPED if path.parent.name == "paper"], ids=lambda p: p.stem)
def test_a_run_of_a_sweep_is_a_configuration(path):
    points = load_sweep(path).points
    assert names_in(path) == [point.name for point in points]
    for number in {0, len(points) - 1}:
        point = points[number]
        assert load_config(f"{path}:{point.name}") == load_config(f"{path}:{number}") == point.config
        changed = load_config(f"{path}:{point.name}", ["run.seed=7"])
        assert changed == point.config.model_copy(update={"run": changed.run}) and changed.run.seed == 7


def test_a_sweep_is_no_configuration_without_a_run(tmp_path):
    path = write_sweep(tmp_path)
    with pytest.raises(ConfigError, match=r"is a sweep: name one of its runs, .*sweep.yaml:RUN"):
        load_config(path)
    with pytest.raises(ConfigError, match="has no run 'tiny': give a number below 4 or one of small_moba"):
        load_config(f"{path}:tiny")


def test_an_unknown_run(tmp_path):
    with pytest.raises(ConfigError, match="has no run 'tiny'"):
        load_sweep(write_sweep(tmp_path)).point("tiny")


def test_weights_to_start_from_need_not_be_there_yet(tmp_path):
    axes = {"stage": {"short": {"start_from": "models/tiny"}, "long": {"start_from": "short"}}}
    short, long = load_sweep(write_sweep(tmp_path, axes=axes, figures=[])).points
    assert short.start_from is None and short.config.model.init_from == "models/tiny"
    assert long.start_from is short and long.config.model.init_from == str(short.folder)


def test_further_evaluations_are_columns_and_metrics(tmp_path):
    sweep = load_sweep(write_sweep(tmp_path, columns=["needle_*_greedy_match"]))
    moba = {"kind": "tasks", "attention": "moba", "needle_128_greedy_match": 0.5, "needle_128_answer_nats": 1.5}
    full = moba | {"attention": "full", "needle_128_greedy_match": 0.75}
    tasks = [moba, full]
    results = [Result(point, "finished", loss=1.0, tasks=tasks) for point in sweep.points]
    assert [r.metric("needle_128_greedy_match") for r in results] == [0.5, 0.75] * 2
    assert results[0].metric("needle_64_greedy_match") is None
    headings, rows = result_rows(sweep, results)
    assert headings[-3:] == ["needle 128 greedy match, moba", "needle 128 greedy match, full", "minutes"]
    assert rows[0][-3:-1] == ["0.5000", "0.7500"]
    assert left_out(results, "needle_64_greedy_match")[0] == (
        "small_moba: no needle_64_greedy_match: no evaluation gave it"
    )


def test_a_metric_under_both_attentions_is_that_of_the_last_stage(tmp_path):
    stages = [{"until": 0.5}, {"until": 1.0, "kind": "full"}]
    axes = {"attention": {"staged": {"attention.stages": stages}, "one layer": {"attention.last_n_full": 3}}}
    points = load_sweep(write_sweep(tmp_path, axes=axes, figures=[])).points
    tasks = [{"kind": "tasks", "attention": attention, "x": x} for attention, x in (("moba", 0.1), ("full", 0.9))]
    assert [Result(point, "finished", tasks=tasks).metric("x") for point in points] == [0.9, 0.1]


def test_routing_by_another_choice_is_no_result_of_the_run(tmp_path):
    (point, *_) = load_sweep(write_sweep(tmp_path)).points
    point.folder.mkdir(parents=True)
    steps = point.config.training.steps
    (point.folder / "status.json").write_text(json.dumps({"state": "finished", "step": steps}))
    own = {"step": steps, "kind": "routing", "attention": "moba", "mass_held": 0.6}
    losses = {"step": steps, "loss": 1.0, "trailing_loss": 0.9, "by_position": []}
    lines = [losses, own, {**own, "mass_held": 0.7, "choice": "B = 8, K = 12"}]
    (point.folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = read_result(point)
    assert (result.state, result.loss, result.tasks) == ("finished", 1.0, [own])


def test_gaps_are_between_runs_that_agree_in_the_other_axes(tmp_path):
    sweep = load_sweep(write_sweep(tmp_path))
    losses = {"small_moba": 3.0, "small_full": 3.25, "large_full": 2.0}  # large_moba has not finished
    results = [
        Result(point, "finished", loss=losses[point.name]) if point.name in losses else Result(point, "cut")
        for point in sweep.points
    ]
    assert gap_rows(sweep, results, "attention", "loss") == (["size", "loss, moba minus full"], [["small", "-0.2500"]])
    assert gap_rows(sweep, results, "size", "loss") == (
        ["attention", "loss, small minus large"],
        [["full", "+1.2500"]],
    )
    assert draw(sweep, results, Figure(kind="scaling"), tmp_path / "gaps.png").is_file()


def test_gaps_of_seeds_have_a_mean(tmp_path):
    axes = {
        "seed": {f"seed {n}": {"run.seed": n} for n in range(4)},
        "attention": {"moba": {}, "full": {"attention.kind": "full"}},
    }
    sweep = load_sweep(write_sweep(tmp_path, axes=axes))
    gaps = {"seed-0": 0.1, "seed-1": 0.2, "seed-2": 0.6, "seed-3": None}
    results = [
        Result(point, "finished", loss=3.0 if kind == "full" else 3.0 + gaps[seed])
        for point in sweep.points
        for seed, kind in [point.name.split("_")]
        if kind == "full" or gaps[seed] is not None
    ]
    _, rows = gap_rows(sweep, results, "attention", "loss")
    assert [row[0] for row in rows] == ["seed 0", "seed 1", "seed 2", "mean"]
    # stdev([0.1, 0.2, 0.6]) = 0.2646, over the root of 3.
    assert rows[-1][1] == "+0.3000 ± 0.1528"
    for result in results:
        result.point.folder.mkdir(parents=True)
        (result.point.folder / "environment.json").write_text('{"commit": "abc", "processor": "one machine"}')
    assert provenance(results) == ["7 of 7 runs: commit abc, one machine"]


def test_a_run_of_another_sweep_must_have_finished(tmp_path):
    source = tmp_path / "before"
    axes = {"stage": {"next": {"start_from": str(source)}}}
    sweep = load_sweep(write_sweep(tmp_path, axes=axes, figures=[]))
    source.mkdir()
    (source / "status.json").write_text('{"state": "stopped", "step": 6}')
    with pytest.raises(ConfigError, match="next starts from .*before, which is stopped at step 6: finish that run"):
        run_sweep(sweep, sweep.points, jobs=1)


def test_trainings_have_gpus_of_their_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,6,7")
    assert visible_gpus() == ["2", "3", "6", "7"]
    assert [default_jobs(processes) for processes in (1, 2, 4, 8)] == [4, 2, 1, 1]
    assert gpus_of(1, 2, visible_gpus()) == ["6", "7"]
    assert [gpus_of(slot, 1, ["0", "1"]) for slot in range(3)] == [["0"], ["1"], ["0"]]


def test_what_a_sweep_leaves_open_is_as_in_the_weights_it_starts_from(tmp_path):
    axes = {"stage": {"short": {"start_from": "models/tiny", "model.num_query_groups": None}}}
    (point,) = load_sweep(write_sweep(tmp_path, axes=axes, figures=[])).points
    point.folder.mkdir(parents=True)
    (point.folder / "status.json").write_text('{"state": "stopped", "step": 1}')
    model = point.config.model.model_copy(update={"num_query_groups": 2, "kv_channels": 8})
    (point.folder / "config.yaml").write_text(point.config.model_copy(update={"model": model}).to_yaml())
    assert read_result(point).state == "cut"
    # What the base does not say is not taken from the weights either.
    overrides = run_of(tmp_path / "sweep.yaml", "short", read_sweep(tmp_path / "sweep.yaml")).overrides
    assert "model.layernorm_epsilon=1e-05" in overrides and "model.num_layers=4" not in overrides
    other = model.model_copy(update={"num_layers": 7})
    (point.folder / "config.yaml").write_text(point.config.model_copy(update={"model": other}).to_yaml())
    with pytest.raises(ConfigError, match=r"model.num_layers = 4 \(the run has 7\)"):
        read_result(point)

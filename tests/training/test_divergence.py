"""Steps that diverge: recorded, skipped, rolled back, run again; alike on all ranks, and equal to a run that was told
to leave the batch out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from small_run import numbers_of, read_metrics, small_config, train_here
from test_resume import weights_of

from moba_megatron.checkpoint import Manifest, list_checkpoints
from moba_megatron.config import Config, ConfigError
from moba_megatron.data.packing_datasets import ConcatenatedRows
from moba_megatron.runs.folder import RunFolder
from moba_megatron.training.divergence import Spikes
from moba_megatron.training.faults import TrainingDiverged
from moba_megatron.training.optimizer import update
from moba_megatron.training.preflight import preflight

# Of the fourth step, of its second microbatch on one rank.
STEP, POISONED = 4, 14
LAYOUTS = {
    "one": (1, {}),
    "dp2": (2, {"parallel__distributed_optimizer": True, "training__precision": "bf16"}),
    "tp2": (2, {"parallel__tensor": 2, "parallel__distributed_optimizer": True}),
    "pp2": (2, {"parallel__pipeline": 2, "training__micro_batch_size": 1}),
    # The biases of experts change with the gradients.
    "ep2": (2, {"parallel__expert": 2, "parallel__distributed_optimizer": True, **{
        "model__num_moe_experts": 4,
        "model__moe_ffn_hidden_size": 16,
        "model__moe_router_score_function": "sigmoid",
        "model__moe_router_enable_expert_bias": True,
    }}),
}  # fmt: skip


def poisoned_sample(self: ConcatenatedRows, number: int, *, get: Any = ConcatenatedRows.__getitem__) -> dict[str, Any]:
    """A sample of the dataset, of which one has a weight that is not a number."""
    sample = get(self, number)
    if number == POISONED:
        sample["loss_mask"][5] = float("nan")
    return sample


def train_poisoned(config: Config, ranks: int) -> Any:
    """Train with the poisoned sample, inside a rank; how it ended."""
    ConcatenatedRows.__getitem__ = poisoned_sample
    try:
        return train_here(config, ranks)
    except TrainingDiverged as error:
        return str(error)


def config_of(folder: Path, **changes: Any) -> Config:
    folder.mkdir(exist_ok=True)
    steps = {"training__steps": 6, "checkpoint__every": 2, "model__num_layers": 2, "evaluation__samples": 4}
    return small_config(folder, **{**steps, **changes})


def divergences(config: Config) -> list[dict[str, Any]]:
    return read_metrics(Path(config.run.dir), "divergences.jsonl")


@pytest.mark.parametrize(
    ("layout", "policy"),
    [
        ("one", "rollback"),
        ("dp2", "rollback"),
        pytest.param("ep2", "skip", marks=pytest.mark.slow),
        pytest.param("tp2", "skip", marks=pytest.mark.slow),
        pytest.param("pp2", "rollback", marks=pytest.mark.slow),
    ],
)
def test_a_batch_that_diverges_is_left_out_as_if_the_configuration_had_said_so(tmp_path, layout, policy):
    ranks, changes = LAYOUTS[layout]
    told = config_of(tmp_path / "told", training__skip_batches=[STEP], **changes)
    assert run_ranks(ranks, train_here, told, ranks) == [("finished", 6)] * ranks
    found = config_of(tmp_path / "found", training__on_divergence=policy, checkpoint__every=3, **changes)
    assert run_ranks(ranks, train_poisoned, found, ranks) == [("finished", 6)] * ranks
    here, there = Path(told.run.dir), Path(found.run.dir)
    assert numbers_of(read_metrics(here)) == numbers_of(read_metrics(there))
    assert read_metrics(here, "evaluations.jsonl") == read_metrics(there, "evaluations.jsonl")
    line = read_metrics(there)[STEP - 1]
    assert line["loss"] is None and "the loss is nan" in line["skipped"]
    one, two = (weights_of(folder / "checkpoints/step_6") for folder in (here, there))
    assert all(torch.equal(one[name], two[name]) for name in one)
    (record,) = divergences(found)
    assert (record["step"], record["action"], record["samples"]) == (STEP, policy, [12, 15])
    assert POISONED in {number for entry in record["ranks"] for number in entry["loss"]}
    assert POISONED in {sample["sample"] for sample in record["documents"]}
    for config in (told, found):
        manifest = Manifest.read(Path(config.run.dir) / "checkpoints/step_6")
        (skipped,) = manifest.skipped_batches
        assert (skipped["step"], skipped["samples"]) == (STEP, [12, 15])


def test_by_default_the_run_ends_with_its_checkpoint_and_what_it_needs_to_be_studied(tmp_path):
    config = config_of(tmp_path / "a", checkpoint__every=3)
    (words,) = run_ranks(1, train_poisoned, config, 1)
    assert words.startswith("step 4: the loss is nan. Lower optimizer.lr") and "training.replay=4" in words
    # The save of step 3 was still being written.
    assert [path.name for path in list_checkpoints(Path(config.run.dir) / "checkpoints")] == ["step_3"]
    (record,) = divergences(config)
    (rank,) = record["ranks"]
    assert record["action"] == "stop" and rank["rank"] == 0 and rank["loss"] == [14, 15] and rank["gradients"]
    assert [sample["sample"] for sample in record["documents"]] == [14, 15]
    data, pieces = record["documents"][0]["data"], record["documents"][0]["documents"]
    assert data == config.data.train and sum(size for *_, size in pieces) == config.data.sequence_length + 1

    before = {p: p.read_bytes() for p in Path(config.run.dir).rglob("*") if p.is_file()}
    again = config.model_copy(update={"training": config.training.model_copy(update={"replay": STEP})})
    assert run_ranks(1, train_poisoned, again, 1) == [("replayed", STEP)]
    after = {p: p.read_bytes() for p in Path(config.run.dir).rglob("*") if p.is_file()}
    report = json.loads(after.pop(RunFolder(config.run.dir).replay / "step_4.json"))
    assert after == before
    assert report["loss"] == "nan" and report["from"].endswith("step_3") and report["documents"] == record["documents"]
    (rank,) = report["ranks"]
    # The forward pass is sound: what the loss weights spoil is the way back, from the end on.
    assert rank["outputs"] == [] and rank["own_gradients"][0].startswith("output_layer") and rank["weights"] == []

    # What was found can be left out from then on.
    told = config.model_copy(update={"training": config.training.model_copy(update={"skip_batches": [STEP]})})
    assert run_ranks(1, train_poisoned, told, 1) == [("finished", 6)]
    late = config.model_copy(update={"training": config.training.model_copy(update={"skip_batches": [STEP, 5]})})
    with pytest.raises(ConfigError, match=r"names steps \[5\], which the checkpoint of step 6 was trained on"):
        preflight(late, 1)


@pytest.mark.slow
def test_a_replay_of_a_sound_step_gives_the_numbers_of_the_run(tmp_path):
    config = config_of(tmp_path / "a", parallel__pipeline=2)
    run_ranks(2, train_here, config, 2)
    again = config.model_copy(update={"training": config.training.model_copy(update={"replay": 5})})
    run_ranks(2, train_here, again, 2)
    report = json.loads((RunFolder(config.run.dir).replay / "step_5.json").read_text())
    line = read_metrics(Path(config.run.dir))[4]
    assert (report["loss"], report["grad_norm"]) == (line["loss"], line["grad_norm"])


@pytest.mark.slow
def test_a_run_that_is_stopped_after_going_back_still_leaves_the_batch_out(tmp_path):
    """The checkpoint after step 3, between the one that it went back to and the batch, names it."""
    changes = {"training__on_divergence": "rollback", "checkpoint__every": 2}

    def stop_after_going_back(config: Config) -> Any:
        from moba_megatron.training.trainer import Trainer

        go_back = Trainer._go_back

        def and_stop(self: Trainer, before: int) -> int:
            step = go_back(self, before)
            self.config.checkpoint.every = 1
            return step

        Trainer._go_back = and_stop
        return train_poisoned(config, 1)

    whole = config_of(tmp_path / "a", training__skip_batches=[STEP])
    run_ranks(1, train_here, whole)
    config = config_of(tmp_path / "b", **changes)
    stopped = config.model_copy(update={"training": config.training.model_copy(update={"stop_after": 4})})
    run_ranks(1, stop_after_going_back, stopped)
    for path in (tmp_path / "b/run/checkpoints/step_4").iterdir():
        path.unlink()
    assert preflight(config, 1).resume.name == "step_3"
    assert run_ranks(1, train_poisoned, config, 1) == [("finished", 6)]
    assert len(divergences(config)) == 1
    assert numbers_of(read_metrics(Path(config.run.dir))) == numbers_of(read_metrics(Path(whole.run.dir)))


def test_what_no_policy_mends_ends_the_run(tmp_path):
    wild = {"optimizer__lr": 1e30, "optimizer__warmup_steps": 0, "optimizer__clip_grad": 0.0, "checkpoint__every": 1}
    skip = config_of(tmp_path / "a", training__on_divergence="skip", training__max_divergences=2, **wild)
    (words,) = run_ranks(1, train_poisoned, skip, 1)
    assert "after 2 others (training.max_divergences)" in words or "leaving out a batch cannot fix weights" in words
    with pytest.raises(ConfigError, match="rollback needs checkpoint.every"):
        config_of(tmp_path / "b", training__on_divergence="rollback", checkpoint__every=None)


def test_gradients_that_are_not_finite_on_one_rank_change_nothing_on_any(tmp_path):
    """A gradient of the first stage alone is infinite, the loss is fine."""
    from moba_megatron.training import trainer as module

    def train_with_bad_gradient(config: Config) -> Any:
        calls = 0

        def spoilt(optimizer: Any, refuse: Any) -> float:
            nonlocal calls
            calls += 1
            if calls == STEP and torch.distributed.get_rank() == 1:
                for buffer in [b for part in optimizer.chained_optimizers for b in getattr(part, "buffers", [])]:
                    buffer.grad_data[3] = float("inf")
            return update(optimizer, refuse)

        module.update = spoilt
        return train_here(config, 2)

    changes = {"parallel__distributed_optimizer": True, "parallel__pipeline": 2}
    told = config_of(tmp_path / "told", training__skip_batches=[STEP], **changes)
    run_ranks(2, train_here, told, 2)
    found = config_of(tmp_path / "found", training__on_divergence="skip", **changes)
    assert run_ranks(2, train_with_bad_gradient, found) == [("finished", 6)] * 2
    assert numbers_of(read_metrics(Path(told.run.dir))) == numbers_of(read_metrics(Path(found.run.dir)))
    (record,) = divergences(found)
    assert record["kind"] == "gradient norm" and record["grad_norm"] == "inf"
    assert [entry["rank"] for entry in record["ranks"]] == [1]


def test_spikes_are_recorded_and_treated_alike_where_asked(tmp_path):
    # Nothing is learnt, so that every second loss is over the median.
    low = {"training__spike_threshold": 1e-6, "training__steps": 23, "checkpoint__every": None}
    low |= {"optimizer__lr": 1e-12, "optimizer__min_lr": 0.0}
    seen = config_of(tmp_path / "a", **low)
    run_ranks(1, train_here, seen)
    records = divergences(seen)
    assert records and all(line["kind"] == "spike" and line["action"] == "none" for line in records)
    assert "skipped" not in read_metrics(Path(seen.run.dir))[-1]
    treated = {"training__on_spike": "as_divergence", "training__on_divergence": "skip"}
    alike = config_of(tmp_path / "b", **low, **treated)
    run_ranks(1, train_here, alike)
    first = records[0]["step"]
    assert "spreads over" in read_metrics(Path(alike.run.dir))[first - 1]["skipped"]


def test_a_spike_is_told_from_a_loss_that_moves():
    spikes = Spikes(threshold=10, window=100)
    losses = torch.randn(400, generator=torch.Generator().manual_seed(0)) * 0.05 + torch.linspace(4, 2, 400)
    found = []
    for loss in losses.tolist():
        found += [loss] if spikes.judge(loss) else []
        spikes.losses.append(loss)
    assert found == [] and spikes.judge(5.0) and not spikes.judge(1.0)

"""Where a run goes on in its data: the very next sample on any number of ranks, and the first one of other data."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path

import pytest
from distributed import run_ranks
from small_run import copy_tokens, read_metrics, small_config, train_here

from moba_megatron.checkpoint import Manifest, find_latest
from moba_megatron.config import Config, ConfigError
from moba_megatron.data.datasets import build_datasets, check_data
from moba_megatron.training.data_position import DataPosition, resumed_position
from moba_megatron.training.preflight import preflight


def train_and_watch(config: Config) -> list[int]:
    """Train as one rank; the numbers of the training samples that this rank read, in order."""
    import torch

    from moba_megatron.data.packing_datasets import ConcatenatedRows

    read, seen = ConcatenatedRows.__getitem__, []

    def watched(dataset: ConcatenatedRows, number: int) -> dict:
        if dataset.index_split.name == "train":
            seen.append(int(number))
        return read(dataset, number)

    ConcatenatedRows.__getitem__ = watched
    train_here(config, torch.distributed.get_world_size())
    return seen


def manifest_of(config: Config, step: int) -> Manifest:
    samples, data = step * config.training.global_batch_size, check_data(config).identity
    return Manifest(step, samples, config.model_dump(mode="json"), {}, data, {})


def resumed(before: Config, after: Config, step: int) -> DataPosition:
    return resumed_position(manifest_of(before, step), after, check_data(after).identity)


def test_another_seed_is_another_order(tmp_path: Path):
    before = small_config(tmp_path, training__steps=80)
    position = resumed(before, small_config(tmp_path, training__steps=80, run__seed=77), 40)
    old = before.run.seed
    change = {"step": 40, "consumed_samples": 160, "changed": {"run.seed": [old, 77]}}
    assert (position.in_order, position.changes) == (0, (change,))


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
@pytest.mark.parametrize("blend", [False, True])
def test_another_horizon_goes_on_in_the_same_order_or_is_a_change(tmp_path: Path, packing: str, blend: bool):
    """The order is that of the samples themselves, from 0.6 to 3 epochs of 345 samples."""
    tokens = str(copy_tokens(tmp_path) / "train")
    train = [{"path": tokens, "weight": 3}, {"path": tokens.replace("train", "validation")}] if blend else tokens
    orders = {}
    for steps in (50, 70, 84, 90, 150, 175, 250):
        config = small_config(tmp_path, data__packing=packing, data__train=train, training__steps=steps)
        rows = build_datasets(config)[0]
        orders[steps] = config, [tuple(rows[number]["tokens"].tolist()) for number in range(200)]
    changed = []
    for (before, old), (after, new) in product(orders.values(), repeat=2):
        position = resumed(before, after, 50)
        assert (position.in_order == 200) == (old == new) == (not position.changes)
        changed += position.changes
    assert bool(changed) == (packing == "concatenate")
    if changed and not blend:
        assert changed[0]["changed"] == {"epochs of data.train": ["1", "1 + 1"]}


def stopped_after(config: Config, step: int | None) -> Config:
    return config.model_copy(update={"training": config.training.model_copy(update={"stop_after": step})})


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_a_resume_on_another_number_of_ranks_takes_the_very_next_samples(tmp_path: Path, packing: str):
    changes = {"data__packing": packing, "training__micro_batch_size": 1, "training__steps": 5}
    whole = small_config(tmp_path / "a", **changes)
    parts = small_config(tmp_path / "b", **changes)
    run_ranks(1, train_here, whole)
    [first] = run_ranks(1, train_and_watch, stopped_after(parts, 2))
    second = run_ranks(2, train_and_watch, stopped_after(parts, 4))
    [third] = run_ranks(1, train_and_watch, parts)
    assert first == list(range(8)) and third == list(range(16, 20))
    assert second == [[8, 10, 12, 14], [9, 11, 13, 15]]
    one, two = (read_metrics(Path(config.run.dir)) for config in (whole, parts))
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-4)
    manifest = Manifest.read(find_latest(Path(parts.run.dir) / "checkpoints"))
    assert (manifest.consumed_samples, manifest.consumed_tokens, manifest.data_changes) == (20, 20 * 128, [])


def test_a_longer_context_goes_on_from_a_checkpoint_with_samples_of_its_own(tmp_path: Path):
    """Continued pretraining: 3 steps at 128 tokens, then the same weights and optimizer at 256 in another folder."""
    short = small_config(tmp_path / "short", training__steps=3, training__micro_batch_size=1)
    run_ranks(1, train_here, short)
    changes = {
        "data__sequence_length": 256,
        "data__packing": "best_fit",
        "training__steps": 7,
        "training__global_batch_size": 2,
        "training__micro_batch_size": 1,
        "data__train": short.data.train,
        "data__tokenizer": short.data.tokenizer,
        "checkpoint__resume": str(Path(short.run.dir) / "checkpoints/step_3"),
    }
    with pytest.raises(ConfigError) as refused:
        preflight(small_config(tmp_path / "long", **changes), 1)
    for key in ("data.sequence_length = 256, but the run has 128", "data.packing = 'best_fit', but", "training.steps"):
        assert key in str(refused.value)
    allowed = ["data.sequence_length", "data.packing", "training.steps", "training.global_batch_size"]
    long = small_config(tmp_path / "long", checkpoint__allow_changed=allowed, **changes)
    [first] = run_ranks(1, train_and_watch, stopped_after(long, 5))
    # Its second half resumes the run itself, in which nothing has changed any more.
    second = run_ranks(2, train_and_watch, long)
    assert first == [0, 1, 2, 3] and second == [[4, 6], [5, 7]]
    metrics = read_metrics(Path(long.run.dir))
    assert [line["step"] for line in metrics] == [4, 5, 6, 7]
    before = 3 * 4 * 128
    assert [line["tokens"] for line in metrics] == [before + n * 2 * 256 for n in (1, 2, 3, 4)]
    manifest = Manifest.read(find_latest(Path(long.run.dir) / "checkpoints"))
    assert (manifest.step, manifest.consumed_samples, manifest.consumed_tokens) == (7, 12 + 8, before + 8 * 256)
    changed = {"data.sequence_length": [128, 256], "data.packing": ["concatenate", "best_fit"]}
    assert manifest.data_changes == [{"step": 3, "consumed_samples": 12, "changed": changed}]
    status = json.loads((Path(long.run.dir) / "status.json").read_text())
    assert status["data_changes"] == manifest.data_changes
    written = (Path(long.run.dir) / "config.yaml").read_text()
    assert "# data.sequence_length changed after step 3 (sample 12): 128 became 256" in written
    assert "# packing of data.train = " in written and "% full" in written


@pytest.fixture(scope="module")
def paused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run on a blend, paused after step 2 of 4."""
    folder = tmp_path_factory.mktemp("blend")
    run_ranks(1, train_here, stopped_after(blended(folder), 2))
    return folder


def blended(folder: Path, weight: float = 1.0, **changes) -> Config:
    """A run on a blend file of the synthetic tokens, once more under another name."""
    tokens = copy_tokens(folder)
    for ending in ("bin", "idx"):
        shutil.copy(tokens / f"train.{ending}", tokens / f"other.{ending}")
    (tokens / "mix.yaml").write_text(f"entries: [{{path: train, weight: {weight}}}, {{path: other}}]\n")
    return small_config(folder, data__train=str(tokens / "mix.yaml"), training__steps=4, **changes)


def test_other_shares_of_a_blend_are_a_change_and_the_same_data_elsewhere_is_none(paused: Path, tmp_path: Path):
    assert preflight(blended(paused), 1).position.in_order == 8
    with pytest.raises(ConfigError, match="data.train: the files or their shares differ"):
        preflight(blended(paused, weight=2.0), 1)
    ready = preflight(blended(paused, weight=2.0, checkpoint__allow_changed=["data.train"]), 1)
    assert (ready.position.in_order, ready.position.samples) == (0, 8)
    assert any(line.startswith("data.train changed after step 2 (sample 8)") for line in ready.choices)
    moved = blended(tmp_path, run__dir=str(paused / "run"), checkpoint__allow_changed=["data"])
    position = preflight(moved, 1).position
    assert (position.in_order, position.changes) == (8, ())


def test_a_checkpoint_without_these_records_goes_on_as_before(paused: Path, tmp_path: Path):
    shutil.copytree(paused / "run", tmp_path / "run")
    path = tmp_path / "run/checkpoints/step_2/checkpoint.json"
    values = json.loads(path.read_text())
    del values["consumed_tokens"], values["data_changes"], values["blake2b"]
    path.write_text(json.dumps(values))
    position = preflight(blended(paused, run__dir=str(tmp_path / "run")), 1).position
    assert (position.step, position.in_order, position.tokens) == (2, 8, 8 * 128)

"""Runs with an index that chooses blocks: records, resuming, a frozen rest, and weights that have none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from small_run import numbers_of, read_metrics, small_config, train_here

from moba_megatron.checkpoint.tensors import StoredTensors
from moba_megatron.config import ConfigError
from moba_megatron.convert.export_hf import export_huggingface
from moba_megatron.convert.exported import open_exported
from moba_megatron.convert.initial import check_initial_weights
from moba_megatron.convert.stored import StoredWeights
from moba_megatron.training.preflight import preflight

INDEX = {"attention__router": "index", "attention__router_dim": 6, "attention__block_size": 8}
COPIED = {
    "attention__router": "index",
    "attention__router_dim": 8,
    "attention__router_heads": "query",
    "attention__router_keys": "key",
    "attention__router_norm": "none",
    "attention__router_init": "copied",
}


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    stored = StoredTensors(run / f"checkpoints/step_{step}")
    return {
        key: stored.read(key, [0] * len(entry.size), list(entry.size))
        for key, entry in stored.tensors.items()
        if not key.startswith("optimizer") and hasattr(entry, "size")
    }


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run without an index, of 4 steps."""
    folder = tmp_path_factory.mktemp("plain")
    run_ranks(1, train_here, small_config(folder, training__steps=4, attention__block_size=8))
    return folder / "run"


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    """A run with an index, of 4 steps."""
    folder = tmp_path_factory.mktemp("indexed")
    run_ranks(1, train_here, small_config(folder, training__steps=4, **INDEX))
    return folder / "run"


def test_every_step_says_what_the_index_learns(indexed):
    for line in read_metrics(indexed):
        layers = line["routers"]
        assert [layer["layer"] for layer in layers] == [1, 2, 3]
        assert line["router_loss"] == pytest.approx(sum(layer["loss"] for layer in layers))
        assert all(0 < layer["loss"] < 1 and 0 < layer["entropy"] < 0.7 for layer in layers)
    names = {key for key in weights(indexed, 4) if "block_router" in key}
    assert {int(key.split(".")[2]) for key in names} == {0, 1, 2} and len(names) == 12
    read = StoredWeights(indexed / "checkpoints/step_4").read
    assert read("decoder.layers.2.self_attention.block_router.query.weight", (12, 32)).any()


def test_a_run_resumes_bit_for_bit_and_at_another_layout(indexed, tmp_path):
    straight = read_metrics(indexed)
    for name, then in {"one": {}, "two": {"parallel__tensor": 2, "parallel__sequence": True}}.items():
        folder = tmp_path / name
        run_ranks(1, train_here, small_config(folder, training__steps=4, training__stop_after=2, **INDEX))
        resumed = small_config(folder, training__steps=4, **INDEX, **then)
        run_ranks(2 if then else 1, train_here, resumed, 2 if then else 1)
        lines = read_metrics(folder / "run")
        if not then:
            assert numbers_of(lines) == numbers_of(straight)
            assert [line["routers"] for line in lines] == [line["routers"] for line in straight]
            whole, again = weights(indexed, 4), weights(folder / "run", 4)
            assert whole.keys() == again.keys() and all(torch.equal(whole[key], again[key]) for key in whole)
        for line, expected in zip(lines, straight, strict=True):
            assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4)
            assert line["router_loss"] == pytest.approx(expected["router_loss"], rel=1e-3)


def test_a_pipeline_stage_with_nothing_to_train_resumes(tmp_path):
    """Its layers are full in every stage, so it has no index, and its optimizer no parameters."""
    changes = {**INDEX, "attention__last_n_full": 2, "parallel__pipeline": 2, "training__train_only": ["router"]}
    found = []
    for distributed, stops in ((False, (2,)), (False, (1, 2)), (True, (1, 2))):
        changes |= {"training__steps": 3, "parallel__distributed_optimizer": distributed}
        folder = tmp_path / str(len(found))
        for stop in stops:
            run_ranks(2, train_here, small_config(folder, **changes, training__stop_after=stop), 2)
        found.append(read_metrics(folder / "run"))
    straight, resumed, other = found
    assert numbers_of(straight) == numbers_of(resumed)
    assert [line["router_loss"] for line in other] == pytest.approx(
        [line["router_loss"] for line in straight], rel=1e-5
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention__router_dim": 8}, "attention.router_dim = 8, but the run has 6: it is parameters; set it back"),
        ({"attention__router_norm": "none"}, "attention.router_norm = none, but the run has rms"),
        ({"training__train_only": ["router"]}, "training.train_only = .'router'., but the run has None: it is what"),
        ({"attention__router_loss_coeff": 0.5}, "attention.router_loss_coeff = 0.5, but the run has 1.0"),
    ],
)
def test_a_run_keeps_its_index(indexed, changes, said):
    config = small_config(indexed.parent, training__steps=4, **{**INDEX, **changes})
    with pytest.raises(ConfigError, match=said):
        preflight(config, 1)


def test_a_frozen_model_stays_bit_for_bit(plain, tmp_path):
    """Warm-up with every block chosen; then training of everything, from the weights with the index."""
    changes = {**INDEX, "model__init_from": str(plain), "training__steps": 4, "optimizer__lr": 0.1}
    warm = {**changes, "attention__top_k": 16, "training__train_only": ["router"], "training__recompute": "full"}
    run_ranks(1, train_here, small_config(tmp_path / "warm", **warm))
    before, after = weights(plain, 4), weights(tmp_path / "warm/run", 4)
    assert all(torch.equal(before[key], after[key]) for key in before)
    index = after.keys() - before.keys()
    assert len(index) == 12 and all("block_router" in key for key in index)
    losses = [line["router_loss"] for line in read_metrics(tmp_path / "warm/run")]
    assert losses[-1] < losses[0]
    two = {**warm, "parallel__pipeline": 2, "parallel__virtual_pipeline": 2, "parallel__overlap_grad_reduce": True}
    run_ranks(2, train_here, small_config(tmp_path / "two", **two, parallel__distributed_optimizer=True), 2)
    other = [line["router_loss"] for line in read_metrics(tmp_path / "two/run")]
    assert other == pytest.approx(losses, rel=1e-3)
    sparse = {**changes, "model__init_from": str(tmp_path / "warm/run"), "optimizer__lr": 3e-3}
    run_ranks(1, train_here, small_config(tmp_path / "sparse", **sparse))
    assert read_metrics(tmp_path / "sparse/run")[0]["router_loss"] < 0.7 * losses[0]


def test_an_index_that_learns_nothing_stays_bit_for_bit(indexed, tmp_path):
    """Neither weight decay nor gradients of zero change it, with a whole optimizer and with its parts on two ranks."""
    start = {**INDEX, "model__init_from": str(indexed), "training__steps": 4, "training__stop_after": 2}
    start["optimizer__weight_decay"] = 0.5
    untaught = {"attention__router_loss": "none"}
    full_first = {"attention__stages": [{"until": 0.5, "kind": "full"}, {"until": 1.0}]}
    two = {**untaught, "parallel__distributed_optimizer": True, "parallel__overlap_grad_reduce": True}
    before = weights(indexed, 4)
    for name, changes in {"untaught": untaught, "full": full_first, "two": two}.items():
        config = small_config(tmp_path / name, **start, **changes)
        ranks = 2 if name == "two" else 1
        run_ranks(ranks, train_here, config, ranks)
        after = weights(tmp_path / name / "run", 2)
        same = {key for key in before if torch.equal(after[key], before[key])}
        assert same == {key for key in before if "block_router" in key}, name
    with pytest.raises(ConfigError, match="router_loss = sparse, but the run has none: it is what the optimizer holds"):
        allowed = {"checkpoint__allow_changed": ["attention.router_loss"]}
        preflight(small_config(tmp_path / "untaught", **start, **allowed), 1)
    run_ranks(1, train_here, small_config(tmp_path / "two", **{**start, **two, "training__stop_after": 3}))


def test_a_copied_index_starts_as_the_model_chooses(plain, tmp_path):
    """From a checkpoint and from Hugging Face weights, on one rank and on two."""
    export_huggingface(open_exported(plain), tmp_path / "hf")
    drawn = {**COPIED, "attention__router_init": "drawn"}
    cases = [("own", {}, plain), ("copied", COPIED, plain), ("copied hf", COPIED, tmp_path / "hf")]
    cases += [("drawn hf", drawn, tmp_path / "hf"), ("two ranks", {**COPIED, "parallel__tensor": 2}, tmp_path / "hf")]
    first = {}
    for name, changes, source in cases:
        start = {"model__init_from": str(source), "training__steps": 3, "training__stop_after": 1}
        config = small_config(tmp_path / name, **start, **changes, attention__block_size=8)
        run_ranks(config.parallel.tensor, train_here, config, config.parallel.tensor)
        first[name] = read_metrics(tmp_path / name / "run")[0]["loss"]
    assert first["copied"] == first["own"] == first["copied hf"] != first["drawn hf"]
    assert first["two ranks"] == pytest.approx(first["own"], rel=1e-6)


def test_an_index_is_not_lost(plain, indexed, tmp_path):
    start = {"training__steps": 4, "model__init_from": str(indexed)}
    with pytest.raises(ConfigError, match=r"attention\.router = own, but .* was trained with index: set it to index"):
        check_initial_weights(small_config(tmp_path, **start), 0)
    with pytest.raises(ConfigError, match=r"attention\.router_dim = 8, but .* was trained with 6: set it to 6"):
        check_initial_weights(small_config(tmp_path, **start, **{**INDEX, "attention__router_dim": 8}), 0)
    notes = check_initial_weights(small_config(tmp_path, **INDEX, model__init_from=str(plain)), 0)
    assert notes == [f"attention.router = index: {plain} has none, it is drawn"]
    assert not check_initial_weights(small_config(tmp_path, **start, **INDEX), 0)
    for full, layers in ((0, "1, 2, 3, 4"), (2, "1, 2")):
        other = small_config(tmp_path, **start, **INDEX, attention__last_n_full=full)
        with pytest.raises(ConfigError, match=f"is another one: MoBA layers {layers}, not 1, 2, 3: make these MoBA"):
            check_initial_weights(other, 0)


def test_an_index_that_is_there_is_not_copied_again(plain, tmp_path):
    given = {**COPIED, "attention__block_size": 8, "attention__router_init": "drawn"}
    run_ranks(1, train_here, small_config(tmp_path, training__steps=4, training__stop_after=1, **given))
    again = {**given, "attention__router_init": "copied", "training__steps": 4}
    notes = check_initial_weights(small_config(tmp_path, **again, model__init_from=str(tmp_path / "run")), 0)
    assert notes == [f"attention.router_init = copied has no effect: {tmp_path / 'run'} has an index of its own"]
    notes = check_initial_weights(small_config(tmp_path, **again, model__init_from=str(plain)), 0)
    assert notes == [f"attention.router = index: {plain} has none, it is copied"]

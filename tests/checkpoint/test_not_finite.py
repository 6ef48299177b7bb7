"""Weights that are not finite: never published, never read as if they were a model, and named where they are found."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from safetensors.torch import load_file, save_file
from small_run import small_config, train_here

from moba_megatron.checkpoint import CheckpointError, Manifest, list_checkpoints
from moba_megatron.checkpoint import writer as writing
from moba_megatron.checkpoint.finite import LARGEST_WEIGHT, is_finite, not_finite
from moba_megatron.config import ConfigError
from moba_megatron.convert.export_hf import export_huggingface
from moba_megatron.convert.exported import open_exported
from moba_megatron.convert.import_hf import import_huggingface
from moba_megatron.convert.safetensors_folder import SafetensorsFolder
from moba_megatron.generation.loading import load_generator, open_model
from moba_megatron.runs.files import read_json_lines

NAME = "decoder.layers.1.mlp.linear_fc2.weight"
SOURCE_NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_number_of_any_dtype_is_found(dtype, bad):
    tensor = torch.ones(300, 7).to(dtype)
    assert is_finite(tensor) and is_finite(tensor[:0])
    if dtype == torch.float8_e4m3fn and bad != bad or dtype != torch.float8_e4m3fn:
        tensor[250, 3] = bad
        assert not is_finite(tensor)
    assert is_finite(torch.tensor([2**40]))


def test_weights_whose_square_is_infinite_are_none():
    large = torch.tensor([1.0, -LARGEST_WEIGHT])
    assert not_finite([("a", large), ("b", large * 1.01), ("optimizer.c", large * 1.01)]) == ["b"]


def poison(model: list[torch.nn.Module], name: str = "linear_fc2.weight", value: float = float("inf")) -> str:
    """Make one number of a parameter of the last layer on this rank a bad one."""
    found = [(key, p) for chunk in model for key, p in chunk.named_parameters() if key.endswith(name)]
    key, parameter = found[-1]
    with torch.no_grad():
        parameter.view(-1)[3] = value
    return key


def train_and_poison(config, step: int, rank: int, world_size: int, times: int = 100) -> tuple[str, int]:
    """Train; what a rank saves of a step is infinite, the first `times` times, what it trains on is not."""
    before = writing.CheckpointWriter.save
    left = times

    def save(writer, state, manifest):
        nonlocal left
        if manifest.step != step or torch.distributed.get_rank() != rank or not left:
            return before(writer, state, manifest)
        left -= 1
        parameter = state.model[0].get_parameter(poison(state.model))
        path = before(writer, state, manifest)
        with torch.no_grad():
            parameter.view(-1)[3] = 0.0
        return path

    writing.CheckpointWriter.save = save
    return train_here(config, world_size)


@pytest.mark.parametrize(("asynchronous", "parallel", "rank"), [(False, {}, 0), (True, {"pipeline": 2}, 1)])
def test_what_is_not_finite_on_any_rank_is_not_published(tmp_path, asynchronous, parallel, rank):
    ranks = parallel.get("pipeline", 1)
    layout = {f"parallel__{name}": value for name, value in parallel.items()}
    config = small_config(
        tmp_path,
        checkpoint__every=1,
        checkpoint__keep=1,
        checkpoint__asynchronous=asynchronous,
        training__steps=4,
        **layout,
    )
    with pytest.raises(
        AssertionError, match="step 3 is not saved: values are not finite .*linear_fc2.weight"
    ) as failed:
        run_ranks(ranks, train_and_poison, config, 3, rank, ranks)
    assert "The checkpoints before it are untouched" in str(failed.value)
    folder = tmp_path / "run/checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step_2"]
    # The same command goes on from the good one.
    assert run_ranks(ranks, train_here, config, ranks) == [("finished", 4)] * ranks
    assert [path.name for path in list_checkpoints(folder)] == ["step_4"]


def test_a_rollback_leaves_out_the_step_whose_state_was_bad(tmp_path):
    """Written in the background: what the writer finds comes while later steps are trained."""
    config = small_config(
        tmp_path,
        checkpoint__every=2,
        checkpoint__asynchronous=True,
        training__steps=6,
        training__on_divergence="rollback",
    )
    assert run_ranks(1, train_and_poison, config, 4, 0, 1, 1) == [("finished", 6)]
    manifest = Manifest.read(tmp_path / "run/checkpoints/step_6")
    assert [entry["step"] for entry in manifest.skipped_batches] == [4]
    (record,) = read_json_lines(tmp_path / "run/divergences.jsonl")
    assert (record["kind"], record["step"], record["action"], record["blamed_step"]) == ("weights", 4, "rollback", 4)


@pytest.mark.parametrize("lr", [1e38, 1e25])
def test_an_update_that_ruins_the_weights_ends_the_run_and_leaves_no_checkpoint(tmp_path, lr):
    config = small_config(
        tmp_path,
        optimizer__lr=lr,
        optimizer__min_lr=0.0,
        optimizer__warmup_steps=0,
        checkpoint__every=1,
        checkpoint__keep=1,
        checkpoint__asynchronous=False,
        training__steps=4,
    )
    with pytest.raises(AssertionError, match="step 1 is not saved: values are not finite"):
        run_ranks(1, train_here, config)
    assert list_checkpoints(tmp_path / "run/checkpoints") == []
    last = config.model_copy(update={"training": config.training.model_copy(update={"stop_after": 1})})
    assert [line["action"] for line in read_json_lines(tmp_path / "run/divergences.jsonl")] == ["stop"]
    with pytest.raises(AssertionError, match="TrainingDiverged: step 1: the update left weights that are not finite"):
        run_ranks(1, train_here, last)


def test_an_evaluation_that_is_no_number_ends_the_run(tmp_path):
    def train(config):
        from moba_megatron.training.trainer import Trainer

        before = Trainer.evaluate

        def evaluate(trainer, number):
            poison(trainer.state.model)
            before(trainer, number)

        Trainer.evaluate = evaluate
        train_here(config)

    config = small_config(tmp_path, training__steps=4, evaluation__every=2)
    with pytest.raises(AssertionError, match="TrainingDiverged: validation after step 2: the loss is nan"):
        run_ranks(1, train, config)
    assert (tmp_path / "run/evaluations.jsonl").read_text() == ""


def save_anyway(config, value: float) -> None:
    """A checkpoint whose weights are not finite, as a version wrote it that did not look."""
    from moba_megatron.training.trainer import Trainer

    writing.not_finite = lambda tensors: [] if list(tensors) else []
    Trainer.check_weights = lambda trainer, number: None
    before = writing.CheckpointWriter.save

    def save(writer, state, manifest):
        poison(state.model, "layers.1.mlp.linear_fc2.weight", value)
        return before(writer, state, manifest)

    writing.CheckpointWriter.save = save
    train_here(config)


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A run folder whose only checkpoint, paused at step 2 of 4, is not finite."""
    config = small_config(tmp_path_factory.mktemp("bad"), training__steps=4, training__stop_after=2)
    run_ranks(1, save_anyway, config, float("nan"))
    return config


def test_state_of_the_optimizer_that_is_not_finite_is_refused(tmp_path):
    """A step from it would ruin weights that are still good."""

    def save_anyway_of_the_optimizer(config):
        from moba_megatron.training.trainer import Trainer

        writing.not_finite = lambda tensors: []
        before = Trainer.save

        def save(trainer, number, *args, **kwargs):
            for part in trainer.state.optimizer.chained_optimizers:
                next(iter(part.optimizer.state.values()))["exp_avg"].view(-1)[3] = float("nan")
            return before(trainer, number, *args, **kwargs)

        Trainer.save = save
        train_here(config)

    config = small_config(tmp_path, training__steps=4, training__stop_after=2)
    run_ranks(1, save_anyway_of_the_optimizer, config)
    with pytest.raises(AssertionError, match="numbers that are not finite .*: optimizer.*exp_avg"):
        run_ranks(1, train_here, small_config(tmp_path, training__steps=4))


def test_a_checkpoint_that_is_not_finite_is_refused_by_every_door(bad, tmp_path):
    run = Path(bad.run.dir)
    said = rf"not finite .*{NAME}|{NAME} is not finite"
    with pytest.raises(AssertionError, match=said):
        run_ranks(1, train_here, bad)
    begun = small_config(tmp_path, model__init_from=str(run), training__steps=4)
    with pytest.raises(AssertionError, match=said):
        run_ranks(1, train_here, begun)
    with pytest.raises(CheckpointError, match=said):
        load_generator(run)
    with pytest.raises(CheckpointError, match=said):
        export_huggingface(open_exported(run), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    fingerprint = Manifest.read(run / "checkpoints/step_2").data["tokenizer"]
    with pytest.raises(AssertionError, match=said):
        run_ranks(1, open_model, run, fingerprint, 128, prepare=False)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A finished run and its export."""
    folder = tmp_path_factory.mktemp("good")
    config = small_config(folder, training__steps=4)
    run_ranks(1, train_here, config)
    export_huggingface(open_exported(config.run.dir), folder / "out")
    return config, folder / "out"


def test_a_folder_that_is_not_finite_is_refused_by_every_door(good, tmp_path):
    config, source = good
    model = Path(shutil.copytree(source, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors[SOURCE_NAME][0, 3] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (model / "exported_from.json").unlink()
    said = rf"model.safetensors: {SOURCE_NAME} is not finite"
    with pytest.raises(ConfigError, match=said):
        SafetensorsFolder(model).read(SOURCE_NAME)
    with pytest.raises(CheckpointError, match=rf"not finite .*{SOURCE_NAME}"):
        load_generator(model)
    with pytest.raises(AssertionError, match=said):
        run_ranks(1, import_huggingface, model, tmp_path / "imported", prepare=False)
    assert not (tmp_path / "imported").exists()
    begun = small_config(
        tmp_path, model__init_from=str(model), model__vocab_size=open_exported(config.run.dir).model.vocab_size
    )
    with pytest.raises(AssertionError, match=said):
        run_ranks(1, train_here, begun)

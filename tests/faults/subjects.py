"""What is killed: trainings at several layouts, and everything else that leaves files; each says whether what it left
in the end is what an undisturbed one leaves."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from corpus.prepare_examples import DATA_FILES, stdlib_recipe
from faults.jobs import ROOT, Job, fork_ranks, start_command
from scaling.sweep_examples import write_sweep
from small_run import copy_tokens, numbers_of, read_metrics, small_config, train_here

Result = Any


@dataclass(frozen=True)
class Subject:
    """Something that can be killed and started again.

    start: starts it in a folder, or lets it go on there.
    result: what it left there in the end, to be compared.
    """

    name: str
    start: Callable[[Path], Job]
    result: Callable[[Path], Result]


EXPERTS = {"model__num_moe_experts": 4, "model__moe_ffn_hidden_size": 24, "model__moe_aux_loss_coeff": 0.01}
TRAININGS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank, asynchronous": (1, {}),
    "one rank, synchronous": (1, {"checkpoint__asynchronous": False}),
    "DP 2": (2, {"checkpoint__asynchronous": False}),
    "DP 2, distributed optimizer": (2, {"parallel__distributed_optimizer": True}),
    "CP 2": (2, {"parallel__context": 2, "parallel__distributed_optimizer": True}),
    "PP 2": (2, {"parallel__pipeline": 2, "parallel__distributed_optimizer": True}),
    "TP 2": (2, {"parallel__tensor": 2, "parallel__distributed_optimizer": True}),
    "EP 2": (2, {**EXPERTS, "parallel__expert": 2, "parallel__distributed_optimizer": True}),
    "TP 2, synchronous": (
        2,
        {"parallel__tensor": 2, "parallel__distributed_optimizer": True, "checkpoint__asynchronous": False},
    ),
}
STEPS = 12


def training_config(folder: Path, **changes: Any) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    every = {"training__steps": STEPS, "checkpoint__every": 2, "evaluation__every": 4, "evaluation__samples": 4}
    return small_config(folder, model__num_layers=2, **{**every, **changes})


def start_training(ranks: int, changes: dict[str, Any], folder: Path) -> Job:
    config = training_config(folder, **changes)
    return fork_ranks(ranks, lambda: train_here(config, ranks), folder)


def training_result(folder: Path) -> Result:
    """Losses, norms and evaluations to the bit, and the whole state after the last step."""
    from training.test_resume import weights_of

    run = folder / "run"
    state = weights_of(run / f"checkpoints/step_{STEPS}")
    digest = hashlib.blake2b()
    for name in sorted(state):
        digest.update(name.encode() + state[name].numpy().tobytes())
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    return numbers_of(read_metrics(run)), read_metrics(run, "evaluations.jsonl"), digest.hexdigest(), left


def start_torchrun(changes: dict[str, Any], folder: Path) -> Job:
    config = training_config(folder, **changes)
    path = folder / "config.yaml"
    path.write_text(config.to_yaml())
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return start_command([*launcher, str(ROOT / "train.py"), str(path)], folder)


def prepare_here(out: Path, shares: bool) -> None:
    from moba_megatron.corpus.prepare import merge_shares, prepare, prepare_share

    recipe = stdlib_recipe({"kind": "bpe", "vocab_size": 300, "engine": "tokenizers"})
    if not shares:
        # Workers of their own, killed with it, are in tests/corpus/test_prepare_interrupted.py.
        prepare(recipe, out, workers=1)
        return
    if not out.exists():
        for share in range(2):
            prepare_share(recipe, out, (share, 2), workers=1)
        merge_shares(out)


def prepared(folder: Path) -> Result:
    left = sorted(path.name for path in folder.iterdir() if path.name.startswith("out"))
    return {name: digest_of(folder / "out" / name) for name in DATA_FILES}, left


def blend_here(data: Path, out: Path) -> None:
    from moba_megatron.corpus.mix import make_blend
    from moba_megatron.corpus.mix_views import load_mix

    recipe = out.parent / "mix.yaml"
    lengths = [{"at_least": 1, "upsample": 1}, {"at_least": 2000, "upsample": 3}]
    recipe.write_text(yaml.safe_dump({"sources": [{"path": str(data / "train")}], "lengths": lengths}))
    make_blend(load_mix(recipe), out, overwrite=False)


def import_here(source: Path, out: Path) -> None:
    from moba_megatron.convert.import_hf import import_huggingface

    if not out.exists():
        import_huggingface(source, out)


def export_here(run: Path, out: Path) -> None:
    from moba_megatron.convert.export_hf import export_huggingface
    from moba_megatron.convert.exported import open_exported

    if not out.exists():
        export_huggingface(open_exported(run), out)


def tree_result(folder: Path) -> Result:
    """Every file below `out` by its digest, but those that hold times or paths; and what else is there."""
    left = sorted(path.name for path in folder.iterdir() if "out" in path.name)
    files = {str(path.relative_to(folder)): path for path in (folder / "out").rglob("*") if path.is_file()}
    unequal = (".metadata", "checkpoint.json", "config.yaml", ".png", "manifest.json", ".distcp", "lock")
    return {name: digest_of(path) for name, path in files.items() if not name.endswith(unequal)}, left


def imported_result(folder: Path) -> Result:
    from training.test_resume import weights_of

    state = weights_of(folder / "out/checkpoints/step_0")
    sums = {name: hashlib.blake2b(value.numpy().tobytes()).hexdigest() for name, value in state.items()}
    return sums, tree_result(folder)


def start_sweep(folder: Path) -> Job:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "sweep.yaml"
    if not path.exists():
        axes = {"size": {"one": {"model.num_layers": 1, "attention.last_n_full": 0}}, "attention": {"moba": {}}}
        write_sweep(folder, axes=axes)
    return start_command([sys.executable, "-m", "moba_megatron", "scaling", "run", str(path)], folder)


def sweep_result(folder: Path) -> Result:
    (run,) = [path.parent for path in (folder / "sweep").rglob("metrics.jsonl")]
    return numbers_of(read_metrics(run)), read_metrics(run, "evaluations.jsonl")


def digest_of(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes()).hexdigest()


def subjects(common: Path) -> dict[str, Subject]:
    """All subjects by name.

    Args:
        common: the folder that `make_common` fills.
    """
    trainings = [
        Subject(name, partial(start_training, ranks, changes), training_result)
        for name, (ranks, changes) in TRAININGS.items()
    ]
    torchrun = Subject("DP 2 under torchrun", partial(start_torchrun, {}), training_result)
    data, model, run = common / "data", common / "model", common / "trained"

    def alone(name: str, work: Callable[[Path], None], result: Callable[[Path], Result]) -> Subject:
        return Subject(name, lambda folder: fork_ranks(1, partial(work, folder / "out"), folder), result)

    others = [
        alone("prepare", partial(_swapped, prepare_here, False), prepared),
        alone("prepare in shares, merge", partial(_swapped, prepare_here, True), prepared),
        alone("blend", partial(blend_here, data), tree_result),
        alone("import", partial(import_here, model), imported_result),
        alone("export", partial(export_here, run / "run"), tree_result),
        Subject("scaling", start_sweep, sweep_result),
    ]
    return {subject.name: subject for subject in [*trainings, torchrun, *others]}


STARTING_FROM_COMMON = ("blend", "import", "export")


def make_common(common: Path) -> None:
    """What some subjects start from: a dataset, a Hugging Face model, a run."""
    from convert.huggingface_models import MODELS, saved_model

    if common.exists():
        return
    common.mkdir(parents=True)
    for job in (
        fork_ranks(1, lambda: prepare_here(common / "data", shares=False), common / "jobs/data"),
        start_training(1, {"training__steps": 3}, common / "trained"),
    ):
        assert job.wait(600) and job.ended_well, job.log.read_text()
    saved_model(common / "model", next(iter(MODELS)))


def _swapped(work: Callable[..., None], shares: bool, out: Path) -> None:
    work(out, shares)


def fresh(folder: Path) -> Path:
    """A folder in which nothing was begun; the committed tokens are copied into it once."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    copy_tokens(folder)
    return folder

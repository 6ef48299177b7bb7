"""What the commands say without a GPU or data: resolved configurations, plans, helps and dry runs."""

from __future__ import annotations

import os
import re
import runpy
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import megatron.core.models.gpt  # noqa: F401  (what every command would import anew)
import transformers  # noqa: F401

from moba_megatron.cli import COMMANDS, app
from moba_megatron.config import ConfigError, load_config
from snapshot.texts import ROOT, without_places, without_times, write_lines

# As seen from `elsewhere`: the length of an absolute path would show in the layout of tables.
CONFIGS = Path("configs")
# Overrides of the quickstart that are refused: the words of each refusal.
REFUSED = (
    "attention.block_size=0",
    "attention.blok_size=64",
    "attention.selector=nearest",
    "attention.threshold=0.5",
    "attention.key_convolution=4",
    "attention.last_n_full=9",
    "attention.full_layers=[7]",
    "attention.stages=[{until: 0.5}]",
    "data.sequence_length=1",
    "model.num_query_groups=2",
    "optimizer.decay=WSD",
    "parallel.context=3",
    "parallel.exchange=carrier",
    "parallel.sequence=true",
    "parallel.tensor=2",
    "parallel.virtual_pipeline=2",
    "training.precision=fp8",
    "training.steps=ten",
    "steps",
)
DRY_RUNS = (
    "quickstart/moba.yaml",
    "quickstart/full.yaml",
    "twins/base.yaml",
    "paper/scaling_8k.yaml:545m_moba",
    "paper/scaling_8k.yaml:2.1b_moba",
    "needle/moba.yaml",
    "paper/layer_hybrid.yaml:last_3_full",
    "paper/sparse_then_full.yaml:moba_then_full",
    "paper/granularity.yaml:32_of_128",
    "paper/scaling_32k.yaml:1.5b_moba",
    "continued_pretraining/llama3.1_8b/1m.yaml",
)
PLANS = (
    ("paper/scaling_32k.yaml:1.5b_moba", "--gpus", "32", "--gpu", "h100"),
    ("paper/scaling_32k.yaml:1.5b_full", "--gpus", "32", "--gpu", "h100", "--price-per-hour", "2.5"),
    ("paper/scaling_32k.yaml:2.1b_moba", "--gpus", "64", "--gpu", "b200", "--layouts", "10"),
    ("paper/scaling_8k.yaml:545m_moba", "--gpus", "8", "--gpu", "a100"),
    ("paper/sparse_then_full.yaml:moba_then_full", "--gpus", "16", "--gpu", "h200"),
    ("paper/scaling_8k.yaml:1.1b_moba", "parallel.context=4", "parallel.exchange=dispatch", "--gpus", "16"),
    ("quickstart/moba.yaml", "training.precision=bf16", "model.vocab_size=4096", "--gpus", "2"),
)


def take_configurations(out: Path) -> None:
    """Every file of configs/ as it is read, what is refused, and what sweeps and plans make of them."""
    with elsewhere() as folder:
        for path in sorted(CONFIGS.rglob("*.yaml")):
            name = path.relative_to(CONFIGS).with_suffix(".txt")
            write_lines(out, f"configurations/{name}", [without_places(_resolved(path), folder)])
        quickstart = CONFIGS / "quickstart/moba.yaml"
        refused = (f"{text}\n{without_places(_resolved(quickstart, [text]), folder)}" for text in REFUSED)
        write_lines(out, "configurations/refused.txt", refused)
        for path in sorted(CONFIGS.rglob("*.yaml")):
            if "axes:" in path.read_text():
                name = path.relative_to(CONFIGS).with_suffix("")
                write_lines(out, f"configurations/sweeps/{name}.txt", [run("scaling", "plan", path)])
        for number, (name, *options) in enumerate(PLANS, start=1):
            plan = run("plan", CONFIGS / name, *options, "--json", f"{number}.json")
            numbers = Path(f"{number}.json")
            write_lines(out, f"configurations/plans/{number}.txt", [f"{name} {' '.join(options)}", plan])
            write_lines(out, f"configurations/plans/{number}.json", [numbers.read_text() if numbers.exists() else ""])


def take_help(out: Path) -> None:
    """The help of every command, and of train.py."""
    write_lines(out, "help/moba-megatron.txt", [run("--help")])
    for name in COMMANDS:
        text = run(*name.split(), "--help")
        write_lines(out, f"help/{name.replace(' ', '_')}.txt", [text])
        # A group lists its commands in a box of its own.
        for below in re.findall(r"^│ ([a-z]\S*)", text.partition("Commands")[2], re.MULTILINE):
            write_lines(out, f"help/{name}_{below}.txt", [run(name, below, "--help")])
    write_lines(out, "help/train.txt", [run_training("--help")])


def take_dry_runs(out: Path) -> None:
    """`train.py --dry-run`, where it can be had without data; else what it says."""
    with elsewhere():
        for name in DRY_RUNS:
            for more in ((), ("model.vocab_size=32000",), ("model.vocab_size=32000", "training.precision=bf16")):
                text = run_training(CONFIGS / name, "--dry-run", *more)
                label = "_".join(
                    [
                        name.removesuffix(".yaml").replace(".yaml:", "_").replace("/", "_"),
                        *[m.partition("=")[2] for m in more],
                    ]
                )
                write_lines(out, f"dry_runs/{label}.txt", [f"{name} {' '.join(more)}", text])


def run(*arguments: object) -> str:
    """The output of `moba-megatron` with these arguments, and its exit code."""
    return forked(lambda: app([str(argument) for argument in arguments]))


def run_training(*arguments: object) -> str:
    """The same of train.py."""

    def train() -> None:
        sys.argv = ["train.py", *map(str, arguments)]
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")

    return forked(train)


def forked(function: Callable[[], None]) -> str:
    """What a function prints in a process that is forked from this one, without places and times, and how it ends.

    Forking spares the seconds that imports take; a command may end its process in any way.
    """
    with tempfile.TemporaryFile("w+") as file:
        child = os.fork()
        if not child:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            code = 1
            try:
                function()
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}")
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        file.seek(0)
        lines = [line.rstrip() for line in file.read().splitlines()]
    return without_times(without_places("\n".join([*lines, f"exit code {code}"]), Path.cwd()))


@contextmanager
def elsewhere() -> Iterator[Path]:
    """Work in a folder with nothing but configs/, so that no data and no runs of this checkout are seen."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        CONFIGS.symlink_to(ROOT / CONFIGS)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


def _resolved(path: Path, overrides: list[str] | None = None) -> str:
    try:
        return load_config(path, overrides).to_yaml()
    except ConfigError as error:
        return f"refused: {error}"

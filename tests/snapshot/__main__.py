"""`python -m snapshot take OUT` and `python -m snapshot compare A B`; see the package."""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

from snapshot.compare import compare

# Section: (module of the package, function, environment). Each runs in a process of its own.
SECTIONS: dict[str, tuple[str, str, dict[str, str]]] = {
    "operator": ("attention", "take_operator", {}),
    "kernels": ("attention", "take_kernels", {"TRITON_INTERPRET": "1"}),
    "context": ("context", "take_context", {}),
    "huggingface": ("decoding", "take_huggingface", {}),
    "configurations": ("commands", "take_configurations", {}),
    "help": ("commands", "take_help", {}),
    "dry_runs": ("commands", "take_dry_runs", {}),
    "data": ("corpus", "take_data", {}),
    "losses": ("training", "take_losses", {}),
    "ptx": ("ptx", "take", {"TRITON_DISABLE_LINE_INFO": "1"}),
}
ENVIRONMENT = {
    "COLUMNS": "100",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "MKL_NUM_THREADS": "1",
    "NO_COLOR": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
    "PYTHONWARNINGS": "ignore",
    "TERM": "dumb",
    "TOKENIZERS_PARALLELISM": "false",
}
UNWANTED = ("FORCE_COLOR", "LOCAL_RANK", "RANK", "TRITON_INTERPRET", "TRITON_DISABLE_LINE_INFO", "WORLD_SIZE")


def main() -> int:
    """Run a command; the exit status is 1 if snapshots differ or a section fails."""
    settings = parse()
    if settings.command == "compare":
        return compare(settings.a, settings.b, settings.only, settings.lines)
    if settings.list:
        print("\n".join(SECTIONS))
        return 0
    if settings.out is None:
        raise SystemExit("take: name the folder to write, or --list")
    if settings.here:
        run_here(settings)
        return 0
    failed = [name for name in settings.only or SECTIONS if not run_apart(name, settings)]
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def parse() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(prog="python -m snapshot", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    take = commands.add_parser("take", help="write a snapshot of this checkout")
    take.add_argument("out", type=Path, nargs="?")
    take.add_argument("--only", nargs="+", choices=SECTIONS)
    take.add_argument("--list", action="store_true", help="print the sections and stop")
    take.add_argument("--architectures", type=int, nargs="+", default=[80, 90, 100], help="of the section ptx")
    take.add_argument("--jobs", type=int, default=1, help="processes of the section ptx")
    take.add_argument("--keep-ptx", action="store_true", help="also write the PTX itself")
    take.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    both = commands.add_parser("compare", help="print what differs between two snapshots")
    both.add_argument("a", type=Path)
    both.add_argument("b", type=Path)
    both.add_argument("--only", nargs="+", choices=SECTIONS)
    both.add_argument("--lines", type=int, default=40, help="of the difference of one file")
    return parser.parse_args()


def run_apart(name: str, settings: argparse.Namespace) -> bool:
    """Take a section in a process of its own; whether it succeeded."""
    kept = {key: value for key, value in os.environ.items() if key not in UNWANTED}
    command = [sys.executable, "-m", "snapshot", "take", str(settings.out), "--only", name, "--here"]
    command += ["--jobs", str(settings.jobs), *["--keep-ptx"] * settings.keep_ptx]
    command += ["--architectures", *map(str, settings.architectures)]
    began = time.monotonic()
    code = subprocess.run(command, env=kept | ENVIRONMENT | SECTIONS[name][2]).returncode
    print(f"{name}: {'taken' if code == 0 else 'FAILED'} in {time.monotonic() - began:.0f} s", flush=True)
    return code == 0


def run_here(settings: argparse.Namespace) -> None:
    """Take one section in this process."""
    (name,) = settings.only
    module, function, _ = SECTIONS[name]
    found = getattr(importlib.import_module(f"snapshot.{module}"), function)
    out = settings.out.resolve()
    if name == "ptx":
        found(out, settings.architectures, settings.jobs, settings.keep_ptx)
    else:
        found(out)


if __name__ == "__main__":
    sys.exit(main())

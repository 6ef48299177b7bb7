"""Kill everything at random moments, let it go on, and compare what it leaves with what an undisturbed one leaves.

    python tests/faults/kill_loop.py --kills 200 --seed 0 [--only "PP 2"] [--only import]

After each kill nothing of the job may be alive, in the end all results must be equal to the bit, and the temporary
folder may not have grown. Ends with a table of counts; with exit code 1 where something was wrong.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[2])]

# Before torch is imported: ranks share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from moba_megatron.temporary import leave_wandb_out  # noqa: E402

leave_wandb_out()
from faults.jobs import Fault  # noqa: E402
from faults.subjects import STARTING_FROM_COMMON, Subject, fresh, make_common, subjects  # noqa: E402

# How the kills are shared out, a part for each kind; commands cost a start of Python each.
SHARES = {"DP 2 under torchrun": 16, "scaling": 4}
# Leftovers of ended processes that the next start removes: those of the last kill of each rank may be there.
MOST_TEMPORARY = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", help="name of a subject; may be repeated")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    asked = parser.parse_args()
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="kill_loop."))
    temporary = Path(tempfile.mkdtemp(prefix="kl.", dir="/tmp"))
    tempfile.tempdir = os.environ["TMPDIR"] = str(temporary)
    _import_everything()
    found = subjects(folder / "common")
    chosen = {name: subject for name, subject in found.items() if not asked.only or name in asked.only}
    if set(chosen) & set(STARTING_FROM_COMMON):
        make_common(folder / "common")
    failures, done, began = [], {}, time.monotonic()
    for name, wanted in _shared_out(list(chosen), asked.kills).items():
        try:
            done[name] = kill_and_compare(
                chosen[name], wanted, random.Random(f"{asked.seed} {name}"), folder / "work", temporary
            )
            print(f"{name}: {done[name]} kills, equal to the bit, {time.monotonic() - began:.0f} s so far", flush=True)
        except Fault as fault:
            failures.append(name)
            print(f"{name}: FAULT (seed {asked.seed}): {fault}", flush=True)
    print(f"{sum(done.values())} kills over {len(done)} subjects, {len(failures)} with faults: {failures or 'none'}")
    if not failures and asked.folder is None:
        shutil.rmtree(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    return 1 if failures else 0


def kill_and_compare(subject: Subject, kills: int, choice: random.Random, folder: Path, temporary: Path) -> int:
    """Kill a subject so many times, over as many of its lives as that takes. Returns the kills.

    Raises:
        Fault: something stays, grows, or is not equal.
    """
    began, before = time.monotonic(), set(os.listdir(temporary))
    whole = fresh(folder / "whole")
    job = subject.start(whole)
    if not job.wait(600) or not job.ended_well:
        raise Fault(f"it fails undisturbed: {job.log.read_text()[-3000:]}")
    job.bury()
    expected, seconds = subject.result(whole), time.monotonic() - began
    done, lives = 0, 0
    while done < kills:
        lives += 1
        broken = fresh(folder / "broken")
        done += _one_life(subject, kills - done, choice, broken, seconds)
        if (got := subject.result(broken)) != expected:
            raise Fault(f"life {lives} after {done} kills differs:\n{_short(got)}\n{_short(expected)}\n({broken})")
    # torchrun's own folder stays where torchrun is killed.
    left = [name for name in set(os.listdir(temporary)) - before if not name.startswith("torchelastic_")]
    if len(left) > MOST_TEMPORARY:
        raise Fault(f"{len(left)} temporary files are left: {left[:10]}")
    return done


def _one_life(subject: Subject, most: int, choice: random.Random, folder: Path, seconds: float) -> int:
    """Kill it again and again until it gets through; at most six times, so that some lives end."""
    kills = 0
    while True:
        job = subject.start(folder)
        if kills < min(most, 6) and not job.wait(choice.uniform(0.0, seconds)):
            job.kill(choice)
            job.bury()
            kills += 1
            continue
        ended = job.wait(600)
        well = ended and job.ended_well
        job.bury()
        if not well:
            raise Fault(f"it does not go on after {kills} kills: {job.log.read_text()[-3000:]}")
        return kills


def _short(result: object) -> str:
    return repr(result)[:1500]


def _shared_out(names: list[str], kills: int) -> dict[str, int]:
    """Kills of each subject."""
    cheap = [name for name in names if name not in SHARES]
    costly = {name: max(round(kills * share / 200), 1) for name, share in SHARES.items() if name in names}
    left = max(kills - sum(costly.values()), 0)
    each = {name: left // len(cheap) + (number < left % len(cheap)) for number, name in enumerate(cheap)}
    return {name: (each | costly)[name] for name in names}


def _import_everything() -> None:
    """So that a fork has nothing left to import."""
    import megatron.core.models.gpt  # noqa: F401
    import torch

    import moba_megatron.convert.export_hf
    import moba_megatron.convert.import_hf
    import moba_megatron.corpus.mix
    import moba_megatron.corpus.prepare
    import moba_megatron.training.preflight
    import moba_megatron.training.run  # noqa: F401

    torch.set_num_threads(1)


if __name__ == "__main__":
    sys.exit(main())

"""Running the points of a sweep as ordinary trainings, several at once, in pieces if need be.

Each point is `python train.py BASE key=value ...` in a process of its own. What is finished is skipped; what was cut
continues from its newest checkpoint, because that is what `train.py` does in a run folder; what starts from another run
waits for it. A run that fails leaves its words in RUN/sweep.log, the others go on, and the sweep ends with an error
that lists it. After `minutes`, or on Ctrl-C, runs are sent SIGTERM: they save and end, and the same command goes on
later.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import moba_megatron
from moba_megatron.config import ConfigError
from moba_megatron.platform.processes import die_with_parent
from moba_megatron.scaling.results import ENDED, LOG, Result, last_line, last_record, read_result
from moba_megatron.scaling.sweep import Point, Sweep

_POLL_SECONDS = 1.0


@dataclass(frozen=True, eq=False)
class Job:
    """A running point."""

    point: Point
    process: subprocess.Popen[bytes]
    row: int


def train_script() -> Path:
    """`train.py` beside the package.

    Raises:
        ConfigError: the package is installed without it.
    """
    script = Path(moba_megatron.__file__).parents[1] / "train.py"
    if not script.is_file():
        raise ConfigError([f"no {script}: run sweeps from a checkout (pip install --editable)"])
    return script


def run_sweep(
    sweep: Sweep,
    points: list[Point],
    *,
    jobs: int,
    processes: int = 1,
    minutes: float | None = None,
    console: Console | None = None,
) -> list[Result]:
    """Run what is not finished among some points; returns how they all stand afterwards.

    Args:
        jobs: trainings at once; each gets its share of the cores.
        processes: ranks of each training (torchrun on this machine).
        minutes: stop after so long, with checkpoints. None: run to the end.

    Raises:
        ConfigError: a run of the sweep is running already, or its folder holds another run.
    """
    console = console or Console(stderr=True)
    before = {point.name: read_result(point) for point in points}
    busy = [str(result.point.folder) for result in before.values() if result.state == "running"]
    if busy:
        raise ConfigError([f"{folder} is being trained at this moment: wait for it, or stop it" for folder in busy])
    todo = [point for point in points if before[point.name].state != "finished"]
    alone = [point for point in todo if point.start_from not in todo and not _may_start(point)]
    if alone:
        raise ConfigError([f"{p.name} starts from {p.start_from.name}, which has not finished: run that one too"
                           for p in alone])  # fmt: skip
    if len(todo) < len(points):
        console.print(f"{len(points) - len(todo)} of {len(points)} runs are finished already")
    threads = max(1, len(os.sched_getaffinity(0)) // (max(1, min(jobs, len(todo))) * processes))
    start = _Starter(sweep.base.resolve(), threads, processes, minutes)
    _run_all(todo, start, jobs, console)
    problems: list[str] = []
    for point in points:
        if read_result(point).state == "finished" and not start.late:
            problems += _evaluate(sweep, point, console)
    if problems:
        raise ConfigError(problems)
    return [read_result(point) for point in points]


class _Starter:
    """Starts trainings until the time is up, and says when they must stop."""

    def __init__(self, base: Path, threads: int, processes: int, minutes: float | None):
        self.base, self.threads, self.processes = base, threads, processes
        self._asked: set[Job] = set()
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes

    @property
    def late(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def stop(self, jobs: list[Job]) -> None:
        """Ask trainings to save and end. Of several ranks each is asked, again and again, because one that is starting
        does not listen yet; torchrun would kill them half a minute after a SIGTERM."""
        for job in jobs:
            if job.process.poll() is None and self.processes > 1:
                os.killpg(job.process.pid, signal.SIGUSR1)
            elif job.process.poll() is None and job not in self._asked:
                job.process.send_signal(signal.SIGTERM)
        self._asked.update(jobs)

    def __call__(self, point: Point) -> subprocess.Popen[bytes]:
        point.folder.mkdir(parents=True, exist_ok=True)
        launcher = [sys.executable]
        if self.processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.processes}"]
        command = [*launcher, str(train_script()), str(self.base), *point.overrides, f"run.threads={self.threads}"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        with open(point.folder / LOG, "ab") as log:
            log.write((" ".join(command) + "\n").encode())
            log.flush()
            # A session of its own: Ctrl-C in the terminal reaches the sweep alone, which then stops its runs. If the
            # sweep is killed, its runs save and end too.
            return subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
                preexec_fn=partial(_prepare_child, self.processes),
            )


def _prepare_child(processes: int) -> None:
    """Between fork and exec of a training."""
    die_with_parent(signal.SIGTERM)
    if processes > 1:
        # torchrun must outlive the signal that its ranks take as a request to stop.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _may_start(point: Point) -> bool:
    """Whether the run that this one starts from, if any, has finished."""
    return point.start_from is None or read_result(point.start_from).state == "finished"


def _run_all(todo: list[Point], start: _Starter, jobs: int, console: Console) -> None:
    waiting, running, stopping = list(todo), [], False
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        try:
            while running or (any(map(_may_start, waiting)) and not stopping):
                while len(running) < jobs and not stopping and not start.late:
                    point = next((point for point in waiting if _may_start(point)), None)
                    if point is None:
                        break
                    waiting.remove(point)
                    row = progress.add_task(point.name, total=point.config.training.steps)
                    running.append(Job(point, start(point), row))
                time.sleep(_POLL_SECONDS)
                if not stopping and start.late:
                    stopping = True
                    console.print("time is up: the runs save and stop; the same command goes on with them")
                if stopping:
                    start.stop(running)
                running = [job for job in running if not _ended(job, progress, console)]
            for point in waiting if not stopping else []:
                console.print(f"{point.name}: not started, {point.start_from.name} has not finished", markup=False)
        except KeyboardInterrupt:
            console.print("stopping: the runs save; the same command goes on with them")
            while running:
                start.stop(running)
                time.sleep(_POLL_SECONDS)
                running = [job for job in running if not _ended(job, progress, console)]
            raise


def _ended(job: Job, progress: Progress, console: Console) -> bool:
    """Show how a job stands; True once its process has ended."""
    ended = job.process.poll() is not None
    newest = last_record(job.point.folder / "metrics.jsonl")
    if newest:
        progress.update(job.row, completed=newest["step"], description=f"{job.point.name}  loss {newest['loss']:.3f}")
    if ended:
        with open(job.point.folder / LOG, "a") as log:
            log.write(f"\n{ENDED}{job.process.returncode}\n")
        result = read_result(job.point)
        progress.remove_task(job.row)
        console.print(f"{job.point.name}: {describe(result)}", markup=False)
    return ended


def describe(result: Result) -> str:
    """One phrase on how a run stands."""
    if result.state == "finished":
        trailing = "" if result.trailing_loss is None else f", trailing {result.trailing_loss:.4f}"
        return f"finished, validation loss {result.loss:.4f}{trailing}, {result.seconds / 60:.1f} minutes of steps"
    if result.state == "failed":
        return f"FAILED after step {result.step}: {result.why} (see {result.point.folder / LOG})"
    if result.state == "cut":
        return f"saved after step {result.step} of {result.point.config.training.steps}"
    return result.state


def _evaluate(sweep: Sweep, point: Point, console: Console) -> list[str]:
    """Run the sweep's evaluations of a finished run that are not done yet; `evaluated.txt` lists those that are.
    Returns what failed."""
    done_file, log_file = point.folder / "evaluated.txt", point.folder / "evaluate.log"
    done = done_file.read_text().splitlines() if done_file.is_file() else []
    problems = []
    for arguments in sweep.file.evaluate:
        if arguments in done:
            continue
        command = [sys.executable, "-m", "moba_megatron.cli", "evaluate", str(point.folder), *arguments.split()]
        with open(log_file, "wb") as log:
            code = subprocess.run(command, stdout=log, stderr=log).returncode
        if code:
            problems.append(f"evaluating {point.name} ({arguments}) failed: {last_line(log_file)} (see {log_file})")
            continue
        with open(done_file, "a") as file:
            file.write(arguments + "\n")
        console.print(f"{point.name}: evaluated ({arguments})", markup=False)
    return problems

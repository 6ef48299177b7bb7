"""Run the points of a sweep as ordinary trainings, several at once, in several pieces of time if necessary.

Each point is `python train.py BASE key=value ...` in a process of its own. Finished runs are skipped. A run that was
cut continues from its newest checkpoint, as `train.py` does in every run folder. A run that starts from another run
waits for it. If a run fails, its output is in RUN/sweep.log, the other runs continue, and the sweep ends with an error
that lists it. After `minutes`, or on Ctrl-C, runs get SIGTERM: they save and end, and the same command continues them
later.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import moba_megatron
from moba_megatron.config import ConfigError
from moba_megatron.platform.processes import die_with_parent
from moba_megatron.runs.files import last_json_line, read_json
from moba_megatron.runs.folder import RunFolder
from moba_megatron.scaling.results import ENDED, LOG, Result, last_line, read_result
from moba_megatron.scaling.sweep import Point, Sweep

_POLL_SECONDS = 1.0
# In a run folder: the evaluations of the sweep that it has had, a line each.
_EVALUATED = "evaluated.txt"


@dataclass(frozen=True, eq=False)
class Job:
    """A running point."""

    point: Point
    process: subprocess.Popen[bytes]
    row: int
    slot: int
    """Which of the trainings that run at once it is, from 0: it says which GPUs are its own."""


def train_script() -> Path:
    """`train.py` beside the package.

    Raises:
        ConfigError: the package is installed without it.
    """
    script = Path(moba_megatron.__file__).parents[1] / "train.py"
    if not script.is_file():
        raise ConfigError([f"no {script}: run sweeps from a checkout (pip install --editable)"])
    return script


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; none on a machine without."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def default_jobs(processes: int) -> int:
    """Default number of trainings at a time: each has its own GPUs, or without GPUs its own cores."""
    return max(1, (len(visible_gpus()) or len(os.sched_getaffinity(0))) // processes)


def gpus_of(slot: int, processes: int, gpus: list[str]) -> list[str]:
    """The GPUs of a training, one for each of its ranks; where there are too few, trainings share them.

    >>> gpus_of(1, 2, ["0", "1", "2", "3"]), gpus_of(1, 2, ["0", "1"])
    (['2', '3'], ['0', '1'])
    """
    return [gpus[(slot * processes + rank) % len(gpus)] for rank in range(processes)]


def run_sweep(
    sweep: Sweep,
    points: list[Point],
    *,
    jobs: int,
    processes: int = 1,
    minutes: float | None = None,
    console: Console | None = None,
) -> list[Result]:
    """Run the unfinished ones among some points; return the results of all.

    Args:
        jobs: trainings at once; each gets its share of the cores, or its own `run.threads` if that is less, and GPUs of
            its own as far as they go.
        processes: ranks of each training (torchrun on this machine).
        minutes: stop after this time, with checkpoints. None: run to the end.

    Raises:
        ConfigError: a run of the sweep is running already, its folder holds another run, the run that it starts from
            has not finished, or there are fewer GPUs than ranks of a training.
    """
    console = console or Console(stderr=True)
    with_sources = {of.name: of for point in points for of in (point.start_from, point) if of is not None}
    results = {name: read_result(point) for name, point in with_sources.items()}
    busy = [str(point.folder) for point in points if results[point.name].state == "running"]
    if busy:
        raise ConfigError([f"{folder} is being trained at this moment: wait for it, or stop it" for folder in busy])
    todo = [point for point in points if results[point.name].state != "finished"]
    alone = [point for point in todo if point.start_from not in todo and not _may_start(point, results)]
    if alone:
        raise ConfigError([f"{p.name} starts from {p.start_from.name}, which has not finished: run that one as well"
                           for p in alone])  # fmt: skip
    _check_sources([point for point in todo if results[point.name].step == 0])
    gpus = visible_gpus()
    if gpus and processes > len(gpus):
        raise ConfigError([f"{processes} ranks of a training need as many GPUs, but this machine has {len(gpus)}"])
    if len(todo) < len(points):
        console.print(f"{len(points) - len(todo)} of {len(points)} runs are finished already")
    threads = max(1, len(os.sched_getaffinity(0)) // (max(1, min(jobs, len(todo))) * processes))
    start = _Starter(sweep, threads, processes, gpus, minutes)
    _run_all(todo, results, start, jobs, console)
    finished = [point for point in points if results[point.name].state == "finished"]
    left = [point for point in finished if _evaluations_left(sweep, point)]
    if left and start.late:
        names = ", ".join(point.name for point in left)
        console.print(f"not evaluated yet: {names}; run the same command again", markup=False)
    problems = [line for point in finished if not start.late for line in _evaluate(sweep, point, console)]
    if problems:
        raise ConfigError(problems)
    return [read_result(point) if point in left else results[point.name] for point in points]


class _Starter:
    """Starts trainings until the time is up, and says when they must stop."""

    def __init__(self, sweep: Sweep, threads: int, processes: int, gpus: list[str], minutes: float | None):
        self.sweep, self.threads, self.processes, self.gpus = sweep, threads, processes, gpus
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
                _signal_ranks(job.process.pid)
            elif job.process.poll() is None and job not in self._asked:
                job.process.send_signal(signal.SIGTERM)
        self._asked.update(jobs)

    def __call__(self, point: Point, slot: int) -> subprocess.Popen[bytes]:
        point.folder.mkdir(parents=True, exist_ok=True)
        launcher = [sys.executable]
        if self.processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.processes}"]
        threads = min(self.threads, point.config.run.threads or self.threads)
        command = [*launcher, str(train_script()), self.sweep.words_of(point), f"run.threads={threads}"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus_of(slot, self.processes, self.gpus))
        with open(point.folder / LOG, "ab") as log:
            log.write((" ".join(command) + "\n").encode(errors="backslashreplace"))
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
        # The ranks inherit it through torchrun: one that is still starting must outlive the request to stop.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _signal_ranks(launcher: int) -> None:
    """Ask the ranks of a torchrun to save and end. They have sessions of their own."""
    with suppress(psutil.NoSuchProcess):
        for rank in psutil.Process(launcher).children():
            rank.send_signal(signal.SIGUSR1)


def _may_start(point: Point, results: dict[str, Result]) -> bool:
    """Whether the run that this one starts from, if any, has finished."""
    return point.start_from is None or results[point.start_from.name].state == "finished"


def _check_sources(points: list[Point]) -> None:
    """Raise if a run would start from the weights of a run elsewhere that has not finished: it would take what is
    there."""
    problems = []
    for point in points:
        source = Path(point.config.model.init_from or "")
        status = read_json(RunFolder(source).status) if point.start_from is None else None
        if status is not None and status["state"] != "finished":
            problems.append(
                f"{point.name} starts from {source}, which is {status['state']} at step {status['step']}: finish "
                "that run, or name one of its checkpoints/step_N"
            )
    if problems:
        raise ConfigError(problems)


def _run_all(todo: list[Point], results: dict[str, Result], start: _Starter, jobs: int, console: Console) -> None:
    """Run these points.

    Args:
        results: of them and of the runs that they start from, by name; each is replaced when its training ends.
    """
    waiting, running, stopping = list(todo), [], False
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        try:
            while running or (any(_may_start(point, results) for point in waiting) and not stopping):
                while len(running) < jobs and not stopping and not start.late:
                    point = next((point for point in waiting if _may_start(point, results)), None)
                    if point is None:
                        break
                    waiting.remove(point)
                    row = progress.add_task(point.name, total=point.config.training.steps)
                    slot = min(set(range(jobs)) - {job.slot for job in running})
                    running.append(Job(point, start(point, slot), row, slot))
                time.sleep(_POLL_SECONDS)
                if not stopping and start.late:
                    stopping = True
                    console.print("time is up: the runs save and stop; the same command continues them")
                if stopping:
                    start.stop(running)
                running = [job for job in running if not _ended(job, results, progress, console)]
            for point in waiting if not stopping else []:
                console.print(f"{point.name}: not started, {point.start_from.name} has not finished", markup=False)
        except KeyboardInterrupt:
            console.print("stopping: the runs save; the same command continues them")
            while running:
                start.stop(running)
                time.sleep(_POLL_SECONDS)
                running = [job for job in running if not _ended(job, results, progress, console)]
            raise


def _ended(job: Job, results: dict[str, Result], progress: Progress, console: Console) -> bool:
    """Show how a job stands; True once its process has ended and its result is read."""
    ended = job.process.poll() is not None
    newest = last_json_line(job.point.run.metrics, needs=("step",))
    if newest:
        loss = "skipped" if "skipped" in newest else f"loss {newest['loss']:.3f}"
        progress.update(job.row, completed=newest["step"], description=f"{job.point.name}  {loss}")
    if ended:
        with open(job.point.folder / LOG, "a", encoding="utf-8") as log:
            log.write(f"\n{ENDED}{job.process.returncode}\n")
        result = results[job.point.name] = read_result(job.point)
        progress.remove_task(job.row)
        console.print(f"{job.point.name}: {describe(result)}", markup=False)
    return ended


def describe(result: Result) -> str:
    """The state of a run in one phrase."""
    if result.state == "finished":
        trailing = "" if result.trailing_loss is None else f", trailing {result.trailing_loss:.4f}"
        return f"finished, validation loss {result.loss:.4f}{trailing}, {result.seconds / 60:.1f} minutes of steps"
    if result.state == "failed":
        return f"FAILED after step {result.step}: {result.why} (see {result.point.folder / LOG})"
    if result.state == "cut":
        return f"saved after step {result.step} of {result.point.config.training.steps}"
    return result.state


def _evaluations_left(sweep: Sweep, point: Point) -> list[str]:
    """The sweep's evaluations that a finished run still needs."""
    done_file = point.folder / _EVALUATED
    done = done_file.read_text(encoding="utf-8").splitlines() if done_file.is_file() else []
    return [arguments for arguments in sweep.file.evaluate if arguments not in done]


def _evaluate(sweep: Sweep, point: Point, console: Console) -> list[str]:
    """Run the sweep's evaluations of a finished run that are not done yet. Returns what failed."""
    log_file = point.folder / "evaluate.log"
    problems = []
    for arguments in _evaluations_left(sweep, point):
        command = [sys.executable, "-m", "moba_megatron", "evaluate", str(point.folder), *shlex.split(arguments)]
        with open(log_file, "ab") as log:
            code = subprocess.run(command, stdout=log, stderr=log).returncode
        if code:
            problems.append(f"evaluating {point.name} ({arguments}) failed: {last_line(log_file)} (see {log_file})")
            continue
        with open(point.folder / _EVALUATED, "a", encoding="utf-8") as file:
            file.write(arguments + "\n")
        console.print(f"{point.name}: evaluated ({arguments})", markup=False)
    return problems

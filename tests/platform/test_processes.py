"""Process groups, seeds, devices and optional libraries."""

import os
import random
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy
import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks

from moba_megatron import platform
from moba_megatron.config import ParallelConfig
from moba_megatron.platform import process_groups
from moba_megatron.platform.start import start_single_rank


def rank_sum() -> int:
    total = torch.tensor(dist.get_rank() + 1)
    dist.all_reduce(total)
    return int(total)


def test_run_ranks_returns_in_order():
    assert run_ranks(2, lambda scale: (dist.get_rank() * scale, rank_sum()), 10) == [(0, 3), (10, 3)]


def test_run_ranks_reports_the_failing_rank():
    def fail_on_one():
        if dist.get_rank() == 1:
            raise KeyError("lost")
        dist.barrier()

    with pytest.raises(AssertionError, match=r"(?s)rank 1 of 2 failed:.*KeyError: 'lost'"):
        run_ranks(2, fail_on_one, timeout=30)


def test_run_ranks_ends_a_hang():
    with pytest.raises(TimeoutError, match=r"ranks \[0\] did not finish within 2"):
        run_ranks(
            1,
            lambda: dist.recv(torch.ones(1)) if dist.get_world_size() > 1 else __import__("time").sleep(60),
            timeout=2,
        )


def test_single_process_group_starts_and_stops(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)

    def action():
        platform.apply("cpu")
        device = platform.start_process_group()
        platform.start_model_parallel(ParallelConfig())
        total = rank_sum()
        platform.stop_process_groups()
        platform.stop_process_groups()
        return device.type, total, dist.is_initialized()

    assert run_ranks(1, action, prepare=False) == [("cpu", 1, False)]


@pytest.mark.parametrize("given", [{}, {"alone": True}, {"init_method": "file:///x", "rank": 0, "world_size": 1}])
def test_nccl_is_told_its_gpu(monkeypatch, given):
    calls = []
    monkeypatch.setattr(process_groups, "current_device", lambda: torch.device("cuda", 3))
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **settings: calls.append((backend, settings)))
    world = types.SimpleNamespace(bound_device_id=torch.device("cuda", 3))
    monkeypatch.setattr(dist.distributed_c10d._world, "default_pg", world)
    platform.start_process_group(**given)
    device, (backend, settings) = calls
    assert backend == "nccl" and settings["device_id"] == device == torch.device("cuda", 3)
    # Groups that are made later are not split from it, which all ranks would take part in.
    assert world.bound_device_id is None


def test_init_method_needs_rank_and_size():
    with pytest.raises(ValueError, match="needs rank and world_size, not None and 2"):
        platform.start_process_group(init_method="file:///nowhere", world_size=2)


def test_a_command_of_one_process_joins_no_world_around_it():
    def start(**environment: str) -> int:
        os.environ.update(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1", **environment)
        start_single_rank(1234)
        return dist.get_world_size()

    assert run_ranks(1, start, prepare=False) == [1]
    with pytest.raises(
        AssertionError, match="this command needs one process, but torchrun started 2: run it without torchrun"
    ):
        run_ranks(1, lambda: start(TORCHELASTIC_RUN_ID="1"), prepare=False)


def test_model_parallel_groups_follow_the_configuration():
    def action():
        from megatron.core import parallel_state

        platform.start_model_parallel(ParallelConfig(tensor=2, pipeline=2))
        return (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_pipeline_model_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
        )

    assert run_ranks(4, action) == [(0, 0, 1), (1, 0, 1), (0, 1, 1), (1, 1, 1)]


def test_seeds_differ_where_they_must_and_repeat():
    def draws():
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        platform.start_model_parallel(ParallelConfig(tensor=2))
        result = []
        for _ in range(2):
            platform.seed_all(7)
            with get_cuda_rng_tracker().fork():
                sharded = torch.rand(()).item()
            result.append((torch.rand(()).item(), random.random(), numpy.random.rand(), sharded))
        return result

    first, second = run_ranks(2, draws)
    assert first[0] == first[1] and second[0] == second[1]
    assert first[0][:3] == second[0][:3]  # the same on both tensor-parallel ranks
    assert first[0][3] != second[0][3]  # but for the sharded weights


def test_device_is_checked_against_the_local_rank(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert platform.current_device() == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="LOCAL_RANK = 2, but this machine has 2 GPUs"):
        platform.current_device()


def test_optional_libraries_say_why_and_how():
    libraries = platform.optional_libraries()
    assert set(libraries) == {"transformer_engine", "apex", "flash_attn", "flash_attn_3", "flash_attn_4", "triton"}
    for library in libraries.values():
        assert library.available == (library.reason == "")
        assert library.how_to_get and library.purpose


def test_the_other_package_named_apex_is_not_taken_for_apex(tmp_path, monkeypatch):
    from moba_megatron.platform import libraries

    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert libraries._find("apex").reason == "module amp_C is not installed"


def test_a_library_that_does_not_load_is_reported_with_its_error(tmp_path, monkeypatch):
    from moba_megatron.platform import libraries

    (tmp_path / "amp_C.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    assert "amp_C does not import: ImportError: libcudart.so.12" in libraries._find("apex").reason


@pytest.mark.parametrize("how", ["forks_die_with_this()\nif True:", "with forks_die_meanwhile():"])
def test_what_a_process_forks_ends_with_it(how):
    """Where a library forks, as megatron-core's checkpoint writer does, nothing outlives a killed process."""
    code = f"""
import multiprocessing, time
from moba_megatron.platform.processes import forks_die_meanwhile, forks_die_with_this
child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(300,))
{how}
    child.start()
print(child.pid, flush=True)
time.sleep(300)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    assert Path(f"/proc/{child}").exists()
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{child}").exists():
        assert time.monotonic() < deadline, "the forked process lives on"
        time.sleep(0.05)


def test_a_rank_whose_launcher_was_killed_while_it_started_ends(tmp_path):
    """It asks too late to end with its launcher: the first process of the machine has adopted it by then."""
    code = (
        "import time; time.sleep(0.2)\n"
        "from moba_megatron.platform.processes import die_with_parent, watch_for_failure\n"
        "die_with_parent(); watch_for_failure(); print('waits')"
    )
    (tmp_path / "rank.py").write_text(code)
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "none", "PYTHONPATH": str(Path(__file__).parents[2])}
    # The shell ends at once; the pipe, once the rank has ended.
    command = f"{sys.executable} {tmp_path / 'rank.py'} 2>&1 &"
    done = subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[rank 0] the launcher is gone\n"


def _timeouts(folder: Path) -> list[float]:
    from megatron.core import parallel_state

    platform.start_process_group(init_method=f"file://{folder}/store", rank=0, world_size=1, timeout_seconds=77.0)
    platform.start_model_parallel(ParallelConfig())
    groups = [
        dist.group.WORLD,
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_data_parallel_group(),
    ]
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


def test_every_group_has_the_timeout_that_was_asked_for(tmp_path):
    assert run_ranks(1, _timeouts, tmp_path, prepare=False) == [[77.0] * 3]

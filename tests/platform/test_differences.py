"""Each row of the platform table: what happens without it, and that it works with it. All in forked processes."""

import logging

import pytest
import torch
from distributed import run_ranks

from moba_megatron import platform
from moba_megatron.platform.differences import DIFFERENCES

NO_CUDA = (AssertionError, RuntimeError)  # "Torch not compiled with CUDA enabled", or no driver

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the table is for machines without CUDA")


def row(name: str):
    return next(difference for difference in DIFFERENCES if difference.name == name)


def fails_then_works(name: str, action):
    """In a bare process: `action` fails, and after the row is in place it does not."""
    with pytest.raises(NO_CUDA):
        action()
    row(name).apply()
    return action()


def test_current_device():
    result = run_ranks(1, fails_then_works, "current device", lambda: torch.cuda.current_device(), prepare=False)
    assert result == [torch.device("cpu")]


def test_synchronize():
    assert run_ranks(1, fails_then_works, "synchronize", lambda: torch.cuda.synchronize(), prepare=False) == [None]


def test_tensor_cuda():
    def same_object():
        tensor = torch.ones(2)
        return tensor.cuda(non_blocking=True) is tensor

    assert run_ranks(1, fails_then_works, "Tensor.cuda", same_object, prepare=False) == [True]


def test_generator_state():
    def replay():
        state = torch.cuda.get_rng_state()
        first = torch.rand(3)
        torch.cuda.set_rng_state(state)
        return torch.equal(first, torch.rand(3))

    assert run_ranks(1, fails_then_works, "generator state", replay, prepare=False) == [True]


def tracker_draws() -> list[float]:
    """The first number of three streams that the RNG tracker was given with different seeds."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    draws = []
    for seed in (1, 2, 3):
        tracker.add(f"stream {seed}", seed)
    for seed in (1, 2, 3):
        with tracker.fork(f"stream {seed}"):
            draws.append(torch.rand(()).item())
    return draws


def test_seed_without_the_row_makes_all_streams_equal():
    def both():
        for difference in DIFFERENCES:
            if difference.name != "seed":
                difference.apply()
        without = tracker_draws()
        row("seed").apply()
        return without, tracker_draws()

    without, present = run_ranks(1, both, prepare=False)[0]
    assert len(set(without)) == 1
    expected = [torch.rand((), generator=torch.Generator().manual_seed(seed)).item() for seed in (1, 2, 3)]
    assert present == expected


def test_tracker_state():
    # Without CUDA the stock function queues the call for later, so the stream is never set; the number drawn is wrong.
    def silent_or_loud():
        for name in ("generator state", "seed", "current device"):
            row(name).apply()
        try:
            wrong = tracker_draws()
        except NO_CUDA:
            wrong = None
        row("tracker state").apply()
        return wrong, tracker_draws()

    wrong, right = run_ranks(1, silent_or_loud, prepare=False)[0]
    expected = [torch.rand((), generator=torch.Generator().manual_seed(seed)).item() for seed in (1, 2, 3)]
    assert right == expected
    assert wrong != expected


def test_tracker_warning():
    def messages(with_row: bool) -> list[str]:
        for difference in DIFFERENCES:
            if with_row or difference.name != "tracker warning":
                difference.apply()
        seen: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: seen.append(record.getMessage())
        logging.getLogger().addHandler(handler)
        tracker_draws()
        return seen

    assert run_ranks(1, messages, False, prepare=False) == [["CPU RNG state changed within GPU RNG context"] * 3]
    assert run_ranks(1, messages, True, prepare=False) == [[]]


def test_tensor_factories():
    def action():
        return [
            torch.tensor([1.0], device="cuda"),
            torch.zeros(2, device="cuda:0", dtype=torch.float64),
            torch.empty((2, 3), device="cpu", pin_memory=True),
            torch.empty_like(torch.ones(2), device="cuda"),
        ]

    tensors = run_ranks(1, fails_then_works, "tensor factories", action, prepare=False)[0]
    assert [tensor.device.type for tensor in tensors] == ["cpu"] * 4
    assert [tensor.dtype for tensor in tensors[:2]] == [torch.float32, torch.float64]


def test_tensor_factories_leave_the_meta_device_alone():
    def action():
        row("tensor factories").apply()
        with torch.device("meta"):
            return [f(2).device.type for f in (torch.zeros, torch.empty, torch.tensor)] + [
                torch.empty_like(torch.ones(2)).device.type, torch.zeros(2, device="meta").device.type
            ]  # fmt: skip

    assert run_ranks(1, action, prepare=False)[0] == ["meta"] * 5


def test_current_stream():
    """megatron-core from 0.19 on asks for it when gradients are reduced, and lets it wait for events and streams."""

    def action():
        stream = torch.cuda.current_stream()
        stream.wait_event(None)
        stream.wait_stream(stream)
        stream.synchronize()
        stream.record_event().synchronize()
        return stream is torch.cuda.current_stream()

    assert run_ranks(1, fails_then_works, "current stream", action, prepare=False) == [True]


def test_tensor_type():
    def action():
        before = torch.ones(1).type()
        row("Tensor.type").apply()
        tensor = torch.ones(1)
        return before, tensor.type(), tensor.bfloat16().type(), tensor.type(torch.int64).dtype

    assert run_ranks(1, action, prepare=False)[0] == (
        "torch.FloatTensor", "torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor", torch.int64
    )  # fmt: skip


def test_checkpoint_results_queue():
    def action():
        from megatron.core.dist_checkpointing.strategies import filesystem_async

        row("checkpoint results queue").apply()
        names = ("get_write_results_queue", "_get_write_results_queue")
        results_queue = next(getattr(filesystem_async, name) for name in names if hasattr(filesystem_async, name))
        queue = results_queue()
        queue.put("written")
        return queue.get(), queue is results_queue()

    assert run_ranks(1, action, prepare=False) == [("written", True)]


def test_adam_is_the_one_that_megatron_builds():
    def action():
        from megatron.core import optimizer
        from megatron.core.optimizer import distrib_optimizer

        platform.apply("cpu")
        return optimizer.Adam.__module__, distrib_optimizer.Adam.__module__, optimizer.USING_PYTORCH_OPTIMIZER

    assert run_ranks(1, action, prepare=False)[0] == ("moba_megatron.platform.adam",) * 2 + (False,)


def test_product_of_routers_is_there_and_can_be_taken_back():
    def action():
        from megatron.core.transformer.moe import moe_utils

        difference, before = row("product of routers"), vars(moe_utils).get("te_general_gemm", "missing")
        platform.apply("cpu")
        during = moe_utils.te_general_gemm
        platform.restore()
        return before, during, vars(moe_utils).get("te_general_gemm", "missing"), difference.needed("cpu")

    before, during, after, needed = run_ranks(1, action, prepare=False)[0]
    assert during is None and after == before
    assert needed == (before == "missing")


def test_apply_is_complete_repeatable_and_can_be_taken_back():
    def action():
        original = torch.zeros, torch.Tensor.type, torch.cuda.current_device
        platform.apply("cpu")
        patched = torch.zeros
        platform.apply("cpu")
        names, once = platform.applied(), torch.zeros is patched
        platform.restore()
        now = torch.zeros, torch.Tensor.type, torch.cuda.current_device
        return names, once, [a is b for a, b in zip(original, now, strict=True)], platform.applied()

    names, once, same, after = run_ranks(1, action, prepare=False)[0]
    assert names == tuple(difference.name for difference in DIFFERENCES if difference.needed("cpu"))
    assert once and all(same) and after == ()


def test_on_cuda_little_is_replaced():
    def action():
        platform.apply("cuda")
        return platform.applied()

    libraries = platform.optional_libraries()
    fused = libraries["transformer_engine"].available or libraries["apex"].available
    product = ["product of routers"] * row("product of routers").needed("cuda")
    expected = ("rotation of packs", "checkpoint results queue", *product, *([] if fused else ["Adam"]))
    assert run_ranks(1, action, prepare=False) == [expected]


def test_unknown_device_is_refused():
    with pytest.raises(ValueError, match="device type 'tpu'"):
        platform.apply("tpu")


def test_importing_changes_nothing():
    assert platform.applied() == ()
    assert torch.Tensor.type(torch.ones(1)) == "torch.FloatTensor"

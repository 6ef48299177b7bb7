"""The checks of the GPU suite on a CPU: they pass for the portable backend, and each sees what it is there for."""

import gpu_checks as checks
import pytest
import torch
from gpu_checks import Shape

from moba_megatron.ops import select_blocks
from moba_megatron.ops.attend_function import with_gradients
from moba_megatron.ops.gathered import attend_forward, attention
from moba_megatron.ops.gathered.backend import GatheredSteps

PACK = Shape((0, 5, 5, 140, 333), block_size=16, top_k=3, size=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_portable_backend_passes(dtype):
    checks.check_selection(PACK, "cpu", dtype)
    checks.check_against_definition(PACK, "cpu", dtype, "gathered")
    checks.check_against_definition(PACK, "cpu", dtype, "gathered", checks.skewed_inputs(PACK, "cpu", dtype))
    checks.check_same_bits(PACK, "cpu", dtype, "gathered", runs=2)
    checks.check_poisoned(PACK, "cpu", dtype, "gathered")
    checks.check_last_document(PACK, "cpu", dtype, "gathered")
    checks.check_workspace(PACK, "cpu", dtype, "gathered", 10_000)


@pytest.fixture
def forward(monkeypatch):
    """Replace the portable backend's forward pass."""

    def replace(function):
        attend = with_gradients(function, attention.attend_backward)
        monkeypatch.setattr(GatheredSteps, "attend", staticmethod(attend))

    return replace


def test_a_small_factor_is_seen(forward):
    def wrong(*arguments):
        out, lse = attend_forward(*arguments)
        return out * 1.001, lse

    forward(wrong)
    with pytest.raises(AssertionError, match="out: "):
        checks.check_against_definition(PACK, "cpu", torch.float32, "gathered")


def test_a_row_that_is_not_written_is_seen(forward):
    def forgetful(*arguments):
        out, lse = attend_forward(*arguments)
        mine = torch.empty_like(out)
        mine[:-1] = out[:-1]
        return mine, lse

    forward(forgetful)
    with pytest.raises(AssertionError):
        checks.check_poisoned(PACK, "cpu", torch.float32, "gathered")


def test_a_workspace_that_changes_the_result_is_seen(forward):
    def hasty(q, k, v, ids, layout, scale, workspace_bytes=None, block_lse=None):
        out, lse = attend_forward(q, k, v, ids, layout, scale, workspace_bytes, block_lse)
        return out * (1 if workspace_bytes is None else 1.001), lse

    forward(hasty)
    with pytest.raises(AssertionError):
        checks.check_workspace(PACK, "cpu", torch.float32, "gathered", 10_000)


def test_an_order_left_open_is_seen(forward):
    def restless(*arguments):
        out, lse = attend_forward(*arguments)
        return out + torch.rand(()) * 1e-6, lse

    forward(restless)
    with pytest.raises(AssertionError):
        checks.check_same_bits(PACK, "cpu", torch.float32, "gathered")


def test_an_address_that_wraps_is_seen(forward):
    def wrapping(q, *arguments):
        out, lse = attend_forward(q, *arguments)
        if q.shape[0] == PACK.tokens:
            out[-1] = out[0]
        return out, lse

    forward(wrapping)
    with pytest.raises(AssertionError):
        checks.check_last_document(PACK, "cpu", torch.float32, "gathered")


def test_skewed_inputs_are_skewed():
    q, k, *_ = checks.skewed_inputs(PACK, "cpu", torch.float32)
    ids = select_blocks(q, k, PACK.cu_seqlens("cpu"), **PACK.settings)
    last = ids[150:, :, 1]
    assert (last == 0).double().mean() > 0.95

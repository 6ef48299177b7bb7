"""What planning foretells of the backends' sizes is what the backends have, also where Triton cannot be installed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from small_run import small_config

from moba_megatron.model.schedule import LayerAttention
from moba_megatron.ops import kernel_sizes
from moba_megatron.ops.fragments import Keys
from moba_megatron.ops.kernel_sizes import backward_entry_bytes
from moba_megatron.planning.memory_layer import Shape, attention_backward_bytes

WITHOUT_TRITON = """
import importlib, pkgutil, sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] == "triton" else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import moba_megatron.ops, moba_megatron.planning

for package in (moba_megatron.ops, moba_megatron.planning):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.", onerror=lambda name: None):
        if ".ops.triton" not in module.name:
            importlib.import_module(module.name)
print(moba_megatron.ops.resolve_backend("auto", "cpu")[0])
"""


def test_operator_and_planning_need_no_triton():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "gathered\n"), done.stderr


@pytest.mark.parametrize("tokens", [2**23, 2**12])
def test_a_gpu_rank_has_room_for_the_kernels_workspace(tmp_path, tokens):
    """Beside the gradients, which full attention has as well. What there are no entries for is not taken."""
    config = small_config(tmp_path, data__sequence_length=tokens, training__micro_batch_size=1)
    shape = Shape.of(config, "cuda")
    moba, full = (
        attention_backward_bytes(shape, LayerAttention(kind, *sizes))
        for kind, sizes in (("moba", (16, 3)), ("full", (None, None)))
    )
    q = torch.empty(shape.tokens, shape.heads, shape.head_size, dtype=config_dtype(shape), device="meta")
    entries = shape.tokens * shape.heads * 2 * backward_entry_bytes(shape.head_size, shape.width)
    assert moba - full == min(max(2**31, q.nbytes), entries)
    assert (entries > max(2**31, q.nbytes)) == (tokens == 2**23)


def test_a_workspace_that_is_set_is_what_planning_charges(tmp_path):
    layer = LayerAttention("moba", 16, 3)

    def held(device: str, room: int | None) -> int:
        config = small_config(tmp_path, attention__workspace_bytes=room)
        return attention_backward_bytes(Shape.of(config, device), layer)

    assert held("cuda", 2**10) + 2**10 == held("cuda", 2**11) < held("cuda", None)
    assert held("cpu", 2**10) + 2**10 == held("cpu", 2**11)


def config_dtype(shape: Shape) -> torch.dtype:
    return {2: torch.bfloat16, 4: torch.float32}[shape.width]


def test_the_kernels_take_that_workspace():
    triton = pytest.importorskip("triton")
    assert triton
    from moba_megatron.ops.triton.passes import forward_entry_bytes, passes

    class NoOwnBlocks:
        def num_slots(self, num_past: int) -> int:
            return num_past

    def entries(tokens: int, workspace_bytes: int | None) -> list[int]:
        q, k = (torch.empty(tokens, heads, 128, dtype=torch.bfloat16, device="meta") for heads in (8, 2))
        cut = passes(q, Keys(k, k, 4), 7, NoOwnBlocks(), forward_entry_bytes(q), workspace_bytes)
        return [work.num_entries for work in cut]

    for tokens in (2**18, 2**21):
        default = kernel_sizes.default_workspace(tokens * 8 * 128 * 2)
        assert entries(tokens, None) == entries(tokens, default) != entries(tokens, default // 2)


@pytest.mark.parametrize("head_size", [64, 128])
def test_the_longest_block_that_one_kernel_takes(head_size):
    pytest.importorskip("triton")
    from moba_megatron.ops.triton import config

    for block_size in (16, 64, kernel_sizes.SHORT_BLOCK, 2 * kernel_sizes.SHORT_BLOCK):
        short = config.holds_kv_block("past_dkdv_dq", torch.bfloat16, head_size, block_size, 90)
        assert short == (block_size <= kernel_sizes.SHORT_BLOCK)

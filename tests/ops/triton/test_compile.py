"""The kernels compiled ahead of time: they fit their chips, spill nothing and use the matrix units.

A part of what `make kernels` compiles: every kernel on every architecture, and on sm_90 all that `auto` takes for
bf16, D = 128 and the block sizes that people use. Nothing comes from the user's cache of compiled kernels.
"""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

pytest.importorskip("triton")

from moba_megatron.ops.triton import catalog, compiled  # noqa: E402
from moba_megatron.ops.triton.common import COUNTS  # noqa: E402

# (block size, top_k). Blocks above the catalogue's longest have the same tiles.
SETTINGS = ((64, 16), (128, 8), (512, 3), (4096, 12))
PARTS = [
    (90, torch.bfloat16, 128, [min(b, max(catalog.LENGTHS)) for b, _ in SETTINGS], [k - 1 for _, k in SETTINGS]),
    (90, torch.float16, 96, [32], [7]),
    (90, torch.float16, 256, [128], [63]),
    (90, torch.float32, 64, [64], [2]),
    (90, torch.float32, 128, [512], [7]),
    (80, torch.bfloat16, 128, [64, 512], [2]),
    (80, torch.float32, 96, [16], [31]),
    (100, torch.bfloat16, 128, [128, 512], [2]),
    (100, torch.float16, 256, [64], [15]),
]


FEW = [
    (90, torch.bfloat16, 128, [64, 512], [15]),
    (80, torch.bfloat16, 128, [64], [2]),
    (100, torch.bfloat16, 128, [512], [2]),
]


def listed(parts: list = PARTS) -> list[compiled.Job]:
    """The configurations of these parts, each once."""
    found = {}
    for architecture, dtype, size, lengths, num_past in parts:
        for made in catalog.configurations(
            architecture, dtypes=[dtype], head_sizes=[size], lengths=lengths, num_past=num_past
        ):
            found.setdefault(f"{architecture} {made} {made.signature}", (made, architecture))
    return list(found.values())


def test_every_kernel_is_listed_for_every_architecture():
    jobs = listed()
    for architecture in compiled.SHARED_BYTES:
        names = {made.name for made in catalog.configurations(architecture)}
        assert {made.name for made, on in jobs if on == architecture} == names


def test_what_is_compiled_does_not_hang_on_counts():
    """Every integer of a kernel is a size known at compile time, a stride, or one that is not specialised: a model with
    another number of heads, blocks or slots runs the code that was compiled here."""
    for made in catalog.configurations():
        integers = {name for name, kind in made.signature.items() if kind == "i32"}
        assert integers <= {*COUNTS, *catalog.STRIDES}, made


@pytest.mark.parametrize("parts", [FEW, pytest.param(PARTS, marks=pytest.mark.slow)], ids=["few", "all"])
def test_kernels_fit_their_chips(tmp_path, parts):
    rows = list(compiled.compile_all(listed(parts), processes=2, cache=tmp_path))
    assert [row for row in rows if row.problem] == []
    assert all(row.registers > 4 for row in rows)
    for architecture, instruction in ((80, "mma.sync"), (90, "wgmma"), (100, "tcgen05.mma")):
        used = [row.matrix for row in rows if row.architecture == architecture and row.dtype == "bf16"]
        assert instruction in used


def test_tiles_of_entries_keep_their_order_in_machine_code():
    """Each tile of `scatter_entries` reads places, stores entries there, and moves the places on for the next tile.
    Threads do these for different entries, so a barrier has to stand before and after the last store."""
    for architecture in compiled.SHARED_BYTES:
        (made,) = (made for made in catalog.configurations(architecture) if made.name == "scatter_entries")
        ptx = made.compile(architecture).asm["ptx"]
        steps = re.findall(r"^\s*(?:@\S+\s+)?(ld\.global|st\.global|bar\.sync|bra)\b", ptx, re.MULTILINE)
        loop = " ".join(steps)
        assert "ld.global st.global bar.sync st.global bar.sync bra" in loop, (architecture, loop)
        assert steps.count("st.global") == 2


def test_what_cannot_run_is_told(tmp_path):
    """A tile too large for one chip's shared memory and for another's tensor memory."""
    kernels = catalog.configurations(90, dtypes=[torch.bfloat16], head_sizes=[256], lengths=[32], num_past=[1])
    fused = next(made for made in kernels if made.name == "past_dkdv" and made.constexprs["WRITE_DQ"])
    wide = dataclasses.replace(fused, constexprs=fused.constexprs | {"BLOCK_M": 64, "BLOCK_N": 64}, num_stages=1)
    first, second = compiled.compile_all([(wide, 80), (wide, 100)], processes=2, cache=tmp_path)
    assert "of shared memory, the chip has 101376" in first.problem
    assert "columns of tensor memory, the chip has 512" in second.problem

"""Attention over a sequence that lies on several ranks: every exchange, on one to four ranks."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from distributed import run_ranks
from parallel.examples import groups_for, pack_inputs, run_shard

from moba_megatron.ops.selection import Selection
from moba_megatron.parallel.attention import context_attention
from snapshot.texts import describe_all, write_lines

EXCHANGES = {
    1: ("a2a", "p2p", "all_gather", "dispatch"),
    2: ("a2a", "p2p", "all_gather", "dispatch"),
    3: ("p2p", "all_gather", "dispatch"),
    4: ("a2a", "a2a+p2p", "p2p", "all_gather", "dispatch"),
}
# Boundaries that are multiples of 4 and 8, for two and four ranks; of 6 for three.
PACKS = {"one": (0, 96), "uneven": (0, 16, 16, 72, 96), "tiny": (0, 8, 16, 24, 40, 48, 96)}
PACKS_OF_THREE = {"three": (0, 6, 18, 18, 90)}
SIZES = ((4, 2), (5, 4), (16, 1), (60, 2), (100, 200), (None, None))
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
VARIANTS = {
    "min_max": Selection(summary="min_max"),
    "threshold": Selection("threshold", threshold=0.7),
    "recent": Selection("recent"),
    "sink_recent": Selection("sink_recent"),
}


def take_context(out: Path) -> None:
    """Write a file for each number of ranks."""
    torch.set_num_threads(1)
    for ranks in EXCHANGES:
        found = run_ranks(ranks, lines_of_rank, ranks, timeout=900)
        write_lines(out, f"context/{ranks}_ranks.txt", (line for rank in found for line in rank))


def lines_of_rank(ranks: int) -> list[str]:
    """On one of several ranks: its outputs and gradients in every case."""
    lines = []
    groups = {exchange: groups_for(exchange) for exchange in EXCHANGES[ranks]}
    packs = PACKS_OF_THREE if ranks == 3 else PACKS
    for exchange, group in groups.items():
        for pack, bounds in packs.items():
            for block_size, top_k in SIZES:
                lines.append(_line(group, bounds, (exchange, pack, "fp32", (8, 4), block_size, top_k), ranks, {}))
        bounds = packs["three" if ranks == 3 else "uneven"]
        for dtype, heads in (("fp64", (16, 4)), ("bf16", (4, 4))):
            for block_size, top_k in (SIZES[1], SIZES[-1]):
                case = (exchange, "again", dtype, heads, block_size, top_k)
                lines.append(_line(group, bounds, case, ranks, {}))
        for name, selection in VARIANTS.items():
            case = (exchange, name, "fp32", (8, 4), 5, 3)
            lines.append(_line(group, bounds, case, ranks, {"selection": selection}))
    return lines


def _line(group, bounds: tuple[int, ...], case: tuple, ranks: int, settings: dict) -> str:
    exchange, _, dtype, heads, block_size, top_k = case
    rank, cu = dist.get_rank(), torch.tensor(bounds, dtype=torch.int32)
    tensors = pack_inputs(bounds[-1], *heads, dtype=DTYPES[dtype], seed=len(bounds))
    known = {"cp_groups": group, "exchange": exchange, "block_size": block_size, "top_k": top_k, "cu_seqlens": cu}
    try:
        got, _ = run_shard(lambda *x: context_attention(*x, **known, **settings), tensors, list(bounds), ranks, rank)
        found = describe_all(("out", "dq", "dk", "dv"), got)
    except ValueError as error:
        found = f"refused: {error}"
    return f"rank {rank} {' '.join(map(str, case))}: {found}"

"""A context-parallel rank's part of a batch: nothing lost, nothing twice, padding inert, cut as megatron-core cuts."""

from __future__ import annotations

from inspect import signature

import pytest
import torch
from distributed import run_ranks

from moba_megatron.data.batches import Batch, context_part, microbatches, pack, packed_seq_params
from moba_megatron.parallel.context_plan import host_boundaries
from moba_megatron.parallel.layout import check_positions

EOD, LENGTH = 0, 24
ROWS = ("tokens", "labels", "loss_mask", "position_ids")


class Sentences:
    """Samples of `LENGTH` random ids, an end of document about every sixth."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, 6, (LENGTH + 1,), generator=torch.Generator().manual_seed(number))
        return {
            "tokens": ids[:-1],
            "labels": ids[1:],
            "loss_mask": (ids[:-1] != EOD).float(),
            "position_ids": torch.arange(LENGTH),
        }


def first_batch(eod_id: int | None, **context: int) -> Batch:
    where = {"consumed_samples": 0, "data_parallel_rank": 0, "data_parallel_size": 1, "device": "cpu"}
    return next(microbatches(Sentences(), micro_batch_size=2, eod_id=eod_id, **where, **context))


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("multiple", [1, 2, 3])
def test_the_parts_of_a_pack_are_the_pack(size: int, multiple: int):
    whole = first_batch(EOD)
    parts = [first_batch(EOD, context_rank=rank, context_size=size, tokens_multiple=multiple) for rank in range(size)]
    true, padded = whole["cu_seqlens"], parts[0]["cu_seqlens_padded"]
    assert len(true) > 6 and padded.dtype == torch.int32
    assert (padded.diff() % (2 * size) == 0).all() and (padded.diff() >= true.diff()).all()
    seen = []
    for rank, part in enumerate(parts):
        assert part["cu_seqlens"].equal(true) and part["cu_seqlens_padded"].equal(padded)
        assert part["tokens"].shape == (1, int(padded[-1]) // size) and part["tokens"].shape[1] % multiple == 0
        check_positions(part["position_ids"].flatten(), padded, size, rank)
        # Documents in order, and so, within a rank, a position lower than the one before it starts the next document.
        positions = part["position_ids"].flatten()
        document = torch.repeat_interleave(torch.arange(len(true) - 1), padded.diff() // size)
        is_true = positions < true.diff()[document]
        seen.append((true[document] + positions)[is_true])
        for name in ROWS:
            assert part[name].dtype == whole[name].dtype
            assert part[name][0, is_true].equal(whole[name][0, seen[-1]])
            assert name == "position_ids" or not part[name][0, ~is_true].any()
    assert torch.cat(seen).sort().values.equal(torch.arange(2 * LENGTH))
    assert sum(part["loss_mask"].sum() for part in parts) == whole["loss_mask"].sum()


def test_padding_has_the_end_of_document_id_and_no_part_in_the_loss():
    tokens = torch.tensor([[5, 6, 7, 9, 8]])
    whole = pack({"tokens": tokens, "labels": tokens + 1, "loss_mask": torch.ones(1, 5)}, eod_id=9)
    part = context_part(whole, 1, 2, pad_id=9)
    assert part["cu_seqlens_padded"].tolist() == [0, 4, 8] and part["max_seqlen"] == 4
    assert part["tokens"].tolist() == [[6, 7, 9, 9]]
    assert part["labels"].tolist() == [[7, 8, 0, 0]]
    assert part["loss_mask"].tolist() == [[1.0, 1.0, 0.0, 0.0]]
    assert part["position_ids"].tolist() == [[1, 2, 1, 2]]


def test_both_boundaries_reach_megatron_core():
    part = first_batch(EOD, context_rank=1, context_size=2)
    params = packed_seq_params(part)
    assert params.cu_seqlens_q is params.cu_seqlens_kv is part["cu_seqlens"]
    assert params.cu_seqlens_q_padded is params.cu_seqlens_kv_padded is part["cu_seqlens_padded"]
    assert params.max_seqlen_q == int(part["cu_seqlens_padded"].diff().max())
    assert packed_seq_params(first_batch(EOD)).cu_seqlens_q_padded is None


def test_rows_are_cut_as_by_megatron_core():
    def cut():
        from megatron.core import parallel_state
        from megatron.core.utils import get_batch_on_this_cp_rank

        size = torch.distributed.get_world_size()
        parallel_state.initialize_model_parallel(context_parallel_size=size)
        whole = first_batch(None)
        mine = first_batch(None, context_rank=torch.distributed.get_rank(), context_size=size)
        # megatron-core from 0.19 on asks which way to cut.
        asks = "is_hybrid_cp" in signature(get_batch_on_this_cp_rank).parameters
        theirs = get_batch_on_this_cp_rank(dict(whole), **({"is_hybrid_cp": False} if asks else {}))
        assert set(mine) == set(theirs) == set(ROWS)
        assert all(mine[name].equal(theirs[name]) for name in ROWS)
        return mine["position_ids"]

    for size in (2, 4):
        positions = run_ranks(size, cut)
        assert torch.cat(positions, dim=1).sort().values.equal(torch.arange(LENGTH).expand(2, -1))


def test_rows_that_cannot_be_cut_are_refused():
    with pytest.raises(ValueError, match="24 tokens, not a multiple of 2 x context-parallel size = 10: pad it to 30"):
        first_batch(None, context_rank=0, context_size=5)


def test_on_a_device_the_host_still_knows_the_boundaries():
    """Where values cannot be read at all: what context parallelism plans with comes from before the copy."""
    where = {"consumed_samples": 0, "data_parallel_rank": 0, "data_parallel_size": 1}
    batch = next(microbatches(Sentences(), micro_batch_size=2, eod_id=EOD, device="meta", context_size=2, **where))
    assert {value.device.type for value in batch.values() if isinstance(value, torch.Tensor)} == {"meta"}
    values = host_boundaries(batch["cu_seqlens_padded"])
    assert values == tuple(first_batch(EOD, context_size=2)["cu_seqlens_padded"].tolist())

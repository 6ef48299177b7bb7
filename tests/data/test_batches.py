from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch

from moba_megatron.data import batches
from moba_megatron.data.batches import microbatches, pack, packed_seq_params, rank_samples

EOD = 0
LENGTH = 12


class Counting:
    """Samples whose tokens are their own number, with documents of growing length."""

    def __len__(self) -> int:
        return 26

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        tokens = torch.full((LENGTH,), number + 1)
        tokens[number % LENGTH] = EOD
        return {
            "tokens": tokens,
            "labels": tokens.roll(-1),
            "loss_mask": (tokens != EOD).float(),
            "position_ids": torch.arange(LENGTH),
        }


def stream(**changes: Any) -> list[batches.Batch]:
    defaults: dict[str, Any] = {
        "consumed_samples": 0,
        "micro_batch_size": 2,
        "data_parallel_rank": 0,
        "data_parallel_size": 1,
        "device": "cpu",
        "eod_id": None,
    }
    return list(microbatches(Counting(), **defaults | changes))


def numbers_of(batch: batches.Batch) -> list[int]:
    """Which samples a batch counts in its loss."""
    rows = zip(batch["tokens"].view(-1, LENGTH), batch["loss_mask"].view(-1, LENGTH), strict=True)
    return [int(tokens.max()) - 1 for tokens, mask in rows if mask.any()]


def global_order(ranks: int, consumed: int, micro_batch: int) -> list[list[int]]:
    """Samples of each pass over all ranks, in the order of the ranks."""
    streams = [
        stream(consumed_samples=consumed, micro_batch_size=micro_batch, data_parallel_rank=r, data_parallel_size=ranks)
        for r in range(ranks)
    ]
    return [[n for batch in passed for n in numbers_of(batch)] for passed in zip(*streams, strict=True)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("consumed", [0, 8, 24])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_any_number_of_ranks_takes_the_very_next_samples(ranks: int, consumed: int, micro_batch: int):
    order = global_order(ranks, consumed, micro_batch)
    assert [n for passed in order for n in passed] == list(range(consumed, 26))
    assert all(len(passed) == ranks * micro_batch for passed in order[:-1])


def test_the_samples_of_a_step_do_not_depend_on_the_number_of_ranks():
    """Resume of a run with batches of 12 samples on 1, 2, 3 or 6 ranks: the same samples in each step."""
    for ranks, micro_batch in ((1, 3), (2, 2), (3, 1), (6, 2)):
        passes = 12 // (ranks * micro_batch)
        order = global_order(ranks, 12, micro_batch)[:passes]
        assert sorted(n for passed in order for n in passed) == list(range(12, 24))


def test_the_order_is_that_of_megatrons_pretraining_sampler():
    """Rank r of a pass takes the r-th run of micro_batch_size samples of the next micro_batch_size x ranks."""
    assert list(rank_samples(8, 24, 2, data_parallel_rank=1, data_parallel_size=4)) == [[10, 11], [18, 19]]


def test_unpacked_batches_keep_rows():
    batch = stream(consumed_samples=4, micro_batch_size=3)[0]
    assert "cu_seqlens" not in batch and packed_seq_params(batch) is None
    for name, dtype in (("tokens", torch.int64), ("labels", torch.int64), ("position_ids", torch.int64)):
        assert (batch[name].shape, batch[name].dtype) == ((3, LENGTH), dtype)
    assert batch["loss_mask"].dtype == torch.float32
    assert batch["labels"][1].equal(Counting()[5]["labels"])


def test_packed_batches_end_documents_at_their_token_and_at_the_sample():
    batch = stream(consumed_samples=10, micro_batch_size=3, eod_id=EOD)[0]
    # Ends at 10, 11 and 0 within samples of 12 tokens: the second sample ends in an end-of-document token.
    assert batch["cu_seqlens"].tolist() == [0, 11, 12, 24, 25, 36]
    assert (batch["cu_seqlens"].dtype, batch["max_seqlen"]) == (torch.int32, 12)
    positions = torch.cat([torch.arange(n) for n in (11, 1, 12, 1, 11)])
    assert batch["position_ids"].equal(positions.unsqueeze(0))
    rows = [Counting()[n] for n in (10, 11, 12)]
    for name in ("tokens", "labels", "loss_mask"):
        assert batch[name].equal(torch.cat([row[name] for row in rows]).unsqueeze(0))
    params = packed_seq_params(batch)
    assert params.qkv_format == "thd"
    assert params.cu_seqlens_q is batch["cu_seqlens"] and params.cu_seqlens_kv is batch["cu_seqlens"]
    assert (params.max_seqlen_q, params.max_seqlen_kv) == (12, 12)


def test_packing_agrees_with_a_loop_over_tokens():
    tokens = torch.randint(0, 4, (5, 40), generator=torch.Generator().manual_seed(0))
    packed = pack({"tokens": tokens}, EOD)
    ends, positions, position = [0], [], 0
    for number, token in enumerate(tokens.flatten().tolist(), start=1):
        positions.append(position)
        position += 1
        if token == EOD or number % 40 == 0:
            ends.append(number)
            position = 0
    assert packed["cu_seqlens"].tolist() == ends
    assert packed["position_ids"].flatten().tolist() == positions
    assert packed["max_seqlen"] == max(b - a for a, b in zip(ends, ends[1:], strict=False))


def test_wrong_ranks_and_ranges_are_refused():
    with pytest.raises(ValueError, match="data_parallel_rank 2 is not within data_parallel_size 2"):
        stream(data_parallel_rank=2, data_parallel_size=2)
    with pytest.raises(ValueError, match="samples 0 to 27 are not within the 26"):
        stream(num_samples=27)
    with pytest.raises(ValueError, match="samples 9 to 4"):
        stream(consumed_samples=9, num_samples=4)


def test_examples_in_the_documentation():
    assert doctest.testmod(batches, extraglobs={"torch": torch}).failed == 0

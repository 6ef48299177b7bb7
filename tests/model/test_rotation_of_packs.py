"""The rotation of packs: megatron-core's own bits, without its reads of the boundaries."""

from __future__ import annotations

import itertools

import torch
from distributed import run_ranks
from model_examples import tiny

from moba_megatron.model.rotary import DocumentRotaryEmbedding, packed_positions, rotary_frequencies
from moba_megatron.parallel.layout import shard_positions

BOUNDS = torch.tensor([0, 8, 8, 24, 64], dtype=torch.int32)


def test_positions_are_those_of_the_layout():
    for size in (1, 2, 4):
        starts = BOUNDS[torch.searchsorted(BOUNDS[1:], torch.arange(64), right=True)]
        for rank in range(size):
            mine = shard_positions(BOUNDS, size, rank)
            assert torch.equal(packed_positions(BOUNDS, 64 // size, size, rank), mine - starts[mine])


class Group:
    def __init__(self, size, rank):
        self.size, self.rank = lambda: size, lambda: rank


def test_rotation_has_the_bits_of_megatron_core():
    """For each rank of several sizes: queries rotated by its own function from a table, and by ours."""

    def action():
        from megatron.core.models.common.embeddings import rope_utils
        from megatron.core.packed_seq_params import PackedSeqParams

        from moba_megatron import platform

        stock = rope_utils._apply_rotary_pos_emb_thd.__wrapped__
        whole, part = (tiny(model={"rotary_percent": percent}).model for percent in (1.0, 0.75))
        different = []
        for size, rank in ((1, 0), (2, 0), (2, 1), (4, 3)):
            group = Group(size, rank)
            pack = PackedSeqParams(qkv_format="thd", cu_seqlens_q=BOUNDS, cu_seqlens_kv=BOUNDS)

            class Sizes:
                sequence_parallel, context_parallel_size = False, size

            cases = [(whole, 1.0), (part, 1.0), (part, 1.19)]
            for dtype, (model, factor) in itertools.product((torch.float32, torch.bfloat16), cases):
                embedding = DocumentRotaryEmbedding(
                    rotary_frequencies(model), 64, fused=False, dtype=dtype if factor == 1.0 else torch.float32,
                    kv_channels=model.head_size, cp_group=group,
                )  # fmt: skip
                t = torch.randn(64 // size, 4, model.head_size).to(dtype)
                length = embedding.get_rotary_seq_len(None, None, t, Sizes, pack)
                cos_and_sin = embedding(length, packed_seq=True)
                table = super(DocumentRotaryEmbedding, embedding).forward(length, packed_seq=True)
                assert cos_and_sin.shape[1:] == (2, 1, model.rotary_channels)
                got = rope_utils._apply_rotary_pos_emb_thd(t, BOUNDS, cos_and_sin, mscale=factor, cp_group=group)
                want = stock(t, BOUNDS, table, mscale=factor, cp_group=group)
                # A table goes to megatron-core's function.
                passed_on = rope_utils._apply_rotary_pos_emb_thd(t, BOUNDS, table, mscale=factor, cp_group=group)
                if not (torch.equal(got, want) and torch.equal(passed_on, want)):
                    different.append((size, rank, dtype, model.rotary_percent, factor))
        assert "rotation of packs" in platform.applied()
        return different

    assert run_ranks(1, action) == [[]]

"""The seam under context parallelism: groups, positions and layout of a model, against the same model without it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from model_examples import VOCABULARY, tiny, tokens

from moba_megatron import platform
from moba_megatron.data.batches import Batch, context_part, packed_seq_params
from moba_megatron.model.core_attention import MoBACoreAttention
from moba_megatron.model.rotary import table_length
from moba_megatron.model.schedule import FULL, AttentionSchedule, LayerAttention

MOBA = LayerAttention("moba", 8, 2)
BOUNDARIES = torch.tensor([0, 30, 31, 64], dtype=torch.int32)


def whole_batch(packed: bool) -> Batch:
    """A pack of three documents, [1, 64], or two sequences, [2, 64]; labels number the tokens from 1 on."""
    ids, positions, _ = tokens(1 if packed else 2, 64)
    numbers = torch.arange(1, ids.numel() + 1).view(ids.shape)
    batch = {"tokens": ids, "labels": numbers, "position_ids": positions, "loss_mask": torch.ones(ids.shape)}
    if packed:
        batch["position_ids"] = positions - BOUNDARIES[:-1].repeat_interleave(BOUNDARIES.diff())
        batch |= {"cu_seqlens": BOUNDARIES, "max_seqlen": 33}
    return batch


def built(config):
    from moba_megatron.model.builder import build_model

    platform.start_model_parallel(config.parallel)
    (model,) = build_model(config, VOCABULARY, AttentionSchedule.from_config(config.attention, 2))
    return model


def run_model(model, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(batch["tokens"], batch["position_ids"], None, packed_seq_params=packed_seq_params(batch))


def queries_and_logits(parallel: dict, packed: bool):
    """Of each token of this rank: its number (0: padding), its query in the first layer after rotary embedding, its
    logits."""
    from megatron.core import parallel_state

    config = tiny(parallel=parallel, attention={"block_size": 8, "top_k": 2, "last_n_full": 1})
    model = built(config)
    seen = []
    model.decoder.layers[0].self_attention.core_attention.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0] if packed else inputs[0].transpose(0, 1).flatten(0, 1))
    )
    batch = whole_batch(packed)
    if config.parallel.context > 1:
        batch = context_part(batch, parallel_state.get_context_parallel_rank(), config.parallel.context)
    logits = run_model(model, batch)
    return batch["labels"].flatten(), seen[0], logits.flatten(0, 1)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "sequences"])
@pytest.mark.parametrize("tensor", [1, 2])
def test_positions_and_logits_are_those_without_context_parallelism(packed: bool, tensor: int):
    """With two tensor-parallel ranks, the ranks of a context-parallel group are not neighbours in the world."""
    whole = run_ranks(tensor, queries_and_logits, {"tensor": tensor}, packed)
    parts = run_ranks(2 * tensor, queries_and_logits, {"tensor": tensor, "context": 2}, packed)
    for rank, (_, queries, logits) in enumerate(whole):
        mine = parts[rank::tensor]
        assert torch.cat([numbers[numbers > 0] for numbers, *_ in mine]).unique().numel() == len(queries)
        for numbers, part_queries, part_logits in mine:
            true = numbers > 0
            at = numbers[true] - 1
            torch.testing.assert_close(part_queries[true], queries[at], rtol=0, atol=1e-6)
            torch.testing.assert_close(part_logits[true], logits[at], rtol=0, atol=2e-5)


def test_a_batch_in_another_layout_is_refused():
    def refuse():
        model = built(tiny(parallel={"context": 2}))
        whole, rank = whole_batch(packed=False), dist.get_rank()
        contiguous = {name: value[:, 32 * rank : 32 * (rank + 1)] for name, value in whole.items()}
        with pytest.raises(
            ValueError, match=f"token {16 - 16 * rank} of context-parallel rank {rank} of 2 has position"
        ):
            run_model(model, contiguous)
        pack = whole_batch(packed=True)
        as_one_row = context_part({name: pack[name] for name in whole}, rank, 2)
        boundaries = {"cu_seqlens": BOUNDARIES, "cu_seqlens_padded": BOUNDARIES + BOUNDARIES % 2, "max_seqlen": 33}
        with pytest.raises(ValueError, match="not a multiple of 2 x context-parallel size = 4: pad it to"):
            run_model(model, as_one_row | boundaries)

    run_ranks(2, refuse)


def core_attention(attention: LayerAttention = MOBA, context_size: int = 1, **settings) -> MoBACoreAttention:
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        attention_dropout=0.0,
        transformer_impl="local",
        context_parallel_size=context_size,
    )
    return MoBACoreAttention(config, 1, AttnMaskType.causal, "self", attention=attention, **settings)


def qkv(length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)]


def test_the_group_of_a_batch_wins_over_that_of_the_layer():
    def attend():
        from megatron.core import parallel_state

        parallel_state.initialize_model_parallel(context_parallel_size=1)
        numbers = torch.arange(64).view(4, 16)
        mine = numbers[[dist.get_rank(), 3 - dist.get_rank()]].flatten()
        cu_seqlens = torch.tensor([0, 64], dtype=torch.int32)
        alone = PackedSeqParams("thd", cu_seqlens, cu_seqlens)
        together = PackedSeqParams("thd", cu_seqlens, cu_seqlens, cp_group=dist.group.WORLD)
        for attention in (MOBA, FULL):
            core = core_attention(attention)
            expected = core(*qkv(64), None, packed_seq_params=alone)
            found = core(*[tensor[mine] for tensor in qkv(64)], None, packed_seq_params=together)
            torch.testing.assert_close(found, expected[mine])

    run_ranks(2, attend)


def test_a_layer_takes_the_exchange_of_its_kind_in_each_stage():
    def attend():
        from moba_megatron.model import context_parallel as context

        platform.start_model_parallel(tiny(parallel={"context": 2}).parallel)
        real, asked = context.context_attention, []
        context.context_attention = lambda *args, **named: asked.append(named["exchange"]) or real(*args, **named)
        q, k, v = (tensor[:32, None] for tensor in qkv(64))
        for exchange, expected in (
            ({"moba": "dispatch", "full": "p2p"}, ["dispatch", "p2p"]),
            ("dispatch", ["dispatch", "a2a"]),
            ("auto", ["a2a", "a2a"]),
        ):
            core = core_attention(context_size=2, exchange=exchange)
            asked.clear()
            for core.attention in (MOBA, FULL):
                assert core(q, k, v, None).shape == (32, 1, 32)
            assert asked == expected

    run_ranks(2, attend)


def test_the_two_levels_are_megatron_cores_hierarchical_groups():
    def look():
        model = built(
            tiny(
                parallel={"context": 4, "tensor": 2, "exchange": "a2a+p2p", "hierarchical_context": [2, 2]},
                model={"num_query_groups": 4},
            )
        )
        groups = model.decoder.layers[0].self_attention.core_attention.context.cp_groups(None)
        return [dist.get_process_group_ranks(group) for group in (groups.whole, groups.inner, groups.outer)]

    # Tensor-parallel ranks are neighbours, so every second rank is of one context-parallel group.
    assert run_ranks(8, look)[3] == [[1, 3, 5, 7], [1, 3], [3, 7]]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"exchange": "ring"}, "exchange = 'ring': give one of auto, p2p, all_gather"),
        ({"exchange": {"moba": "p2p"}}, "or one each for moba and full"),
        (
            {"backend": "reference", "exchange": "p2p", "context_size": 2},
            "runs under context parallelism with a2a only",
        ),
        ({"context_size": 2}, "context_parallel_size = 2, but the context-parallel group has no ranks"),
    ],
)
def test_what_cannot_run_is_refused_when_the_layer_is_built(settings, expected):
    with pytest.raises(ValueError, match=expected):
        core_attention(**settings)


def test_rotary_tables_are_longer_than_the_pack_and_few():
    lengths = range(1, 5000)
    assert all(n < table_length(n) <= max(n + 1, n * 9 / 8) for n in lengths)
    assert len({table_length(n) for n in range(4096, 8192)}) == 8

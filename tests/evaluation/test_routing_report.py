"""The routing report's numbers, compared with their definitions on small inputs, and the capture that feeds them."""

from __future__ import annotations

import math
import re
from io import StringIO

import pytest
import torch
from rich.console import Console

from moba_megatron.evaluation.report.pictures import routing_pictures
from moba_megatron.evaluation.routing.budgets import smallest_blocks
from moba_megatron.evaluation.routing.capture import Captured
from moba_megatron.evaluation.routing.evaluate_routing import LayerRouting, choices_of, counted_tokens
from moba_megatron.evaluation.routing.held_curve import held_curve, queries_joined
from moba_megatron.evaluation.routing.mass import RoutingChoice, attention_masses
from moba_megatron.evaluation.routing.routing_report import advice, layer_record, overall, table
from moba_megatron.evaluation.routing.selection_counts import (
    DocumentChoices,
    SelectionCounts,
    count_selection,
    even_choices,
)
from moba_megatron.model.schedule import LayerAttention
from moba_megatron.ops import select_blocks
from moba_megatron.ops.selection import Selection

MIN_MAX = Selection(summary="min_max")
CU_SEQLENS = torch.tensor([0, 37, 41, 100], dtype=torch.int32)


def seen_by(attention, cu_seqlens=CU_SEQLENS, heads=4, groups=2):
    torch.manual_seed(3)
    q, k = torch.randn(100, heads, 8), torch.randn(100, groups, 8)
    return Captured(1, attention, q, k, cu_seqlens, 8**-0.5)


def masses_by_definition(seen, query, block_size, top_k):
    """(held, best, nearest) of each head for one query, from its whole softmax."""
    bounds = CU_SEQLENS.tolist()
    first = max(b for b in bounds if b <= query)
    ids = select_blocks(seen.q, seen.k, seen.cu_seqlens, block_size=block_size, top_k=top_k)[query]
    results = []
    for head in range(4):
        keys = seen.k[first : query + 1, head // 2]
        probabilities = ((keys @ seen.q[query, head]) * seen.softmax_scale).softmax(dim=0)
        blocks = [float(part.sum()) for part in probabilities.split(block_size)]
        own = len(blocks) - 1
        held = sum(blocks[i] for i in ids[head].tolist() if i >= 0)
        best = blocks[own] + sum(sorted(blocks[:own], reverse=True)[: top_k - 1])
        results.append((held, best, sum(blocks[max(0, own - top_k + 1) :])))
    return results


@pytest.mark.parametrize("most", [2**25, 500])
def test_masses_are_those_of_the_whole_softmax(monkeypatch, most):
    """Also where only a few queries fit into memory at once; over several documents, with grouped heads."""
    monkeypatch.setattr("moba_megatron.evaluation.routing.mass.MOST_PROBABILITIES", most)
    seen = seen_by(LayerAttention("moba", 8, 3))
    queries = torch.tensor([30, 36, 40, 70, 71, 99])
    choices = [RoutingChoice(8, 3), RoutingChoice(4, 6), RoutingChoice(16, 2)]
    for choice, mass in zip(choices, attention_masses(seen, queries, choices), strict=True):
        for row, query in enumerate(queries.tolist()):
            expected = torch.tensor(masses_by_definition(seen, query, choice.block_size, choice.top_k))
            found = torch.stack([mass.held[row], mass.best[row], mass.nearest[row]], dim=1)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_key_heads_with_a_k_of_their_own_hold_what_each_would_hold():
    seen = seen_by(LayerAttention.moba(8, [2, 4]))
    queries = torch.tensor([70, 99])
    (both,) = attention_masses(seen, queries, choices_of(seen.attention)[:1])
    alone = attention_masses(seen, queries, [RoutingChoice(8, 2), RoutingChoice(8, 4)])
    for name in ("held", "best", "nearest"):
        parts = [getattr(mass, name)[:, heads] for mass, heads in zip(alone, (slice(2), slice(2, 4)), strict=True)]
        torch.testing.assert_close(getattr(both, name), torch.cat(parts, dim=1))
    assert [str(choice) for choice in choices_of(LayerAttention.moba(32, [4, 6]))] == [
        "B=32 K=4,6", "B=16 K=8,12", "B=64 K=2,3", "B=32 K=8,12",
    ]  # fmt: skip


@pytest.mark.parametrize("attention", [LayerAttention("moba", 8, 3), LayerAttention.moba(8, [1, 3], MIN_MAX)])
def test_the_curve_is_what_each_k_would_hold(attention):
    """By the masses of that many blocks; and the smallest K of each key head is the first that holds enough."""
    seen, queries = seen_by(attention), torch.tensor([25, 36, 66, 99])
    curve = held_curve(seen, queries)
    past = torch.tensor([3, 4, 3, 7])
    assert curve.queries.tolist() == [int((past > at).sum()) for at in range(7)]
    selection = attention.selection.with_one_budget
    for at in range(7):
        (mass,) = attention_masses(seen, queries[past > at], [RoutingChoice(8, at + 1, selection)])
        torch.testing.assert_close(curve.held[:, at].float(), mass.held.sum(dim=0), rtol=1e-4, atol=1e-5)
    means = (curve.held / curve.queries).unflatten(0, (2, 2)).mean(dim=1)
    for share in (0.3, 0.7, 0.9):
        found = smallest_blocks(curve, 2, share)
        for row, k in zip(means, found, strict=True):
            assert (row[: k - 1] < share).all() and (k > 7 or row[k - 1] >= share)
    assert smallest_blocks(curve, 2, 1.0) == [8, 8]
    twice = queries_joined([curve, held_curve(seen, queries[:2])])
    torch.testing.assert_close(twice.queries, curve.queries + torch.tensor([2.0, 2, 2, 1, 0, 0, 0]).double())


def test_enough_blocks_hold_everything_and_a_window_is_the_nearest():
    queries = torch.tensor([33, 99])
    seen = seen_by(LayerAttention("moba", 8, 3))
    everything, window = attention_masses(
        seen, queries, [RoutingChoice(8, 8), RoutingChoice(8, 3, Selection("recent"))]
    )
    torch.testing.assert_close(everything.held, torch.ones(2, 4))
    torch.testing.assert_close(window.held, window.nearest)
    assert (window.held < window.best).any()


def test_counts_of_a_window_are_known():
    """`recent` with K = 3: distances 1 and 2, always."""
    counts = SelectionCounts()
    seen = seen_by(LayerAttention("moba", 8, 3, Selection("recent")))
    queries = count_selection(seen, torch.ones(100, dtype=torch.bool), counts)
    # Documents of 37, 4 and 59 tokens: queries from block 3 on have a choice.
    assert queries.tolist() == [*range(24, 37), *range(41 + 24, 100)]
    assert (counts.queries, counts.with_choice) == (100, 48)
    shares = counts.distance_shares()
    assert shares.shape == (4, 7)
    assert shares[:, :2].eq(1).all() and shares[:, 2:].eq(0).all()
    # Blocks 1 to 6 of 0 to 6 in the long document, 1 to 3 of 0 to 3 in the first.
    coverage = (6 / 7 * 70 + 3 / 4 * 26) / 96
    torch.testing.assert_close(counts.coverage(), torch.full((4,), coverage, dtype=torch.float64))


def test_counts_agree_with_the_selected_ids_over_two_batches():
    attention = LayerAttention("moba", 8, 3)
    seen, counts = seen_by(attention), SelectionCounts()
    for _ in range(2):
        queries = count_selection(seen, torch.ones(100, dtype=torch.bool), counts)
    ids = select_blocks(seen.q, seen.k, seen.cu_seqlens, block_size=8, top_k=3)
    chosen = torch.zeros(4, 7)
    offered = torch.zeros(7)
    first = {**dict.fromkeys(range(37), 0), **dict.fromkeys(range(41, 100), 41)}
    for query in queries.tolist():
        own = (query - first[query]) // 8
        offered[:own] += 1
        for head in range(4):
            for block in ids[query, head, 1:].tolist():
                chosen[head, own - block - 1] += 1
    torch.testing.assert_close(counts.chosen_at.float(), 2 * chosen)
    torch.testing.assert_close(counts.offered_at.float(), 2 * offered)
    assert len(counts.documents) == 4 and counts.documents[0].chosen.sum(dim=1).eq(2 * 13).all()
    assert (counts.entropy() > 0).all()


def test_one_block_for_all_has_no_entropy():
    chosen = torch.tensor([[6.0, 0, 0], [2, 2, 2]], dtype=torch.float64)
    counts = SelectionCounts(documents=[DocumentChoices(chosen, torch.ones(3, dtype=torch.float64))])
    counts.chosen_at = torch.zeros(2, 3, dtype=torch.float64)
    assert counts.entropy().tolist() == pytest.approx([0, 1])
    assert counts.coverage().tolist() == pytest.approx([1 / 3, 1])
    assert counts.hottest_load().tolist() == pytest.approx([3, 1])
    assert math.isnan(float(SelectionCounts().entropy()[0]))


@pytest.mark.parametrize(("blocks", "top_k"), [(16, 4), (64, 8)])
def test_a_router_that_chooses_at_random_is_even(blocks, top_k):
    """Early blocks are offered to more queries, which is not the router's doing."""
    torch.manual_seed(0)
    own = torch.arange(top_k, blocks).repeat_interleave(200)
    offered = torch.arange(blocks) < own[:, None]
    chosen = torch.rand(len(own), blocks).masked_fill(~offered, -1).topk(top_k - 1).indices
    counts = torch.bincount(chosen.flatten(), minlength=blocks)[None, : blocks - 1].double()
    even = even_choices(own, top_k)
    assert float(even.sum()) == pytest.approx(len(own) * (top_k - 1))
    found = SelectionCounts(documents=[DocumentChoices(counts, even)])
    assert float(found.entropy()) == pytest.approx(1, abs=0.01)
    assert float(found.hottest_load()) == pytest.approx(1, abs=0.1)
    # A router that sends every second choice to the first block stands out.
    found.documents[0].chosen = counts / 2
    found.documents[0].chosen[0, 0] += counts.sum() / 2
    assert float(found.hottest_load()) > 3 and float(found.entropy()) < 0.9


def test_padding_and_unread_ends_do_not_count():
    from megatron.core.packed_seq_params import PackedSeqParams

    mask = torch.tensor([[0.0, 1, 0, 1, 0, 1, 0, 0]])
    ends = torch.tensor([0, 3, 6, 8], dtype=torch.int32)
    batch = {"loss_mask": mask, "packed_seq_params": PackedSeqParams(cu_seqlens_q=ends, cu_seqlens_kv=ends)}
    assert counted_tokens(batch).tolist() == [True, True, False, True, True, True, False, False]
    batch["packed_seq_params"] = None
    assert counted_tokens(batch).tolist() == [True] * 6 + [False] * 2


def observed(attention, choices=None):
    layer = LayerRouting(1, attention, choices or choices_of(attention))
    seen = seen_by(attention)
    queries = count_selection(seen, torch.ones(100, dtype=torch.bool), layer.counts)
    layer.masses.append(attention_masses(seen, queries, layer.choices))
    return layer_record(layer)


def test_layers_without_a_choice_are_shown_as_such():
    """Blocks of 64 in documents of up to 59 tokens: nothing to choose from."""
    attention = LayerAttention("moba", 64, 2)
    idle = LayerRouting(2, attention, choices_of(attention))
    count_selection(seen_by(attention), torch.ones(100, dtype=torch.bool), idle.counts)
    report = [observed(LayerAttention("moba", 16, 2)), layer_record(idle)]
    assert overall(report) == overall(report[:1])
    assert routing_pictures(report[1:]) == [] and len(routing_pictures(report)) == 1
    console = Console(width=120, file=StringIO())
    console.print(table(report))
    assert re.search(r"2 +(- +){7}0\.0%", console.file.getvalue())
    assert advice(report)[-1].startswith("layer 2 (moba B=64 K=2): no query has more past blocks")


def test_what_a_choice_is_compared_with():
    assert [str(c) for c in choices_of(LayerAttention("moba", 32, 3))] == ["B=32 K=3", "B=16 K=6", "B=32 K=6"]
    assert [(c.block_size, c.top_k) for c in choices_of(LayerAttention("moba", 512, 4))] == [
        *[(512, 4), (128, 16), (256, 8), (1024, 2), (512, 8)]
    ]


def test_the_report_says_what_to_do():
    report = [observed(LayerAttention("moba", 16, 2)), observed(LayerAttention("moba", 16, 2))]
    report[1]["layer"] = 2
    lines = advice(report)
    assert lines[0].startswith("layers 1, 2 (B=16 K=2): the chosen blocks hold")
    assert lines[-1].endswith("try a larger K.")
    record = report[0]["choices"][0]
    assert overall(report)["mass_held"] == pytest.approx(sum(record["held"]) / 4)
    assert overall(report)["mass_held_lowest"] == min(record["held"])
    window = observed(LayerAttention("moba", 16, 2, Selection("recent")))
    assert any("sliding window" in line for line in advice([window]))

"""Losses by position: the arithmetic, and a model against its own logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from distributed import run_ranks
from small_run import small_config

from moba_megatron.data.batches import context_part, packed_seq_params
from moba_megatron.evaluation.losses.positions import evaluate, position_sums, summarise
from moba_megatron.evaluation.losses.power_law import fit_power_law


def test_sums_go_to_the_position_in_the_document():
    losses = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0]])
    batch = {
        "loss_mask": torch.tensor([[1.0, 1.0, 0.0, 1.0, 1.0]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1]]),
    }
    total, count, records = position_sums(losses, batch, length=4)
    assert (float(total), int(count)) == (27.0, 4)
    assert records["sums"][:2].tolist() == [[9.0, 18.0, 0.0, 0.0], [2.0, 2.0, 0.0, 0.0]]


def test_padding_beyond_the_window_counts_nowhere():
    batch = {"loss_mask": torch.tensor([[1.0, 1.0, 0.0, 0.0]]), "position_ids": torch.tensor([[2, 3, 4, 5]])}
    total, count, records = position_sums(torch.ones(1, 4), batch, length=4)
    assert (float(total), int(count)) == (2.0, 2)
    assert records["sums"][:2].tolist() == [[0.0, 0.0, 1.0, 1.0]] * 2


def _documents(lengths, window):
    """A pack of documents in rows of `window` tokens, the end of the last row padded; each ends in a token without a
    label. The loss of a token is the number of its document."""
    total = -(-sum(lengths) // window) * window
    bounds = torch.tensor([0, *np.cumsum(lengths), *([total] if sum(lengths) < total else [])], dtype=torch.int32)
    number = torch.repeat_interleave(torch.arange(len(bounds) - 1), bounds.diff())
    mask = torch.ones(total)
    mask[bounds[1:].long() - 1] = 0
    mask[sum(lengths) :] = 0
    batch = {"tokens": number, "labels": number, "loss_mask": mask}
    batch["position_ids"] = torch.arange(total) - bounds[:-1][number]
    return {**{name: value[None] for name, value in batch.items()}, "cu_seqlens": bounds, "max_seqlen": window}


@pytest.mark.parametrize("context_size", [1, 2])
def test_trailing_loss_is_of_documents_that_fill_the_window(context_size):
    """Documents of 16, 15 and 16 tokens in rows of 16; a short row of 9 and padding. In parts, too, as context-parallel
    ranks have them."""
    whole = _documents([16, 15, 16, 1, 9], 16)
    # A document whose end is not a target fills the window none the less.
    whole["loss_mask"][0, 12:16] = 0
    sums = 0
    for rank in range(context_size):
        part = context_part(whole, rank, context_size) if context_size > 1 else whole
        batch = {**part, "packed_seq_params": packed_seq_params(part)}
        sums = sums + position_sums(part["tokens"].float() + 1, batch, length=16)[2]["sums"]
    # At 8 to 15: four targets of the first document (loss 1), none of the second (2), seven of the third (3).
    assert summarise(sums, 8, 2).trailing_loss == pytest.approx((4 * 1 + 7 * 3) / 11)
    assert sums[1, 8:].sum() == 4 + 6 + 7


@pytest.mark.parametrize(("padded_rows", "expected"), [(True, 1.0), (False, 4 / 3)])
def test_a_row_that_ends_in_padding_has_no_trailing_loss(padded_rows, expected):
    mask = torch.ones(2, 8)
    mask[0, 7] = mask[1, 6:] = 0
    batch = {"loss_mask": mask, "position_ids": torch.arange(8).expand(2, 8)}
    losses = torch.tensor([[1.0] * 8, [2.0] * 8])
    sums = position_sums(losses, batch, 8, padded_rows)[2]["sums"]
    assert summarise(sums, 3, 1).trailing_loss == pytest.approx(expected)


def test_means_over_all_over_the_trailing_positions_and_by_range():
    sums = torch.tensor([[4.0, 6.0, 3.0, 0.0], [2.0, 2.0, 1.0, 0.0]] * 2, dtype=torch.float64)
    result = summarise(sums, trailing_tokens=2, buckets=2)
    assert (result.loss, result.trailing_loss, result.evaluated_tokens) == (13 / 5, 3.0, 5)
    assert [(r.start, r.end, r.tokens, r.loss) for r in result.by_position] == [(0, 2, 4, 2.5), (2, 4, 1, 3.0)]
    assert summarise(sums, trailing_tokens=1, buckets=1).trailing_loss is None
    with pytest.raises(ValueError, match="no token"):
        summarise(torch.zeros(4, 4), 1, 1)


def test_ranges_that_double_hold_every_token_once():
    sums = torch.stack([torch.arange(100.0), torch.ones(100)] * 2).double()
    ranges = summarise(sums, 4, 2).by_position_log
    assert [(r.start, r.end, r.loss) for r in ranges] == [(0, 16, 7.5), (16, 32, 23.5), (32, 64, 47.5), (64, 100, 81.5)]
    assert sum(r.tokens for r in ranges) == 100


def test_a_power_law_is_found_again_beside_a_point_far_off():
    positions = [2.0**power for power in range(12)]
    losses = [2 * p**-0.4 + 1.5 for p in positions]
    tokens = [100] * 12
    exact = fit_power_law(positions, losses, tokens)
    assert (exact.a, exact.b, exact.c) == pytest.approx((2, -0.4, 1.5), rel=1e-3) and exact.error < 1e-3
    losses[6] += 3
    robust = fit_power_law(positions, losses, tokens)
    assert float(robust.at(np.array(2.0**11))) == pytest.approx(2 * 2**-4.4 + 1.5, abs=0.15)
    tokens[6] = 1
    weighted = fit_power_law(positions, losses, tokens)
    assert (weighted.b, weighted.c) == pytest.approx((-0.4, 1.5), rel=0.05)


def test_no_law_where_nothing_falls_or_too_little_is_known():
    positions = [1.0, 2, 4, 8, 16, 32]
    assert fit_power_law(positions, [3.0, 3.1, 3.2, 3.3, 3.4, 3.5], [10] * 6) is None
    assert fit_power_law(positions[:4], [5.0, 4, 3, 2], [10] * 4) is None


def _evaluate_twice(config):
    """An evaluation, one over the same samples in other microbatches, and the losses computed from the logits."""
    from moba_megatron.data.datasets import build_datasets, check_data
    from moba_megatron.data.feed import rank_batches
    from moba_megatron.model.builder import build_model
    from moba_megatron.model.schedule import AttentionSchedule
    from moba_megatron.platform.start import start_rank

    device = start_rank(config.parallel, seed=1, threads=1)
    summary = check_data(config)
    schedule = AttentionSchedule.from_config(config.attention, config.model.num_layers)
    model = build_model(config, summary.vocab_size, schedule)
    _, validation = build_datasets(config)

    def feed(size):
        training = config.training.model_copy(update={"micro_batch_size": size})
        changed = config.model_copy(update={"training": training})
        samples = {"consumed_samples": 0, "num_samples": config.evaluation.samples}
        stream = rank_batches(validation, changed, eod_id=summary.eod_id, **samples, device=device)
        return changed, stream

    results = []
    for size in (1, 3):
        changed, stream = feed(size)
        results.append(evaluate(model, [stream], changed, -(-config.evaluation.samples // size)))
    assert model[0].training, "evaluation leaves the mode as it was"
    total = count = 0.0
    for batch in feed(1)[1]:
        with torch.no_grad():
            logits = model[0](
                batch["tokens"], batch["position_ids"], None, packed_seq_params=batch["packed_seq_params"]
            )
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
        total += float((losses * batch["loss_mask"].flatten()).sum())
        count += float(batch["loss_mask"].sum())
    return [result.to_dict() for result in results], total / count, count


@pytest.mark.parametrize("cross", [False, True])
def test_an_evaluation_is_the_loss_of_the_logits_in_any_microbatches(tmp_path, cross):
    config = small_config(tmp_path, data__cross_document_attention=cross, evaluation__position_buckets=4)
    [(results, expected, count)] = run_ranks(1, _evaluate_twice, config)
    one, three = results
    assert (
        one["loss"] == pytest.approx(expected, rel=1e-5)
        and one["evaluated_tokens"] == three["evaluated_tokens"] == count
    )
    assert three["loss"] == pytest.approx(one["loss"], rel=1e-6)
    assert sum(r["tokens"] for r in one["by_position"]) == count

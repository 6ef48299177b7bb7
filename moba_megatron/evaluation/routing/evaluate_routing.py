"""`moba-megatron evaluate --routing`: the blocks that MoBA layers choose on real text, and how much of full attention
they hold. Use it to see whether block size and top-k are right.

The model runs over validation samples as in training. The report reads the queries and keys of each MoBA layer while
the layer runs. It keeps only counts, which grow with the number of documents, and the masses of 256 queries a sample:
some kilobytes for each layer, head and sample. Each rank reads its own layers, heads and samples, and rank 0 joins
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

import torch
from megatron.core import parallel_state
from rich.console import Console
from torch import Tensor

from moba_megatron.evaluation.attention_choice import as_file_name, index_chooses, words_of
from moba_megatron.evaluation.progress import shown
from moba_megatron.evaluation.routing.budgets import SuggestedBudgets, held_curve, suggested
from moba_megatron.evaluation.routing.capture import Captured, capture_attention
from moba_megatron.evaluation.routing.mass import Mass, RoutingChoice, attention_masses
from moba_megatron.evaluation.routing.parts import Part, gathered, merged
from moba_megatron.evaluation.routing.plots import plot_layer
from moba_megatron.evaluation.routing.routing_report import LayerRouting, advice, layer_record, overall, routed, table
from moba_megatron.evaluation.routing.selection_counts import count_selection
from moba_megatron.evaluation.routing.shards import Shards
from moba_megatron.evaluation.subject import Attention, Subject
from moba_megatron.model.forward import Batch, forward_only, microbatch_shape, token_sums
from moba_megatron.model.schedule import LayerAttention
from moba_megatron.ops.selection import Selection
from moba_megatron.runs.records import EvaluationRecords

# Queries of a layer and sample whose full attention is computed.
SAMPLED_QUERIES = 256
SMALLEST_BLOCK = 16


def evaluate_routing(
    subject: Subject,
    records: EvaluationRecords,
    console: Console,
    samples: int,
    choice: LayerAttention | None = None,
    budget: float | None = None,
) -> None:
    """The routing report: a table, sentences on what to do, a record, a picture a layer. Collective; the rank whose
    records are written shows it.

    Args:
        samples: of the validation data, the first ones.
        choice: look at this one in place of the layers' own; also for a model that attends fully, to see what MoBA
            would hold of its attention.
        budget: the share of the mass for which the K of each key head is suggested; None: no suggestion.

    Raises:
        ValueError: a model without MoBA layers and no `choice`, or samples in which no query has a choice.
    """
    attention = "moba" if "moba" in subject.attentions else "full"
    layers = observe_routing(subject, attention, samples, console, choice, curves=budget is not None)
    if not records.writes:
        return
    report = [layer_record(layer) for layer in layers]
    values = {"data": subject.config.data.validation, "samples": samples, **overall(report)}
    words = [*([subject.other_length] if subject.other_length else []), *([words_of(choice)] if choice else [])]
    if words:
        # Says that these are not the layers' own sizes, or not the run's own length.
        values["choice"] = " ".join(words)
    values["advice"] = advice(report)
    console.print(f"{subject.folder}, step {subject.step}: routing on {samples} samples of validation data")
    if choice is not None and subject.indexed_layers:
        by_index = attention == "moba" and index_chooses(choice.selection, subject.config.attention.share_selection)
        values["chosen"] = (
            "by the index" if by_index else "by own keys" if choice.selection.uses_scores else "by position"
        )
        console.print(f"{choice}: chosen {values['chosen']}")
    console.print(table(report))
    for line in values["advice"]:
        console.print(line)
    own = {"step": subject.step, "tokens": subject.tokens, "attention": attention}
    summary = {key: value for key, value in values.items() if key != "advice"}
    name = f"routing_step_{subject.step}_{attention}"
    if words:
        name += f"_{as_file_name(values['choice'])}"
    path = records.write("routing", **own, values={**values, "layers": report}, summary=summary, name=name)
    console.print(f"  {path}")
    if budget is not None:
        found = suggested(layers, budget, subject.config, choice)
        _show_budgets(found, console, path)
    for record in routed(report):
        picture = subject.folder.plots / f"{name}_layer_{record['layer']}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        console.print(f"  {plot_layer(record, picture)}")


def _show_budgets(found: SuggestedBudgets, console: Console, report: Path) -> None:
    """Print the suggestion and write it beside the report."""
    text = found.as_yaml(report.name)
    path = report.with_name(f"{report.stem}_budget_{found.share:g}.yaml")
    path.write_text(text, encoding="utf-8")
    console.print(text.rstrip(), markup=False)
    console.print(f"  {path}")


def observe_routing(
    subject: Subject,
    attention: Attention,
    samples: int,
    console: Console,
    choice: LayerAttention | None = None,
    *,
    curves: bool = False,
) -> list[LayerRouting]:
    """Run the model over samples and look at its MoBA layers, under full attention at all layers; first layer first.
    One of them at least has queries with a choice. Collective; rank 0 gets the layers, the others none."""
    if attention == "full" and choice is None:
        raise ValueError(
            "--routing: full attention chooses no blocks. Give --routing-choice B:K to compare MoBA with it, or use a "
            "model with MoBA layers"
        )
    subject.attend(attention)
    model, at_once = subject.opened.model, subject.data_parallel
    watch = _Watch(attention, choice, curves)
    batches = shown(subject.batches(samples), samples, "routing", console, at_once)
    taken = watch.taken(batches, parallel_state.get_data_parallel_rank(), at_once, samples)
    with capture_attention(model, watch.see):
        # With labels: without them the last stage would make logits of the whole sequence.
        shape = microbatch_shape(subject.config.data, subject.config.training.micro_batch_size)
        forward_only(model, [taken], -(-samples // at_once), shape, token_sums)
    layers = merged(gathered(watch.parts))
    routed_at_all = [any(layer.masses for layer in layers)]
    torch.distributed.broadcast_object_list(routed_at_all, src=0)
    if not routed_at_all[0]:
        raise ValueError(
            f"--routing: no query of these {samples} samples has more past blocks than it may choose: nothing is "
            "routed. Take more samples (--routing-samples), longer documents (--validation), or smaller blocks"
        )
    return layers


class _Watch:
    """Looks at the layers of this rank while the model runs over one sample after the other.

    Args:
        attention: of the layers to look at.
        choice: in place of theirs.
        curves: whether to keep what any number of blocks would hold.
    """

    def __init__(self, attention: Attention, choice: LayerAttention | None, curves: bool = False):
        self.attention, self.choice, self.curves = attention, choice, curves
        self.parts: list[Part] = []
        self._sample: int | None = None
        self._counted = torch.empty(0)
        self._shards: Shards | None = None

    def taken(self, batches: Iterator[Batch], rank: int, ranks: int, samples: int) -> Iterator[Batch]:
        """The batches, each remembered before the model gets it. One that fills up the last pass is not looked at."""
        for number, batch in enumerate(batches):
            sample = number * ranks + rank
            self._sample = sample if sample < samples else None
            self._shards = Shards(batch) if parallel_state.get_context_parallel_world_size() > 1 else None
            self._counted = counted_tokens(self._shards.whole_batch(batch) if self._shards else batch)
            yield batch

    def see(self, seen: Captured) -> None:
        """Look at one layer."""
        if self._sample is None or seen.attention.kind != self.attention:
            return
        whole = self.choice or seen.whole or seen.attention
        heads = self._shards.heads_of(seen, whole.selection.shared) if self._shards else seen
        if heads is None:
            return
        by = "own" if heads.chooser(whole.selection) is None else "index"
        layer = LayerRouting(seen.layer, whole, choices_of(whole, by))
        _look(layer, replace(heads, attention=self.choice or heads.attention), self._counted, by, self.curves)
        self.parts.append(Part(self._sample, heads.first_head, layer))


def choices_of(
    attention: LayerAttention, by: Literal["own", "index"] = "own", whole: LayerAttention | None = None
) -> list[RoutingChoice]:
    """What a layer's choice is compared with: itself first, then finer and coarser blocks of equal cost (block size
    times top-k), then twice as many blocks. The choice of an index is also compared with those of the attention's own
    queries and keys, by their means and by bounds on them.

    Args:
        whole: how all heads of the layer attend, where `attention` is that of some of them; it says which there are.

    >>> [str(choice) for choice in choices_of(LayerAttention("moba", 128, 4))]
    ['B=128 K=4', 'B=32 K=16', 'B=64 K=8', 'B=256 K=2', 'B=128 K=8']
    >>> [str(choice) for choice in choices_of(LayerAttention("moba", 128, 4), "index")[-3:]]
    ['B=128 K=8 by the index', 'B=128 K=4', 'B=128 K=4 top_k of min_max']
    """
    block_size, alike = attention.block_size, attention.selection.with_one_budget
    # Blocks of another size, and how many times as many of them.
    factors = [(block_size, Fraction(1))]
    factors += [
        (block_size // n, Fraction(n)) for n in (4, 2) if block_size % n == 0 and block_size // n >= SMALLEST_BLOCK
    ]
    of_all = _numbers(whole or attention)
    if min(of_all) >= 4 and all(number % 2 == 0 for number in of_all):
        factors.append((block_size * 2, Fraction(1, 2)))
    factors.append((block_size, Fraction(2)))
    numbers = _numbers(attention)
    own = [
        RoutingChoice(block_size, *Selection(summary=summary).with_blocks(numbers)) for summary in ("mean", "min_max")
    ]
    choices = [
        RoutingChoice(block, *alike.with_blocks([int(number * factor) for number in numbers]), by)
        for block, factor in factors
    ]
    return choices + (own if by == "index" else [])


def _numbers(attention: LayerAttention) -> tuple[int, ...]:
    """K of each key head, or of all."""
    return attention.selection.budgets or (attention.top_k,)


def counted_tokens(batch: Batch) -> Tensor:
    """bool [T]: tokens that are no padding, i.e. not behind the last prediction of their document that counts."""
    mask = batch["loss_mask"].flatten() > 0
    tokens = torch.arange(mask.numel(), device=mask.device)
    if batch["packed_seq_params"] is None:
        return tokens <= torch.where(mask, tokens, -1).max()
    ends = batch["packed_seq_params"].cu_seqlens_q[1:]
    document = torch.searchsorted(ends, tokens, right=True)
    last = torch.full((ends.numel(),), -1, device=mask.device)
    last.scatter_reduce_(0, document, torch.where(mask, tokens, -1), "amax")
    return tokens <= last[document]


def _look(layer: LayerRouting, seen: Captured, counted: Tensor, by: Literal["own", "index"], curves: bool) -> None:
    queries = count_selection(seen, counted, layer.counts, layer.attention.top_k)
    if not len(queries):
        return
    places = torch.linspace(0, len(queries) - 1, min(SAMPLED_QUERIES, len(queries)), device=queries.device)
    sampled = queries[places.round().long()]
    masses = attention_masses(seen, sampled, choices_of(seen.attention, by, layer.attention))
    layer.masses.append([Mass(mass.held.cpu(), mass.best.cpu(), mass.nearest.cpu()) for mass in masses])
    if curves:
        layer.curves.append(held_curve(seen, sampled))

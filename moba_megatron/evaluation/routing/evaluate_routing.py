"""`moba-megatron evaluate --routing`: what the MoBA layers choose on real text, and how much of full attention that
holds; the way to see whether block size and top-k are right.

The model runs over validation samples as it was trained. Each MoBA layer is looked at when its queries and keys are at
hand. Of them only counts, which grow with the number of documents, and the masses of 256 queries a sample are kept:
some kilobytes for each layer, head and sample.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from rich.console import Console
from torch import Tensor

from moba_megatron.evaluation.attention_choice import as_file_name, words_of
from moba_megatron.evaluation.progress import shown
from moba_megatron.evaluation.routing.capture import Captured, capture_attention
from moba_megatron.evaluation.routing.mass import RoutingChoice, attention_masses
from moba_megatron.evaluation.routing.plots import plot_layer
from moba_megatron.evaluation.routing.routing_report import LayerRouting, advice, layer_record, overall, routed, table
from moba_megatron.evaluation.routing.selection_counts import count_selection
from moba_megatron.evaluation.subject import Attention, Subject
from moba_megatron.model.forward import Batch
from moba_megatron.model.schedule import LayerAttention
from moba_megatron.runs.records import EvaluationRecords

# Queries of a layer and sample whose full attention is computed.
SAMPLED_QUERIES = 256
SMALLEST_BLOCK = 16


def evaluate_routing(
    subject: Subject, records: EvaluationRecords, console: Console, samples: int, choice: LayerAttention | None = None
) -> None:
    """The routing report: a table, sentences on what to do, a record, a picture a layer.

    Args:
        samples: of the validation data, the first ones.
        choice: look at this one in place of the layers' own; also for a model that attends fully, to see what MoBA
            would hold of its attention.

    Raises:
        ValueError: a model without MoBA layers and no `choice`, or samples in which no query has a choice.
    """
    attention = "moba" if "moba" in subject.attentions else "full"
    layers = observe_routing(subject, attention, samples, console, choice)
    report = [layer_record(layer) for layer in layers]
    values = {"data": subject.config.data.validation, "samples": samples, **overall(report)}
    words = [*([subject.other_length] if subject.other_length else []), *([words_of(choice)] if choice else [])]
    if words:
        # Says that these are not the layers' own sizes, or not the run's own length.
        values["choice"] = " ".join(words)
    values["advice"] = advice(report)
    console.print(f"{subject.folder}, step {subject.step}: routing on {samples} samples of validation data")
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
    for record in routed(report):
        picture = subject.folder.plots / f"{name}_layer_{record['layer']}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        console.print(f"  {plot_layer(record, picture)}")


def observe_routing(
    subject: Subject, attention: Attention, samples: int, console: Console, choice: LayerAttention | None = None
) -> list[LayerRouting]:
    """Run the model over samples and look at its MoBA layers, under full attention at all layers; first layer first.
    One of them at least has queries with a choice."""
    if attention == "full" and choice is None:
        raise ValueError(
            "--routing: under full attention nothing is chosen. Say with --routing-choice B:K what MoBA shall be held "
            "against it, or take a model with MoBA layers"
        )
    subject.attend(attention)
    found: dict[int, LayerRouting] = {}
    for batch in shown(subject.batches(samples), samples, "routing", console):
        counted = counted_tokens(batch)

        def see(seen: Captured, counted: Tensor = counted) -> None:
            if seen.attention.kind == attention:
                seen = replace(seen, attention=choice or seen.attention)
                new = LayerRouting(seen.layer, seen.attention, choices_of(seen.attention))
                _look(found.setdefault(seen.layer, new), seen, counted)

        with torch.no_grad(), capture_attention(subject.opened.model, see):
            # Without labels the last stage would make logits of the whole sequence.
            subject.opened.model[0](
                batch["tokens"],
                batch["position_ids"],
                None,
                labels=batch["labels"],
                packed_seq_params=batch["packed_seq_params"],
            )
    layers = [found[number] for number in sorted(found)]
    if not any(layer.masses for layer in layers):
        raise ValueError(
            f"--routing: no query of these {samples} samples has more past blocks than it may choose: nothing is "
            "routed. Take more samples (--routing-samples), longer documents (--validation), or smaller blocks"
        )
    return layers


def choices_of(attention: LayerAttention) -> list[RoutingChoice]:
    """What a layer's choice is compared with: itself first, then finer and coarser blocks of equal cost (block size
    times top-k), then twice as many blocks.

    >>> [str(choice) for choice in choices_of(LayerAttention("moba", 128, 4))]
    ['B=128 K=4', 'B=32 K=16', 'B=64 K=8', 'B=256 K=2', 'B=128 K=8']
    """
    block_size, top_k, selection = attention.block_size, attention.top_k, attention.selection
    pairs = [(block_size // factor, top_k * factor) for factor in (4, 2) if block_size % factor == 0]
    pairs = [(block, number) for block, number in pairs if block >= SMALLEST_BLOCK]
    if top_k >= 4 and top_k % 2 == 0:
        pairs.append((block_size * 2, top_k // 2))
    pairs.append((block_size, top_k * 2))
    return [RoutingChoice(block, number, selection) for block, number in [(block_size, top_k), *pairs]]


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


def _look(layer: LayerRouting, seen: Captured, counted: Tensor) -> None:
    queries = count_selection(seen, counted, layer.counts)
    if not len(queries):
        return
    places = torch.linspace(0, len(queries) - 1, min(SAMPLED_QUERIES, len(queries)), device=queries.device)
    sampled = queries[places.round().long()]
    layer.masses.append(attention_masses(seen, sampled, layer.choices))

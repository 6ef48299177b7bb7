"""Suggested layouts against a count by hand: Llama 3.1 70B in sequences of 8,192 tokens on 64 H100.

The count shares nothing with the planner but the data sheet and the three shares that a plan assumes. It goes by the
textbook: 6 bytes a parameter for weights and gradients, 12 for the optimizer, split over all ranks; two operations a
parameter, token and pass; four collectives of the hidden state in each pass of a layer under tensor parallelism, two
more in the backward pass; and a pipeline that fills once.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import pytest

from moba_megatron.config import load_config
from moba_megatron.model.schedule import AttentionSchedule
from moba_megatron.planning.plan_layouts import Layout, suggest_layouts
from moba_megatron.planning.plan_machines import GPUS, Cluster
from moba_megatron.planning.plan_savings import Saving

LAYERS, HIDDEN, FFN, HEADS, GROUPS, HEAD_SIZE, VOCABULARY = 80, 8192, 28672, 64, 8, 128, 128256
TOKENS, SAMPLES, RANKS, NODE = 8192, 512, 64, 8
LAYER = 2 * HIDDEN**2 + 2 * HIDDEN * GROUPS * HEAD_SIZE + 3 * HIDDEN * FFN
MLP = 3 * HIDDEN * FFN
TABLE = VOCABULARY * HIDDEN  # of the embedding, and of the output layer
# An H100's 80 GB and 989 TFLOP/s in bf16, its links' 450 and 50 GB/s; the shares that a plan counts on.
ROOM, PEAK, NEAR, FAR = 0.9 * 80e9, 0.6 * 989e12, 0.75 * 450e9, 0.75 * 50e9


@dataclass(frozen=True)
class Split:
    tensor: int
    context: int
    pipeline: int

    def memory(self, recompute: str) -> tuple[float, float]:
        """Bytes that the fullest rank takes at least and at most."""
        parameters = LAYERS * LAYER + 2 * TABLE
        average = 6 * parameters / (self.tensor * self.pipeline) + 12 * parameters / RANKS
        fullest = math.ceil(LAYERS / self.pipeline) * LAYER + TABLE * (2 if self.pipeline == 1 else 1)
        static = 6 * fullest / self.tensor + 12 * fullest * self.pipeline / RANKS
        # Two norms with input and output; queries, keys and values before and after rotation, and the output of as many
        # heads; gate, up and product.
        token = 2 * (4 * HIDDEN + 3 * (HEADS + GROUPS) * HEAD_SIZE + 3 * FFN)
        of_layer = TOKENS / (self.tensor * self.context)
        # A stage has as many microbatches in flight as there are stages behind it, itself included.
        kept = LAYERS * of_layer * (token if recompute == "none" else 2 * HIDDEN)
        return average + kept, static + kept + of_layer * 2 * token + 2e9

    def seconds(self, saving: Saving) -> float:
        """Of a step: compute, tensor and context parallelism, and the pipeline's bubble. Layers count as equal also
        where some of a stage are computed again."""
        again = 0.0
        if saving.recompute == "full":
            again = min(1.0, (saving.recompute_layers or LAYERS) * self.pipeline / LAYERS)
        mlp = again + (saving.recompute == ["mlp"]) + (saving.mlp_chunk_size is not None)
        passes = 3 + again
        # Causal attention: two products over half of the pairs, and five in the backward pass.
        attention = (2 + 5 + 2 * again) * TOKENS**2 * HIDDEN
        products = passes * (LAYER - MLP) + (3 + mlp) * MLP
        layer = (2 * products * TOKENS + attention) / (self.tensor * self.context) / PEAK
        layer += (10 + again + mlp) * (self.tensor - 1) / self.tensor * 2 * TOKENS * HIDDEN / self.context / NEAR
        keys = 2 * 2 * TOKENS * GROUPS * HEAD_SIZE / self.tensor
        link = NEAR if self.tensor * self.context <= NODE else FAR
        layer += passes * keys * (self.context - 1) / self.context / link
        loss = 8 * TOKENS * TABLE / (self.tensor * self.context) / PEAK
        # The last stage takes fewer layers because of the loss.
        slowest = LAYERS * layer + loss
        if self.pipeline > 1:
            cuts = range(1, LAYERS - self.pipeline + 2)
            slowest = min(max(math.ceil((LAYERS - k) / (self.pipeline - 1)) * layer, k * layer + loss) for k in cuts)
        microbatches = SAMPLES * self.tensor * self.context * self.pipeline / RANKS
        return microbatches * slowest + (LAYERS * layer + loss - slowest)


SPLITS = [
    Split(tensor, context, pipeline)
    for tensor, context, pipeline in itertools.product((1, 2, 4, 8), *[[1, 2, 4, 8, 16, 32, 64]] * 2)
    if tensor * context * pipeline <= RANKS
]


@pytest.fixture(scope="module")
def suggested() -> dict[Split, Layout]:
    """All suggestions, the fastest first."""
    sizes = {
        "model.num_layers": LAYERS, "model.hidden_size": HIDDEN, "model.ffn_hidden_size": FFN,
        "model.num_attention_heads": HEADS, "model.num_query_groups": GROUPS, "model.vocab_size": VOCABULARY,
        "data.sequence_length": TOKENS, "training.global_batch_size": SAMPLES, "attention.kind": "full",
        "training.loss_chunk_size": 512,
    }  # fmt: skip
    path = Path(__file__).parents[2] / "configs/continued_pretraining/llama3.1_8b/128k.yaml"
    config = load_config(path, [f"{key}={value}" for key, value in sizes.items()])
    assert config.training.micro_batch_size == 1
    schedule = AttentionSchedule.from_config(config.attention, LAYERS)
    layouts = suggest_layouts(config, schedule, VOCABULARY, Cluster(GPUS["h100"], RANKS), limit=1000)
    by_split = {Split(x.parallel.tensor, x.parallel.context, x.parallel.pipeline): x for x in layouts}
    assert len(by_split) == len(layouts)
    return by_split


def test_what_fits_is_suggested_with_the_least_recomputation(suggested):
    decided = 0
    for split in SPLITS:
        layout = suggested.get(split)
        for recompute in ("full", "none"):
            least, most = split.memory(recompute)
            if least > ROOM:
                assert layout is None or (recompute == "none" and layout.saving != Saving()), split
            elif most < ROOM:
                assert layout is not None and (recompute == "full" or layout.saving == Saving()), split
            decided += least > ROOM or most < ROOM
    assert decided > 0.85 * 2 * len(SPLITS)
    assert suggested.keys() <= set(SPLITS)


def test_the_fastest_that_fits_comes_first(suggested):
    """Two tensor-parallel ranks within four context-parallel ones fill a node; eight stages spare the recomputation,
    and one sequence at a time fills them well: 512 microbatches."""
    fits = {split: Saving() for split in SPLITS if split.memory("none")[1] < ROOM}
    fits = {split: Saving("full") for split in SPLITS if split.memory("full")[1] < ROOM} | fits
    best = min(fits, key=lambda split: split.seconds(fits[split]))
    assert next(iter(suggested)) == best == Split(tensor=2, context=4, pipeline=8)


def test_what_the_configuration_computes_again_keeps_no_layout_out():
    path = Path(__file__).parents[2] / "configs/continued_pretraining/llama3.1_8b/1m_moba.yaml"

    def found(*overrides: str) -> list[Layout]:
        config = load_config(path, list(overrides))
        schedule = AttentionSchedule.from_config(config.attention, config.model.num_layers)
        return suggest_layouts(config, schedule, VOCABULARY, Cluster(GPUS["h100"], RANKS), limit=1000)

    assert found("training.recompute=full", "training.recompute_layers=20") == found()
    assert {layout.parallel.pipeline for layout in found()} > {1}


def test_the_time_of_every_suggestion(suggested):
    seconds = {split: layout.step_seconds for split, layout in suggested.items()}
    for split, layout in suggested.items():
        near = split.tensor * split.context <= NODE
        assert seconds[split] == pytest.approx(split.seconds(layout.saving), rel=0.1 if near else 0.2), split
    assert list(seconds.values()) == sorted(seconds.values())

"""A packed row gives each document the loss that it has alone: MoBA and full layers, fp32, with and without context
parallelism, and so do rows without anything that counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import run_ranks
from packing_examples import EOD, packing_config, write_documents

from moba_megatron.config import Config

VOCABULARY = 128
LENGTHS = [70, 3, 2, 40, 25, 9, 7, 64, 50, 14, 2, 2, 5, 33, 150, 31, 20, 4]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of random ids, and the same with a mask under which some rows count nothing."""
    random = np.random.default_rng(0)
    stream = random.integers(1, VOCABULARY, sum(LENGTHS))
    stream[np.cumsum(LENGTHS) - 1] = EOD
    folder = tmp_path_factory.mktemp("documents")
    write_documents(folder / "train", stream, LENGTHS)
    mask = np.zeros(len(stream))
    mask[:60] = 1
    write_documents(folder / "masked", stream, LENGTHS, mask)
    return folder / "train"


def config_of(prefix: Path, context: int = 1, **changes) -> Config:
    return packing_config(
        prefix,
        length=64,
        **{
            "model__num_layers": 2,
            "model__hidden_size": 32,
            "model__num_attention_heads": 4,
            "model__num_query_groups": 2,
            "model__init_method_std": 0.2,
            "model__vocab_size": VOCABULARY,
            "attention__top_k": 2,
            "attention__last_n_full": 1,
            "training__precision": "fp32",
            "parallel__context": context,
            **changes,
        },
    )


def start_model(config: Config) -> list[torch.nn.Module]:
    """The model of a configuration on this rank, the same weights at any context-parallel size."""
    from moba_megatron.model.builder import build_model
    from moba_megatron.model.exchange_choice import resolve_exchange
    from moba_megatron.model.schedule import AttentionSchedule
    from moba_megatron.platform.start import start_rank

    start_rank(config.parallel, seed=3, threads=1, context_levels=resolve_exchange(config).levels)
    schedule = AttentionSchedule.from_config(config.attention, config.model.num_layers)
    return build_model(config, VOCABULARY, schedule)


def batches_of(config: Config) -> list[dict]:
    """This rank's part of every sample of one epoch."""
    from moba_megatron.data.datasets import build_datasets
    from moba_megatron.data.feed import rank_batches

    rows = build_datasets(config)[0].summary().rows
    dataset = build_datasets(config, rows)[0]
    where = {"eod_id": EOD, "consumed_samples": 0, "num_samples": rows, "device": torch.device("cpu")}
    return list(rank_batches(dataset, config, **where))


def per_token(model: torch.nn.Module, batch: dict, packed: object) -> torch.Tensor:
    with torch.no_grad():
        losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], packed_seq_params=packed)
    return losses.flatten().double() * batch["loss_mask"].flatten()


def losses_in_packs(config: Config) -> list[list[float]]:
    """Summed loss of each document of each sample, as packed."""
    from megatron.core import parallel_state

    from moba_megatron.parallel.layout import shard_positions

    [model], found = start_model(config), []
    context = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    for batch in batches_of(config):
        bounds = batch.get("cu_seqlens_padded", batch["cu_seqlens"]).long()
        mine = shard_positions(bounds, context[1], context[0])
        sums = torch.zeros(len(bounds) - 1, dtype=torch.float64)
        losses = per_token(model, batch, batch["packed_seq_params"])
        sums.index_add_(0, torch.searchsorted(bounds[1:], mine, right=True), losses)
        torch.distributed.all_reduce(sums)
        found.append(sums.tolist())
    return found


def losses_alone(config: Config) -> list[list[float]]:
    """The same, each document as a sequence of its own that knows nothing of packs."""
    [model], found = start_model(config), []
    for batch in batches_of(config):
        sums = []
        for start, end in zip(batch["cu_seqlens"][:-1].tolist(), batch["cu_seqlens"][1:].tolist(), strict=True):
            alone = {name: batch[name][:, start:end] for name in ("tokens", "labels", "loss_mask")}
            alone["position_ids"] = torch.arange(end - start)[None]
            sums.append(float(per_token(model, alone, None).sum()))
        found.append(sums)
    return found


@pytest.mark.parametrize("packing", ["concatenate", "best_fit", "document"])
def test_a_document_in_a_pack_has_the_loss_that_it_has_alone(prefix: Path, packing: str):
    least = {"data__min_document_length": 30} if packing == "document" else {}
    one, two = (config_of(prefix, context, data__packing=packing, **least) for context in (1, 2))
    [alone] = run_ranks(1, losses_alone, one)
    [packed] = run_ranks(1, losses_in_packs, one)
    parts = run_ranks(2, losses_in_packs, two)
    flat = [loss for row in alone for loss in row]
    assert sum(loss > 0 for loss in flat) >= 8
    for other in (packed, *parts):
        assert [len(row) for row in other] == [len(row) for row in alone]
        assert [loss for row in other for loss in row] == pytest.approx(flat, rel=1e-5)
    if packing == "best_fit":
        # The sparse layers matter: with full attention in their place the long documents differ.
        [full] = run_ranks(1, losses_in_packs, config_of(prefix, data__packing=packing, attention__kind="full"))
        dense = [loss for row in full for loss in row]
        assert max(abs(a - b) for a, b in zip(flat, dense, strict=True)) > 1e-2


def train_two_steps(config: Config) -> list[tuple[float, float]]:
    """Loss and gradient norm of steps on this rank's samples."""
    from small_run import read_metrics, train_here

    world = torch.distributed.get_world_size()
    train_here(config, world)
    return [(line["loss"], line["grad_norm"]) for line in read_metrics(Path(config.run.dir))]


@pytest.mark.parametrize("context", [1, 2])
def test_rows_and_ranks_without_a_target_do_no_harm(prefix: Path, tmp_path: Path, context: int):
    """Nearly all rows count nothing: on two ranks most passes are empty on one of them, and some steps are on both."""
    changes = {
        "data__packing": "best_fit",
        "training__steps": 5,
        "training__global_batch_size": 2,
        "logging__tensorboard": False,
        "run__threads": 1,
    }
    courses = []
    for ranks in (1, 2):
        where = {"run__dir": str(tmp_path / f"{ranks}")}
        config = config_of(prefix.with_name("masked"), context if ranks == 2 else 1, **changes, **where)
        courses.append(run_ranks(ranks, train_two_steps, config)[0])
    assert any(loss == 0 and norm == 0 for loss, norm in courses[0]) and any(loss > 0 for loss, _ in courses[0])
    for step in range(5):
        assert courses[1][step] == pytest.approx(courses[0][step], rel=3e-4)


def evaluate_rows(config: Config) -> dict:
    """An evaluation of a fresh model on one epoch of the training data."""
    from moba_megatron.data.datasets import build_datasets
    from moba_megatron.data.feed import rank_batches
    from moba_megatron.evaluation.losses.positions import evaluate

    model, dataset = start_model(config), build_datasets(config)[0]
    rows = dataset.summary().rows
    where = {"eod_id": EOD, "consumed_samples": 0, "num_samples": rows, "device": torch.device("cpu")}
    passes = -(-rows // config.training.micro_batch_size)
    return evaluate(model, [rank_batches(dataset, config, **where)], config, passes).to_dict()


@pytest.mark.parametrize("packing", ["best_fit", "document"])
def test_evaluation_counts_each_position_of_each_document_once(prefix: Path, packing: str):
    """Trailing loss is over documents that reach the end of the window, and over nothing where none does."""
    changes = {"data__packing": packing, "training__micro_batch_size": 2, "training__global_batch_size": 2}
    changes |= {"evaluation__position_buckets": 64, "evaluation__trailing_tokens": 4}
    changes |= {"data__min_document_length": 33} if packing == "document" else {}
    [found] = run_ranks(1, evaluate_rows, config_of(prefix, **changes))
    least = 33 if packing == "document" else 2
    pieces = [(start, length) for length in LENGTHS if length >= least for start in range(0, length, 64)]
    pieces = [(start, length) for start, length in pieces if min(64, length - start) >= min(least, 64)]
    # Position p of a piece predicts the token after it, which the last token of a document does not have.
    expected = [sum(start + p + 1 < length for start, length in pieces) for p in range(64)]
    assert [line["tokens"] for line in found["by_position"]] == expected
    assert found["evaluated_tokens"] == sum(expected) and found["trailing_loss"] > 0
    trailing = [line["loss"] * line["tokens"] for line in found["by_position"][60:]]
    assert found["trailing_loss"] == pytest.approx(sum(trailing) / sum(expected[60:]))


def test_trailing_loss_is_none_where_no_document_reaches_the_end(prefix: Path):
    changes = {"data__packing": "document", "data__min_document_length": 20, "evaluation__trailing_tokens": 4}
    write_documents(prefix.with_name("short"), np.full(100, 7), [30, 20, 50])
    [found] = run_ranks(1, evaluate_rows, config_of(prefix.with_name("short"), **changes))
    assert found["trailing_loss"] is None and found["evaluated_tokens"] == 100 - 3

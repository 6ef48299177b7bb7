"""Plans of a model whose index alone learns, against what megatron-core holds for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from model_examples import VOCABULARY, loss_of_batch, tiny
from typer.testing import CliRunner

from moba_megatron import platform
from moba_megatron.cli import app
from moba_megatron.config import Config, load_config
from moba_megatron.config.sizes import matrix_parameters
from moba_megatron.model.builder import build_model
from moba_megatron.model.exchange_choice import resolve_exchange
from moba_megatron.model.schedule import AttentionSchedule
from moba_megatron.ops.pairs import attended_pairs
from moba_megatron.planning.flops import training_flops_per_token
from moba_megatron.planning.memory import estimate_memory
from moba_megatron.planning.plan_machines import GPUS, Cluster
from moba_megatron.planning.plan_stages import stages_of
from moba_megatron.planning.plan_time import step_time
from moba_megatron.training.dry_run import print_dry_run
from moba_megatron.training.optimizer import build_optimizer, wrap_data_parallel

# The last layer has no index.
INDEX = {"router": "index", "router_dim": 6, "last_n_full": 1}
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"tensor": 2}, {}),
    ({"tensor": 2}, {"precision": "bf16"}),
    ({"distributed_optimizer": True}, {}),
    ({"pipeline": 2}, {}),
]


def config_of(parallel: dict[str, Any], training: dict[str, Any], frozen: bool = True) -> Config:
    only = {"train_only": ["router"]} if frozen else {}
    return tiny(attention=INDEX, parallel=parallel, training={**training, **only})


def schedule_of(config: Config) -> AttentionSchedule:
    return AttentionSchedule.from_config(config.attention, config.model.num_layers)


def held(configs: list[Config]) -> list[tuple[int, int, int]]:
    """On one of two ranks, of each configuration: bytes of weights, of gradients, and of the optimizer after a step,
    its scalars left out."""
    from megatron.core import parallel_state

    found = []
    for config in configs:
        platform.start_model_parallel(config.parallel, resolve_exchange(config).levels)
        chunks = build_model(config, VOCABULARY + 1, schedule_of(config))
        wrapped = wrap_data_parallel(chunks, config)
        optimizer = build_optimizer(wrapped, config)
        loss_of_batch(config, wrapped, 0)
        optimizer.step()
        weights = [p for chunk in chunks for p in chunk.parameters()]
        own = {p.untyped_storage().data_ptr() for p in weights}
        buffers = [b.grad_data for chunk in wrapped for b in [*chunk.buffers, *chunk.expert_parallel_buffers]]
        states: dict[int, torch.Tensor] = {}
        for part in optimizer.chained_optimizers:
            mains = [p for group in part.optimizer.param_groups for p in group["params"]]
            moments = [t for state in part.optimizer.state.values() for t in state.values()]
            states |= {t.untyped_storage().data_ptr(): t for t in [*mains, *moments] if torch.is_tensor(t)}
        state = sum(t.nbytes for place, t in states.items() if t.dim() and place not in own)
        found.append((sum(p.nbytes for p in weights), sum(b.nbytes for b in buffers), state))
        parallel_state.destroy_model_parallel()
    return found


def test_frozen_weights_have_neither_gradients_nor_state():
    # And an index that learns nothing, beside all else that does.
    configs = [*[config_of(*case) for case in CASES], tiny(attention={**INDEX, "router_loss": "none"})]
    ranks = run_ranks(2, held, configs)
    for number, config in enumerate(configs):
        replicas = 2 // (config.parallel.tensor * config.parallel.pipeline)
        planned = estimate_memory(config, schedule_of(config), VOCABULARY + 1, replicas, "cpu")
        for rank, found in enumerate(ranks):
            stage = planned[rank if config.parallel.pipeline > 1 else 0]
            weights, gradients, state = found[number]
            assert weights == stage.weights, config.parallel
            # The distributed optimizer pads its buffers to a multiple of 128 numbers or so, and splits them there.
            slack = 4 * 2**10 if config.parallel.distributed_optimizer else 0
            assert 0 <= gradients - stage.gradients <= slack, config.parallel
            assert abs(state - stage.optimizer) <= slack, config.parallel


def test_operations_and_seconds_of_a_step():
    frozen, whole = (config_of({}, {"precision": "bf16"}, only) for only in (True, False))
    layers = schedule_of(frozen).stages[0]
    sizes = [layer.sizes for layer in layers]
    # The backward pass: products with all matrices, and twice the pairs that attention works on.
    pairs = sum(attended_pairs(frozen.data.sequence_length, *(size or ())) for size in sizes)
    backward = 8 * frozen.model.head_size * frozen.model.num_attention_heads * float(pairs)
    less = training_flops_per_token(whole, VOCABULARY, sizes) - training_flops_per_token(frozen, VOCABULARY, sizes)
    expected = 4 * matrix_parameters(frozen.model, VOCABULARY) + backward / frozen.data.sequence_length
    assert less == pytest.approx(expected)
    ours, all_ = (step_time(config, layers, VOCABULARY, 2, Cluster(GPUS["h100"], 2)) for config in (frozen, whole))
    assert 0.3 < ours.parts["matrix products"] / all_.parts["matrix products"] < 0.36
    assert ours.parts["attention"] < all_.parts["attention"]
    (stage,) = stages_of(frozen, VOCABULARY, 1)
    (full,) = stages_of(whole, VOCABULARY, 1)
    assert (full.trained, stage.parameters) == (full.parameters, full.parameters)
    assert ours.received["data"] == pytest.approx(all_.received["data"] * stage.trained / full.trained)
    assert ours.parts["optimizer"] == pytest.approx(all_.parts["optimizer"] * stage.trained / full.trained)


def test_commands_say_what_learns(capsys, tmp_path):
    path = Path(__file__).parents[2] / "configs/continued_pretraining/llama3.1_8b/128k_moba.yaml"
    index = ["attention.router=index", "attention.router_dim=128", "training.train_only=[router]"]
    # 29 of 32 layers: 8 queries and a key of 128 channels, from 4,096, and two norms.
    learning = 29 * (9 * 128 * 4096 + 2 * 128)
    print_dry_run(load_config(path, index), 1)
    assert f"learning             {learning:,}, the rest is frozen" in capsys.readouterr().out
    arguments = ["plan", str(path), *index, "--gpus", "64", "--layouts", "0", "--json", str(tmp_path / "plan.json")]
    output = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, arguments).output
    assert f"{learning:,} of them learn, the rest is frozen" in output

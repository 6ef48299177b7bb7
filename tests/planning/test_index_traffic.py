"""Bytes of context parallelism in the plan of a model with an index, against those that are received."""

from __future__ import annotations

from distributed import run_ranks
from model_examples import VOCABULARY, loss_of_batch, tiny

from moba_megatron import platform
from moba_megatron.config import Config
from moba_megatron.model.builder import build_model
from moba_megatron.model.exchange_choice import resolve_exchange
from moba_megatron.model.schedule import AttentionSchedule
from moba_megatron.parallel.wire import observe
from moba_megatron.planning.index_shape import IndexShape
from moba_megatron.planning.plan_machines import GPUS, Cluster
from moba_megatron.planning.plan_traffic import context_moved
from moba_megatron.training.optimizer import wrap_data_parallel

CASES = [
    ("p2p", {"router_loss": "sparse"}, "none"),
    ("p2p", {"router_loss": "none"}, "selective"),
    ("a2a", {"router_loss": "sparse", "router_heads": "query", "router_keys": "key"}, "selective"),
    ("a2a", {"router_loss": "dense"}, "none"),
    ("a2a", {"router": "own", "router_dim": None}, "none"),
]


def indexed(exchange: str, router: dict, recompute: str) -> Config:
    """Two MoBA layers; 64 tokens in blocks of 8."""
    return tiny(
        attention={"router": "index", "router_dim": 6, **router},
        parallel={"context": 2, "exchange": exchange},
        training={"recompute": recompute},
    )


def received(configs: list[Config]) -> list[int]:
    """On one of two ranks: of a step of each configuration."""
    from megatron.core import parallel_state

    found = []
    for config in configs:
        platform.start_model_parallel(config.parallel, resolve_exchange(config).levels)
        schedule = AttentionSchedule.from_config(config.attention, config.model.num_layers)
        wrapped = wrap_data_parallel(build_model(config, VOCABULARY, schedule), config)
        with observe() as seen:
            loss_of_batch(config, wrapped, 0)
        found.append(seen.total)
        parallel_state.destroy_model_parallel()
    return found


def test_planned_bytes_are_those_that_are_received():
    """Plans take two more blocks than a rank touches here, for boundaries of documents."""
    configs = [indexed(*case) for case in CASES]
    ranks = run_ranks(2, received, configs)
    layers, microbatches, cluster = 2, 2, Cluster(GPUS["h100"], 2)
    for number, config in enumerate(configs):
        (layer, _), *_ = AttentionSchedule.from_config(config.attention, layers).stages
        planned = context_moved(config, cluster, layer, resolve_exchange(config), 0.0).bytes
        index, passes = IndexShape.of(config.attention, config.model), 1 + config.training.repeats("core_attn")
        unseen = 2 * index.keys * index.size * 4 * passes if index else 0
        assert [rank[number] for rank in ranks] == [layers * microbatches * (planned - unseen)] * 2, CASES[number]

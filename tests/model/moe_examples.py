"""Small mixtures of experts, and what each rank of a layout found, for tests."""

from __future__ import annotations

from typing import Any

import torch
from model_examples import loss_of_batch, tiny

from moba_megatron.config import Config

VOCABULARY = 62
PACKS = [[0, 30, 31, 64], [0, 64], [0, 5, 9, 40, 63, 64], [0, 33, 64]]
"""Documents of the four samples of a step: padded for context parallelism, each makes a pack of another length."""
SOFTMAX: dict[str, Any] = {
    "num_moe_experts": 4,
    "moe_ffn_hidden_size": 24,
    "moe_layer_freq": [0, 1],
    "moe_shared_expert_intermediate_size": 16,
    "moe_shared_expert_gate": True,
    "moe_aux_loss_coeff": 0.1,
    "moe_z_loss_coeff": 0.01,
}
SIGMOID: dict[str, Any] = {
    "num_moe_experts": 8,
    "moe_ffn_hidden_size": 16,
    "moe_router_load_balancing_type": "seq_aux_loss",
    "moe_aux_loss_coeff": 0.1,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.01,
    "moe_router_num_groups": 2,
    "moe_router_group_topk": 1,
    "moe_router_topk_scaling_factor": 2.5,
}

SEED_OF_SIGMOID = 1
"""Of weights that keep the scores of experts apart."""


def mixture(shape: dict[str, Any], parallel: dict[str, Any] | None = None, **model: Any) -> Config:
    """Two layers, the second of full attention, and four microbatches a step."""
    return tiny(
        model={**shape, "vocab_size": VOCABULARY, **model},
        attention={"block_size": 8, "top_k": 2, "last_n_full": 1},
        training={"steps": 3, "global_batch_size": 4, "precision": "fp32", "loss_chunk_size": 24},
        parallel=parallel or {},
        run={"seed": 1234 if shape is SOFTMAX else SEED_OF_SIGMOID},
    )


def course_of_each(configs: list[Config], steps: int, whole: dict[str, torch.Tensor] | None = None) -> list[dict]:
    """`course` of each configuration in turn, in the same processes."""
    from megatron.core import parallel_state

    results = []
    for config in configs:
        results.append(course(config, steps, whole))
        parallel_state.destroy_model_parallel()
    return results


def course(config: Config, steps: int, whole: dict[str, torch.Tensor] | None = None) -> dict[str, Any]:
    """A few optimizer steps on packs of documents.

    Args:
        whole: gradients of the first step on one rank, which this rank's are compared with.

    Returns:
        `losses` and `norms` of each step; `gradients` of the first step by name in the whole model, or, with `whole`,
        `error`, the largest difference over the largest entry of each; `tallies` of each step; `biases` of the experts
        in the end; `margin`, the smallest distance between the last chosen score and the first that was not.
    """
    from moba_megatron import platform
    from moba_megatron.model.builder import build_model
    from moba_megatron.model.exchange_choice import resolve_exchange
    from moba_megatron.model.experts import expert_biases, read_tallies, routers
    from moba_megatron.model.schedule import AttentionSchedule
    from moba_megatron.training.optimizer import build_optimizer, wrap_data_parallel

    platform.start_model_parallel(config.parallel, resolve_exchange(config).levels)
    schedule = AttentionSchedule.from_config(config.attention, config.model.num_layers)
    chunks = build_model(config, VOCABULARY, schedule)
    wrapped = wrap_data_parallel(chunks, config)
    optimizer = build_optimizer(wrapped, config)
    found: dict[str, Any] = {"losses": [], "norms": [], "tallies": []}
    margins: list[float] = []
    for router in routers(chunks):
        keep_margin(router, margins)
    for step in range(steps):
        for model in wrapped:
            model.zero_grad_buffer()
        optimizer.zero_grad()
        found["losses"].append(loss_of_batch(config, wrapped, step, PACKS))
        if step == 0 and not config.parallel.distributed_optimizer:
            parts = own_gradients(chunks, config)
            if whole is None:
                found["gradients"] = {name: gradient for name, gradient, _ in parts}
            else:
                found["error"] = max(difference(gradient, cut(whole[name])) for name, gradient, cut in parts)
        found["tallies"].append(read_tallies(chunks, config.model, torch.device("cpu")))
        found["norms"].append(optimizer.step()[1])
    found["biases"] = [bias.clone() for bias in expert_biases(chunks)]
    found["margin"] = min(margins, default=float("inf"))
    return found


def keep_margin(router: torch.nn.Module, margins: list[float]) -> None:
    route = router.routing

    def routing(logits, *args, **more):
        scores = logits.detach().flatten(0, 1)
        if router.expert_bias is not None:
            scores = scores.sigmoid() + router.expert_bias
        groups, chosen = router.config.moe_router_num_groups, router.config.moe_router_group_topk
        if groups:
            grouped_TGE = scores.unflatten(-1, (groups, -1))
            of_group_TG = grouped_TGE.topk(router.topk // chosen, dim=-1).values.sum(dim=-1)
            best = of_group_TG.topk(chosen + 1, dim=-1)
            margins.append(float((best.values[:, -2] - best.values[:, -1]).min()))
            outside_TG = torch.ones_like(of_group_TG, dtype=torch.bool).scatter(-1, best.indices[:, :-1], False)
            scores = grouped_TGE.masked_fill(outside_TG.unsqueeze(-1), -1e9).flatten(1)
        best = scores.topk(router.topk + 1, dim=-1).values
        margins.append(float((best[:, -2] - best[:, -1]).min()))
        return route(logits, *args, **more)

    router.routing = routing


def difference(ours: torch.Tensor, expected: torch.Tensor) -> float:
    assert ours.shape == expected.shape
    return float((ours - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


def own_gradients(chunks: list[torch.nn.Module], config: Config):
    """(name in the whole model, gradient, how the whole gradient is cut for this rank) of each parameter."""
    from megatron.core import parallel_state

    from moba_megatron.model.first_weights import _draws, in_whole_layer

    model, parallel = config.model, config.parallel
    draws = _draws(chunks, model, chunks[0].config, VOCABULARY)
    cuts = {name: cut for name, _, _, cut in draws}
    tensor = parallel_state.get_tensor_model_parallel_rank(), parallel.tensor
    expert_tensor = parallel_state.get_expert_tensor_parallel_rank(), parallel.expert_tensor
    first = parallel_state.get_expert_model_parallel_rank() * model.num_moe_experts // parallel.expert
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if name.startswith("decoder.layers."):
                number, rest = name.removeprefix("decoder.layers.").split(".", 1)
                layer = chunk.decoder.layers[int(number)].layer_number - 1
                name = f"decoder.layers.{layer}.{in_whole_layer(rest, first)}"
            place = expert_tensor if ".experts." in name else tensor
            cut = cuts.get(name, lambda whole, rank, ranks: whole)
            yield name, parameter.main_grad.clone(), lambda whole, cut=cut, place=place: cut(whole, *place)

"""Combinations of settings of mixtures of experts that cannot work."""

from __future__ import annotations

from moba_megatron.config.model import ModelConfig
from moba_megatron.config.parallel import ParallelConfig
from moba_megatron.config.schema import Config
from moba_megatron.config.words import divisors, nearest_multiples, one_of

LOSSES = ("aux_loss", "seq_aux_loss", "global_aux_loss")
"""Ways of balancing that are a loss, and so need a weight."""

Check = tuple[bool, str]


def expert_checks(config: Config) -> list[Check]:
    """(wrong, what to say) for each combination."""
    model = config.model
    if model.num_moe_experts is None:
        return _without_experts(model, config.parallel)
    return [
        *_shape_checks(model),
        *_choice_checks(model, model.num_moe_experts),
        *_balance_checks(model),
        *_layout_checks(config, model.num_moe_experts),
        *_capacity_checks(config),
    ]


def _without_experts(model: ModelConfig, parallel: ParallelConfig) -> list[Check]:
    """Settings that have no effect in a dense model."""
    sections = (("model", model, "moe_"), ("parallel", parallel, "expert"))
    return [
        (
            name.startswith(prefix) and getattr(section, name) != field.default,
            f"{key}.{name} = {getattr(section, name)} needs model.num_moe_experts: set it, or take this out",
        )
        for key, section, prefix in sections
        for name, field in type(section).model_fields.items()
    ]


def _shape_checks(model: ModelConfig) -> list[Check]:
    pattern, layers = model.moe_layer_freq, model.num_layers
    is_list = isinstance(pattern, list)
    return [
        (
            is_list and len(pattern) != layers,
            f"model.moe_layer_freq = {pattern} has {len(pattern) if is_list else 1} entries, but model.num_layers = "
            f"{layers}: give one 0 or 1 for each layer",
        ),
        (
            is_list and not any(pattern),
            f"model.moe_layer_freq = {pattern} gives no layer experts: set one entry to 1, or take "
            "model.num_moe_experts out",
        ),
        (
            model.moe_shared_expert_gate and model.moe_shared_expert_intermediate_size is None,
            "model.moe_shared_expert_gate = true needs model.moe_shared_expert_intermediate_size",
        ),
    ]


def _choice_checks(model: ModelConfig, experts: int) -> list[Check]:
    chosen, groups, group_topk = model.moe_router_topk, model.moe_router_num_groups, model.moe_router_group_topk
    softmax = model.moe_router_score_function == "softmax"
    sinkhorn = model.moe_router_load_balancing_type == "sinkhorn"
    checks = [
        (
            chosen > experts,
            f"model.moe_router_topk = {chosen} is over model.num_moe_experts = {experts}",
        ),
        (
            chosen == 1 and softmax and not model.moe_router_pre_softmax and not sinkhorn,
            "model.moe_router_topk = 1 always gives the chosen expert weight 1, so the router learns nothing: set "
            "model.moe_router_pre_softmax: true",
        ),
        (
            (groups is None) != (group_topk is None),
            f"model.moe_router_num_groups = {groups} and model.moe_router_group_topk = {group_topk}: set both or none",
        ),
        (
            model.moe_router_enable_expert_bias and softmax,
            "model.moe_router_enable_expert_bias = true needs model.moe_router_score_function: sigmoid",
        ),
    ]
    if groups is None or group_topk is None:
        return checks
    size, divides = experts // groups, experts % groups == 0
    fitting = [n for n in range(1, groups + 1) if chosen % n == 0 and chosen // n <= size and n * size >= chosen]
    return [
        *checks,
        (
            not divides,
            f"model.moe_router_num_groups = {groups} does not divide model.num_moe_experts = {experts}: use "
            f"{one_of(divisors(experts)[1:])}",
        ),
        (
            divides and group_topk not in fitting,
            f"model.moe_router_group_topk = {group_topk}: of {groups} groups of {size} experts a token chooses "
            f"model.moe_router_topk = {chosen}, the same number from each: use {one_of(fitting or [1])}",
        ),
    ]


def _balance_checks(model: ModelConfig) -> list[Check]:
    balancing, weight = model.moe_router_load_balancing_type, model.moe_aux_loss_coeff
    key = f"model.moe_aux_loss_coeff = {weight}"
    return [
        (
            balancing not in LOSSES and weight > 0,
            f"{key} has no effect with model.moe_router_load_balancing_type = {balancing}: use {one_of(list(LOSSES))}, "
            "or set it to 0",
        ),
        (
            balancing == "sinkhorn" and model.moe_router_enable_expert_bias,
            "model.moe_router_enable_expert_bias = true has no effect with model.moe_router_load_balancing_type = "
            "sinkhorn, which balances the load without one: use none",
        ),
    ]


def _layout_checks(config: Config, experts: int) -> list[Check]:
    model, parallel = config.model, config.parallel
    widths = [("model.moe_ffn_hidden_size", model.expert_ffn_size, "expert_tensor", parallel.expert_tensor)]
    if model.moe_shared_expert_intermediate_size is not None:
        shared = model.moe_shared_expert_intermediate_size
        widths.append(("model.moe_shared_expert_intermediate_size", shared, "tensor", parallel.tensor))
    return [
        (
            experts % parallel.expert != 0,
            f"parallel.expert = {parallel.expert} does not divide model.num_moe_experts = {experts}: use "
            f"{one_of(divisors(experts))}, or {nearest_multiples(experts, parallel.expert)} experts",
        ),
        *[
            (
                size % ranks != 0,
                f"parallel.{name} = {ranks} does not divide {key} = {size}: use {one_of(divisors(size))}",
            )
            for key, size, name, ranks in widths
        ],
        (
            parallel.tensor > 1 and not parallel.sequence,
            f"parallel.tensor = {parallel.tensor} with experts needs parallel.sequence: true, or tokens would be sent "
            f"to their experts twice",
        ),
        (
            parallel.expert_dispatcher == "allgather" and parallel.context > 1 and config.packed,
            f"parallel.expert_dispatcher = allgather with parallel.context = {parallel.context} on packs of documents: "
            "they are padded, so ranks have unequal numbers of tokens; use alltoall",
        ),
    ]


def _capacity_checks(config: Config) -> list[Check]:
    model, parallel = config.model, config.parallel
    factor, padded = model.moe_expert_capacity_factor, config.packed and parallel.context > 1
    return [
        (
            factor is None and model.moe_pad_expert_input_to_capacity,
            "model.moe_pad_expert_input_to_capacity = true needs model.moe_expert_capacity_factor",
        ),
        (
            factor is not None and model.moe_router_load_balancing_type == "sinkhorn",
            f"model.moe_expert_capacity_factor = {factor} does not go with model.moe_router_load_balancing_type = "
            f"sinkhorn: use {one_of([*LOSSES, 'none'])}",
        ),
        (
            factor is not None and (padded or config.data.packing != "concatenate"),
            f"model.moe_expert_capacity_factor = {factor}: padding would displace tokens; packs of documents have "
            f"padding if parallel.context is above 1 or data.packing is not concatenate: take out the factor, or "
            "change these",
        ),
        (
            model.moe_pad_expert_input_to_capacity and parallel.expert_dispatcher == "flex",
            "model.moe_pad_expert_input_to_capacity = true does not go with parallel.expert_dispatcher = flex: use "
            "alltoall",
        ),
    ]

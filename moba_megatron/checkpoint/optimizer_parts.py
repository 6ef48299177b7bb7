"""An optimizer of one part or of two, from a checkpoint of the other kind.

megatron-core has a second optimizer, chained to the first, for parameters that other ranks share than those of dense
layers: for experts, where they are split over ranks. Their state is stored by the name of each parameter, so it loads
into either kind. What is not a tensor (steps, rates, by group of parameters) is stored as the parts had it, and has to
be split or joined.
"""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer.optimizer import MegatronOptimizer, param_group_identifier_keys

from moba_megatron.checkpoint.manifest import CheckpointError

_SPLIT_ONLY = "is_expert_parallel"
"""Of what tells groups apart, the one that says which part they belong to."""

_KIND = "param_state_sharding_type"


def parts_of(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers that are chained, or the one."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def fit_parts(optimizer: MegatronOptimizer, loaded: dict[Any, Any]) -> dict[Any, Any]:
    """The loaded state of an optimizer in its own form; where it has that, only what a part without parameters asks for
    is added.

    Args:
        loaded: what was stored that is not a tensor, in the form in which it was stored, merged with the tensors in the
            form of this optimizer.

    Raises:
        CheckpointError: a group of parameters that the checkpoint has not.
    """
    parts = parts_of(optimizer)
    numbered = {key: value for key, value in loaded.items() if isinstance(key, int)}
    single = {key: value for key, value in loaded.items() if not isinstance(key, int)}
    states = [single] if len(parts) == 1 else [numbered.get(number, {}) for number in range(len(parts))]
    if len(parts) == 1 and not numbered:
        _fill_empty(parts[0], loaded)
        return loaded
    if len(parts) > 1 and not single:
        for part, state in zip(parts, states, strict=True):
            _fill_empty(part, state)
        return dict(enumerate(states))
    saved = [group for state in (single, *numbered.values()) for group in _groups(state) if _SPLIT_ONLY in group]
    kind = next((state[_KIND] for state in (single, *numbered.values()) if _KIND in state), None)
    for part, state in zip(parts, states, strict=True):
        _fill_empty(part, state)
        own_groups = part.optimizer.state_dict()["param_groups"]
        _holder(part, state)["param_groups"] = [_filled(own, saved) for own in own_groups]
        if kind is not None:
            state[_KIND] = kind
    return single if len(parts) == 1 else dict(enumerate(states))


def _fill_empty(part: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Add what a part asks for and loading leaves out because there is nothing in it: where all layers of a rank are
    dense, the state of its experts; where `training.train_only` leaves a rank nothing to train, all of it."""
    if not part.get_parameters():
        for key, value in part.state_dict().items():
            state.setdefault(key, value)
    _holder(part, state).setdefault("state", {})


def _holder(part: MegatronOptimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Where in the state of a part its groups of parameters are."""
    return state.setdefault("optimizer", {}) if "optimizer" in part.state_dict() else state


def _groups(state: dict[str, Any]) -> list[dict[str, Any]]:
    return state.get("param_groups") or state.get("optimizer", {}).get("param_groups") or []


def _filled(own: dict[str, Any], saved: list[dict[str, Any]]) -> dict[str, Any]:
    """A group of parameters with what was saved of such a group, of either part."""
    names = [name for name in param_group_identifier_keys if name != _SPLIT_ONLY and name in own]
    found = [group for group in saved if all(group.get(name) == own[name] for name in names)]
    if not found:
        wanted = ", ".join(f"{name} = {own[name]}" for name in names)
        raise CheckpointError(f"the checkpoint's optimizer has no group of parameters with {wanted}")
    return {**found[0], _SPLIT_ONLY: own[_SPLIT_ONLY], "params": own["params"]}

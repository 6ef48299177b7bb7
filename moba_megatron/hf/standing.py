"""A model with `moba_config` in its configuration uses MoBA, unless the user names another attention.

transformers keeps the name of a model's attention only in memory: `save_pretrained` leaves it out, and a model without
a name silently uses "sdpa", which is full attention. `moba_config` is saved. So this package, when imported, changes
three places of transformers:

- If a model is made without the name of an attention, the name is "moba" if there is a `moba_config`.
- If a configuration becomes a dictionary, for instance for config.json, one with `moba_config` also gets
  `"attn_implementation": "moba"`. Then transformers 5 refuses to load the folder if this package is not imported.
- If `moba_config` has an index, the layers of a new model get theirs (`block_router`) before weights are loaded.

A name that the user gives (`attn_implementation="sdpa"`) wins. Models without `moba_config` do not change.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from moba_megatron.hf.block_router import add_block_routers
from moba_megatron.hf.settings import NAME

ENTRY = "moba_config"


def stand_by_settings() -> None:
    """Teach transformers the three; once, however often it is called."""
    _wrap(PreTrainedModel, "post_init", _with_block_routers)
    _wrap(PreTrainedModel, "get_correct_attn_implementation", _named_by_settings)
    _wrap(PretrainedConfig, "to_dict", _naming_the_attention)


def check_takes_attention(model: PreTrainedModel) -> None:
    """Check that a model's class can use a registered attention, as far as transformers can tell from its code.

    Raises:
        ValueError: the class computes its attention itself.
    """
    if not model._can_set_attn_implementation():
        raise ValueError(
            f"the code of {type(model).__name__} does not seem to use transformers' attention interface, so it would "
            'attend fully: ask for full attention by attn_implementation="sdpa" (or "eager") or, if it does use the '
            f'interface, load it with attn_implementation="{NAME}" and call moba_megatron.hf.check_attends(model)'
        )


def _wrap(owner: type, name: str, wrapper: Callable[..., Callable]) -> None:
    stock = getattr(owner, name)
    if not hasattr(stock, "stands_by_settings"):
        wrapped = functools.wraps(stock)(wrapper(stock))
        wrapped.stands_by_settings = True
        setattr(owner, name, wrapped)


def _named_by_settings(stock: Callable[..., str]) -> Callable[..., str]:
    def get_correct_attn_implementation(
        self: PreTrainedModel, requested_attention: str | None, *args: Any, **kwargs: Any
    ) -> str:
        if getattr(self.config, ENTRY, None) is not None:
            _refuse_weights_of_attention(self.config, requested_attention)
            if requested_attention is None:
                check_takes_attention(self)
                requested_attention = NAME
        return stock(self, requested_attention, *args, **kwargs)

    return get_correct_attn_implementation


def _with_block_routers(stock: Callable[..., None]) -> Callable[..., None]:
    def post_init(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        add_block_routers(self)
        stock(self, *args, **kwargs)

    return post_init


def _refuse_weights_of_attention(config: PretrainedConfig, requested: str | None) -> None:
    """Where weights of attention are asked for, transformers names "eager" itself, and full attention would follow."""
    if config.output_attentions and requested in (None, "eager"):
        raise ValueError(
            "output_attentions = True for a model with moba_config: MoBA has no matrix of weights to return. Leave it "
            'out, or, for the weights of full attention, load with attn_implementation="eager" and set '
            "model.config.output_attentions = True then"
        )


def _naming_the_attention(stock: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    def to_dict(self: PretrainedConfig, *args: Any, **kwargs: Any) -> dict[str, Any]:
        values = stock(self, *args, **kwargs)
        return values if values.get(ENTRY) is None else {**values, "attn_implementation": NAME}

    return to_dict

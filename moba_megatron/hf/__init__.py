"""MoBA for models of transformers, without Megatron.

Importing this package registers an attention and its mask as "moba". Any model that takes its attention from
transformers' interface (Llama, Qwen, Mistral, ...) then attends by MoBA:

    import moba_megatron.hf as moba

    model = AutoModelForCausalLM.from_pretrained(path)
    moba.configure(model, block_size=512, top_k=3, last_n_full=3)
    model.generate(**inputs, past_key_values=moba.MoBACache())

A checkpoint whose configuration has a `moba_config` needs only `from_pretrained(path)`, also after it is saved again;
`attn_implementation="sdpa"` asks for full attention.

`settings` reads the configuration, and `standing` applies it if the caller names no attention. `mask` reads padding and
packing, and `packing` compares them with other arguments of trainers. `attention` is the attention, `cache` a cache
with block summaries. `prefill` processes a long prompt in pieces, and `probe` checks that a model uses MoBA. Needs
torch and transformers 4.57 or newer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from moba_megatron.hf.attention import moba_attention_forward
from moba_megatron.hf.block_router import keep_block_routers
from moba_megatron.hf.cache import BlockSummaries, MoBACache, MoBACacheLayer
from moba_megatron.hf.mask import moba_mask
from moba_megatron.hf.prefill import prefill
from moba_megatron.hf.probe import check_attends
from moba_megatron.hf.settings import NAME, MoBASettings, key_heads, layer_types
from moba_megatron.hf.standing import check_takes_attention, stand_by_settings
from moba_megatron.ops.selection import Selection

AttentionInterface.register(NAME, moba_attention_forward)
AttentionMaskInterface.register(NAME, moba_mask)
stand_by_settings()


def configure(
    model: Any,
    *,
    block_size: int,
    top_k: int | Sequence[int],
    last_n_full: int = 0,
    decode: str = "full",
    selector: str = "top_k",
    summary: str = "mean",
    threshold: float | None = None,
    share_selection: str = "none",
) -> MoBASettings:
    """Switch a transformers model to MoBA, also after it is saved and loaded again.

    Args:
        model: a model of transformers; its text configuration gets `moba_config`.
        block_size: tokens per block.
        top_k: blocks per query, its own counted; a list has one number for each key head of a layer.
        last_n_full: number of last layers that attend fully.
        decode: how new tokens attend to a cache: `full` (the MoBA report's way) or `moba`.
        selector, summary, threshold, share_selection: how past blocks are chosen, as for `moba_attention`.

    A model whose blocks an index chooses keeps it. Layers that attend fully from now on lose theirs.

    Raises:
        ValueError: settings that do not fit, a class of models that does not take its attention by name, or MoBA layers
            without the index that other layers have.
    """
    check_takes_attention(model)
    config = model.config.get_text_config()
    kinds = layer_types(config.num_hidden_layers, last_n_full)
    top_k, selection = Selection(selector, summary, threshold, share_selection).with_blocks(top_k, key_heads(config))
    index = MoBASettings.from_config(config).index if getattr(config, "moba_config", None) else None
    settings = MoBASettings(block_size, top_k, kinds, decode, selection=selection, index=index)
    if index is not None:
        keep_block_routers(model, kinds)
    config.moba_config = settings.to_config()
    model.set_attn_implementation(NAME)
    return settings


__all__ = [
    "BlockSummaries",
    "MoBACache",
    "MoBACacheLayer",
    "MoBASettings",
    "check_attends",
    "configure",
    "layer_types",
    "moba_attention_forward",
    "moba_mask",
    "prefill",
]

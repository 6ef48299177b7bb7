"""FlashMoBA's key convolution (arXiv 2511.11571) for this model, in plain PyTorch, for `trust_remote_code=True`.

Between projection (and norm, if there is one) and rotary embedding, each channel of each key head gets k_t +
SiLU(w_0 k_t + w_1 k_(t-1) + ...), in which tokens of other texts count as zero. Filters are parameters,
`self_attn.k_conv.weight`, of every layer. A cache holds, behind the channels of each key, the key as it was before: the
next tokens read the last of them, whatever happens to the cache's rows in between.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb, eager_attention_forward

from moba_megatron.convert.portable_modeling import MoBALlamaForCausalLM

KNOWN_MASKS = ("moba", "sdpa", "eager")


class KeyConvolution(nn.Module):
    """Filters [key heads x channels, width] of one layer; zero does nothing."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, width))

    def forward(self, key: Tensor, before: Tensor, same_text: list[Tensor]) -> Tensor:
        """Keys [batch, G, tokens, D], the width - 1 keys before them [batch, G, width - 1, D], and for each distance
        from 1 on whether the key so far back is of the token's text, [batch, tokens] -> keys like the first."""
        dtype, tokens, reach = torch.promote_types(key.dtype, torch.float32), key.shape[2], before.shape[2]
        filters = self.weight.view(key.shape[1], 1, key.shape[3], -1).to(dtype)
        source = torch.cat([before, key], dim=2)
        mixed = key * filters[..., 0]
        for back, same in enumerate(same_text, start=1):
            earlier = source[:, :, reach - back : reach - back + tokens]
            mixed = mixed + earlier * same[:, None, :, None] * filters[..., back]
        return key + F.silu(mixed).to(key.dtype)


def of_same_text(mask: Tensor | None, positions: Tensor | None, batch: int, past: int, tokens: int, reach: int) -> list:
    """For each distance from 1 to `reach` whether the key so far back belongs to a token's text: [batch, tokens], from
    the mask in any of the forms that attention gets it, and from positions that start again."""
    device = None if mask is None else mask.device
    slots = torch.arange(past, past + tokens, device=device)
    found = []
    for back in range(1, reach + 1):
        earlier = (slots - back).clamp(min=0)
        if mask is None:
            seen = torch.ones(batch, tokens, dtype=torch.bool, device=device)
        elif mask.dtype == torch.int32:
            # The package's own: the text's first slot, and one past the token's.
            seen = (mask[:, 0, :, 1] > 0) & (earlier >= mask[:, 0, :, 0])
        else:
            seen = mask[:, 0].expand(batch, -1, -1).gather(2, earlier.expand(batch, -1).unsqueeze(2)).squeeze(2)
            seen = seen if seen.dtype == torch.bool else seen == 0
        found.append(seen & (slots >= back))
    if positions is not None and positions.dim() == 2 and positions.shape[1] == tokens:
        positions = positions.to(found[0].device).expand(batch, -1)
        text = F.pad(positions[:, 1:] <= positions[:, :-1], (1, 0)).cumsum(1)
        for back in range(1, min(reach, tokens - 1) + 1):
            found[back - 1][:, back:] &= text[:, back:] == text[:, :-back]
    return found


class ConvolvedAttention(LlamaAttention):
    """The family's attention with convolved keys."""

    def __init__(self, config: Any, layer_idx: int):
        super().__init__(config, layer_idx)
        width = config.moba_config["key_convolution"]
        self.k_conv = KeyConvolution(config.num_key_value_heads * self.head_dim, width)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        name, size = self.config._attn_implementation, self.head_dim
        if name not in KNOWN_MASKS or (attention_mask is not None and attention_mask.dim() != 4):
            raise ValueError(f"convolved keys need a mask for {', '.join(KNOWN_MASKS)}, got one for {name}")
        shape = (*hidden_states.shape[:-1], -1, size)
        query, key, value = (p(hidden_states).view(shape) for p in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "k_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        query, plain, value = (x.transpose(1, 2) for x in (query, key, value))
        (batch, tokens), reach = hidden_states.shape[:2], self.k_conv.weight.shape[1] - 1
        past, before = self.keys_before(past_key_values, plain, reach)
        same = of_same_text(attention_mask, kwargs.get("position_ids"), batch, past, tokens, reach)
        key = self.k_conv(plain, before, [x.to(plain.device) for x in same])
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            both = torch.cat([key, plain], dim=-1)
            both, value = past_key_values.update(both, value, self.layer_idx)
            key = both[..., :size]
        attend = eager_attention_forward if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        dropout = self.attention_dropout if self.training else 0.0
        out, weights = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(out.reshape(*shape[:2], -1).contiguous()), weights

    def keys_before(self, cache: Any, key: Tensor, reach: int) -> tuple[int, Tensor]:
        """Tokens in the cache, and the last `reach` keys of them as they were before the convolution."""
        before = key.new_zeros(*key.shape[:2], reach, key.shape[3])
        past = 0 if cache is None else int(cache.get_seq_length(self.layer_idx))
        if past:
            stored = cache.layers[self.layer_idx].keys
            if stored.shape[2] < past or stored.shape[3] != 2 * key.shape[3]:
                raise ValueError(f"convolved keys need a cache that keeps all keys, got {type(cache).__name__}")
            last = stored[:, :, max(0, past - reach) : past, key.shape[3] :].to(key.device)
            before[:, :, reach - last.shape[2] :] = last
        return past, before


class ConvolvedMoBALlamaForCausalLM(MoBALlamaForCausalLM):
    """The model of this folder, with convolved keys in every layer."""

    def __init__(self, config: Any):
        super().__init__(config)
        for number, layer in enumerate(self.model.layers):
            layer.self_attn = ConvolvedAttention(config, number)
        self.post_init()

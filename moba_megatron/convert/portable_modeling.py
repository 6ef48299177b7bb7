"""Mixture of Block Attention (arXiv 2502.13189) for this model, in plain PyTorch, for `trust_remote_code=True`.

Each query attends to its own block and to the past blocks of its text whose mean key has the largest inner product with
it (equal ones: the earlier block), `top_k` in all; blocks begin at the text's first token. `moba_config` in config.json
gives the sizes and which layers do so. It may choose otherwise: by bounds of the keys (`summary`), until a share of the
scores is reached (`threshold`), the nearest blocks (`selector` `recent`), or the first and the nearest (`sink_recent`).
With `share_selection` the query heads of a key head choose together, by the mean or the maximum of their scores. With
`budgets` each key head has a `top_k` of its own. With `router` `index` the queries and keys that choose are those of an
index with weights of its own, `self_attn.block_router` (`modeling_moba_router.py`).

It follows transformers' own mask, so padding on either side and caches of every kind work. Masks are dense: it is exact
and meant for moderate lengths; where the package moba-megatron has been imported (`import moba_megatron.hf`), its
faster attention is used instead.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaForCausalLM

NAME = "moba"
ROWS = 256  # queries at a time: what a mask over all keys and heads costs in memory


def moba_mask(*args: Any, **kwargs: Any) -> Tensor:
    """Which keys a query may see at all: bool [batch, 1, queries, keys], always made."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


def moba_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [batch, N, queries, D], key and value [batch, G, keys, D] -> [batch,
    queries, N, D]."""
    if attention_mask is None or dropout or kwargs.get("sliding_window") or kwargs.get("output_attentions"):
        raise ValueError("MoBA needs transformers' mask, and has no dropout, window or returned attention weights")
    if kwargs.get("cu_seq_lens_q") is not None:
        check_documents(attention_mask, kwargs["cu_seq_lens_q"])
    settings = settings_of(module.config.moba_config, str(module.layer_idx))
    sparse = settings["layer_types"][module.layer_idx] == "moba"
    # What chooses blocks: attention's queries and keys, or those of an index.
    chooses = (query, key)
    if sparse and settings.get("router", "own") == "index":
        chooses = module.block_router.inputs
    if query.shape[2] == 1 and settings["decode"] == "full":
        sparse = False
    heads = query.shape[1] // key.shape[1]
    keys, values = (x.repeat_interleave(heads, dim=1) for x in (key, value))
    outputs = []
    for start in range(0, query.shape[2], ROWS):
        q, seen = query[:, :, start : start + ROWS], attention_mask[:, :, start : start + ROWS, : key.shape[2]]
        if sparse:
            by = chooses[0][:, :, start : start + ROWS].detach()
            chosen = chosen_keys(by, chooses[1].detach(), seen, settings)
            seen = seen & chosen.repeat_interleave(query.shape[1] // chosen.shape[1], dim=1)
        # Padding sees nothing, and would give nan; what it sees is never used.
        seen = seen | ~seen.any(-1, keepdim=True)
        outputs.append(F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, scale=scaling))
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


def check_documents(seen: Tensor, told: Tensor) -> None:
    """Compare the document boundaries that a trainer gives for packed rows with those of the mask."""
    queries = torch.arange(seen.shape[2], device=seen.device)
    begins = seen[:, 0].any(-1) & (seen[:, 0].int().argmax(-1) == queries)
    found = begins.flatten().nonzero().flatten()
    if found.tolist() != told[:-1].unique().tolist():
        raise ValueError(
            f"cu_seq_lens_q begins documents at {told[:-1].tolist()}, the mask at {found.tolist()}: transformers reads "
            "packed rows from position_ids alone, without attention_mask and with use_cache=False"
        )


def settings_of(entry: dict[str, Any], layer: str) -> dict[str, Any]:
    """How one layer attends, from `moba_config`."""
    if entry.get("version", 1) > 3:
        raise ValueError(f"moba_config has version {entry['version']}: this file reads up to 3")
    chosen = entry.get("layer_selections", {}).get(layer)
    if chosen is not None:
        entry = {
            **entry,
            "selector": "top_k",
            "summary": "mean",
            "threshold": None,
            "share_selection": "none",
            "budgets": None,
            **chosen,
        }
    return {"selector": "top_k", "summary": "mean", **entry, **entry.get("layer_sizes", {}).get(layer, {})}


def chosen_keys(query: Tensor, key: Tensor, seen: Tensor, settings: dict[str, Any]) -> Tensor:
    """Keys of each query's own block and of its chosen ones: bool [batch, N, queries, keys]."""
    (batch, heads, queries, _), block_size = query.shape, settings["block_size"]
    slots = torch.arange(key.shape[2], device=key.device)
    chosen = seen.new_zeros(batch, heads, queries, len(slots))
    for row in range(batch):
        real = seen[row, 0].any(-1)
        first = seen[row, 0].int().argmax(-1)
        own = ((seen[row, 0] * slots).amax(-1) - first) // block_size
        for begin in first[real].unique().tolist():
            mine = real & (first == begin)
            blocks = pick(query[row, :, mine], key[row, :, begin:], own[mine], settings)
            number = torch.div(slots - begin, block_size, rounding_mode="floor")
            inside = (number >= 0) & (number < blocks.shape[-1])
            chosen[row, :, mine] = blocks[..., number.clamp(0, blocks.shape[-1] - 1)] & inside
    return chosen


def pick(query: Tensor, key: Tensor, own: Tensor, settings: dict[str, Any]) -> Tensor:
    """Blocks of one text by query: query [N, t, D], key [G, keys, D] from the text's first on, own [t] -> bool [N, t,
    blocks]."""
    past, heads, others = int(own.max()), query.shape[0], settings["top_k"] - 1
    number = torch.arange(past, device=key.device)
    # How many of `others` each head may take: [N, 1, 1].
    budgets = torch.tensor(settings.get("budgets") or [others + 1] * key.shape[0], device=key.device)
    most = budgets.repeat_interleave(heads // len(budgets))[:, None, None] - 1
    is_past = number < own[:, None]
    blocks = torch.zeros(heads, len(own), past + 1, dtype=torch.bool, device=key.device)
    if settings["selector"] in ("recent", "sink_recent"):
        sink = (most > 0) if settings["selector"] == "sink_recent" else torch.zeros_like(most, dtype=torch.bool)
        near = number >= own[:, None] - most + sink.int()
        blocks[..., :past] = is_past & (near | (sink & (number == 0)))
    else:
        keys = key[:, : past * settings["block_size"]].float().unflatten(1, (past, settings["block_size"]))
        scores = scored(query.float(), keys, settings["summary"])
        share = settings.get("share_selection", "none")
        if share != "none":
            # The query heads of a key head choose together.
            by_key = scores.unflatten(0, (keys.shape[0], -1))
            together = by_key.amax(1) if share == "max" else by_key.sum(1) / by_key.shape[1]
            scores = together.repeat_interleave(by_key.shape[1], dim=0)
        scores = scores.masked_fill(~is_past, -torch.inf)
        order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :others]
        taken = is_past.expand_as(scores).gather(-1, order)
        taken &= torch.arange(order.shape[-1], device=key.device) < most
        if settings["selector"] == "threshold":
            shares = (scores * query.shape[-1] ** -0.5).softmax(-1).gather(-1, order)
            taken &= shares.cumsum(-1) - shares < settings["threshold"]
        blocks.scatter_(-1, order, taken)
    return blocks.scatter_(-1, own.expand(heads, -1).unsqueeze(-1), True)


def scored(query: Tensor, keys: Tensor, summary: str) -> Tensor:
    """Scores [N, t, past] of queries [N, t, D] against blocks of keys [G, past, B, D]."""
    repeat = query.shape[0] // keys.shape[0]
    if summary == "mean":
        return query @ keys.mean(2).repeat_interleave(repeat, dim=0).transpose(1, 2)
    high, low = (x.repeat_interleave(repeat, dim=0).transpose(1, 2) for x in (keys.amax(2), keys.amin(2)))
    return query.relu() @ high - (-query).relu() @ low


class MoBALlamaForCausalLM(LlamaForCausalLM):
    """The model of this folder, which attends by MoBA where no other attention is asked for."""

    def __init__(self, config: Any):
        # transformers 4 does not read the name in config.json.
        if config._attn_implementation is None:
            config._attn_implementation = NAME
        # transformers leaves that name out of what it saves; a plain attribute goes along.
        config.attn_implementation = NAME
        super().__init__(config)


if NAME not in ALL_ATTENTION_FUNCTIONS:
    AttentionInterface.register(NAME, moba_attention)
    AttentionMaskInterface.register(NAME, moba_mask)

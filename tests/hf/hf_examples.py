"""Tiny random models of transformers, and the truth they are compared with: MoBA by its definition, one sequence at a
time, without padding or cache."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from transformers import (
    AttentionInterface,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import moba_megatron.hf as hf
from moba_megatron.ops.reference import reference_attend, reference_select

BLOCK_SIZE, TOP_K, VOCABULARY = 4, 3, 97
SELECTIONS = {
    "min_max": {"selector": "top_k", "summary": "min_max"},
    "recent": {"selector": "recent", "summary": "mean"},
    "sink_recent": {"selector": "sink_recent", "summary": "mean"},
    "threshold": {"selector": "threshold", "summary": "mean", "threshold": 0.6},
    "shared": {"selector": "top_k", "summary": "mean", "share_selection": "mean"},
    "threshold of min_max": {"selector": "threshold", "summary": "min_max", "threshold": 0.6},
}
"""How blocks may be chosen, as `moba_config` writes it."""
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 4}),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, EXPERTS),
    "qwen2_moe": (Qwen2MoeConfig, Qwen2MoeForCausalLM, {**EXPERTS, "shared_expert_intermediate_size": 24}),
}


def build(family: str = "llama", decode: str = "moba", last_n_full: int = 1, **changes):
    """A model of three layers in fp64 that attends by MoBA, the last layer fully; the same weights at every call."""
    config_class, model_class, extra = MODELS[family]
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    model = model_class(config_class(**sizes | extra | changes)).double().eval()
    if "moe" in family or family == "mixtral":
        # One expert after the other: the product of all together takes no fp64.
        model.set_experts_implementation("eager")
    hf.configure(model, block_size=BLOCK_SIZE, top_k=TOP_K, last_n_full=last_n_full, decode=decode)
    return model


def choosing(model, words: dict):
    """The same model whose first layer chooses blocks by the words, its second one by the nearest blocks of others."""
    entry = model.config.moba_config
    entry |= {"version": 2, **words, "layer_selections": {"1": {"selector": "recent"}}}
    return model


def tokens(length: int, seed: int = 0) -> torch.Tensor:
    """int64 [1, length], never the padding token."""
    return torch.randint(2, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


def _by_definition(module, query, key, value, attention_mask, scaling=None, **_):
    """MoBA of one unpadded sequence; from token `prompt_length` on, full attention."""
    settings = hf.MoBASettings.from_config(module.config).of_layer(module.layer_idx)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    assert query.shape[0] == 1 and attention_mask is None and len(q) == len(k)
    full = reference_attend(q, k, v, reference_select(q, k, None, len(q), 0), None, len(q), scaling)[0]
    if settings.layer_types[module.layer_idx] == "full":
        return full[None], None
    ids = reference_select(q, k, None, settings.block_size, settings.top_k - 1, settings.selection)
    sparse = reference_attend(q, k, v, ids, None, settings.block_size, scaling)[0]
    prompt = getattr(module.config, "prompt_length", len(q))
    return torch.cat([sparse[:prompt], full[prompt:]])[None], None


AttentionInterface.register("moba_by_definition", _by_definition)


@contextmanager
def attending(model, name: str):
    """The same model with another attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def truth(model, ids: torch.Tensor, prompt_length: int | None = None) -> torch.Tensor:
    """Logits [1, tokens, vocabulary] by the definition; tokens after the prompt attend fully if a length is given."""
    if prompt_length is not None:
        model.config.prompt_length = prompt_length
    with attending(model, "moba_by_definition"):
        logits = model(ids, use_cache=False).logits
    if prompt_length is not None:
        del model.config.prompt_length
    return logits


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def padded(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences [1, length] as a batch with its attention mask."""
    width = max(row.shape[1] for row in rows)
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.int64)
    for at, row in enumerate(rows):
        where = slice(width - row.shape[1], width) if side == "left" else slice(row.shape[1])
        ids[at, where], mask[at, where] = row[0], 1
    return ids, mask

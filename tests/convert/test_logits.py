"""Every family, read from its Hugging Face folder at every layout, gives the logits of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from huggingface_models import LLAMA3, LONGROPE, MIXTURES, MODELS, SIZES, VOCABULARY, YARN, Saved, save_model
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moba_megatron.config import Config, config_from_dict
from moba_megatron.config.huggingface import model_section, read_huggingface_config

LAYOUTS = {
    1: [{}],
    2: [{"tensor": 2}, {"pipeline": 2}],
    4: [{"tensor": 4}, {"tensor": 2, "pipeline": 2, "sequence": True}],
}
OF_EXPERTS = {
    1: [{}],
    2: [{"expert": 2}, {"tensor": 2, "sequence": True, "expert_tensor": 2, "expert_dispatcher": "allgather"}],
    4: [{"expert": 2, "pipeline": 2}, {"expert": 2, "tensor": 2, "sequence": True}],
}


def configuration(folder: Any, parallel: dict[str, Any]) -> Config:
    return config_from_dict({
        "run": {"dir": "unused"},
        "model": {"init_from": str(folder)},
        "attention": {"kind": "full"},
        "parallel": parallel,
        "data": {"train": "unused", "tokenizer": "unused", "sequence_length": 128},
        "training": {"steps": 10, "global_batch_size": 4, "precision": "fp32"},
        "optimizer": {"lr": 1e-3},
    })  # fmt: skip


def logits_here(config: Config, texts: list[torch.Tensor]) -> list[torch.Tensor] | None:
    """Load `model.init_from` at this layout and read the texts; the last pipeline stage returns whole logits."""
    from megatron.core import parallel_state

    from moba_megatron import platform
    from moba_megatron.convert.initial import load_initial_weights
    from moba_megatron.model.builder import build_model
    from moba_megatron.model.schedule import AttentionSchedule

    platform.start_model_parallel(config.parallel)
    schedule = AttentionSchedule.from_config(config.attention, config.model.num_layers)
    (model,) = build_model(config, VOCABULARY, schedule)
    load_initial_weights(config, VOCABULARY, [model])
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    results = []
    for ids in texts:
        positions = torch.arange(ids.shape[1])[None]
        if not first:
            rows = ids.shape[1] // (config.parallel.tensor if config.parallel.sequence else 1)
            hidden = torch.empty(rows, 1, config.model.hidden_size)
            dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
            model.set_input_tensor(hidden)
        with torch.no_grad():
            out = model(ids, positions, attention_mask=None)
        if not last:
            dist.send(out.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
            continue
        parts = [torch.empty_like(out) for _ in range(config.parallel.tensor)]
        dist.all_gather(parts, out.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
        results.append(torch.cat(parts, -1)[..., :VOCABULARY])
    parallel_state.destroy_model_parallel()
    return results if last else None


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_family_at_every_layout_gives_the_logits_of_transformers(models, ranks):
    cases = [
        (name, parallel)
        for name in models
        for parallel in LAYOUTS[ranks]
        if name not in MIXTURES
        if len(parallel) < 3 or name in ("llama-3.1", "qwen2-tied", "qwen3")
    ]
    hold_against_transformers(models, ranks, cases)


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_mixtures_at_every_layout_of_experts_give_the_logits_of_transformers(models, ranks):
    hold_against_transformers(models, ranks, [(name, parallel) for name in MIXTURES for parallel in OF_EXPERTS[ranks]])


def hold_against_transformers(models: dict[str, Saved], ranks: int, cases: list[tuple[str, dict[str, Any]]]) -> None:
    configs = [(configuration(models[name].folder, parallel), models[name].texts) for name, parallel in cases]

    def all_here() -> list[Any]:
        return [logits_here(config, texts) for config, texts in configs]

    *_, found = run_ranks(ranks, all_here)
    for (name, parallel), ours in zip(cases, found, strict=True):
        for a, b in zip(ours, models[name].logits, strict=True):
            assert b.std() > 0.3, name
            difference = (a - b).abs().max()
            assert difference < 1e-5, f"{name} at {parallel}: logits differ by {difference:.2e}"


LONG = 8192 + 256
LONG_MODELS = {
    "llama": (LlamaConfig, {}),
    "llama-3.1": (
        LlamaConfig,
        {"rope_parameters": {**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 8192}},
    ),
    "llama-longrope": (LlamaConfig, {"rope_parameters": {**LONGROPE, "original_max_position_embeddings": 4096}}),
    "phi3-partial-longrope": (
        MODELS["phi3-partial-longrope"][0],
        {**MODELS["phi3-partial-longrope"][1], "original_max_position_embeddings": 4096},
    ),
    "qwen2": MODELS["qwen2"],
    "qwen2-yarn": (
        MODELS["qwen2-yarn"][0],
        {"rope_parameters": {**YARN, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 4096}},
    ),
    "qwen3": MODELS["qwen3"],
}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", LONG_MODELS)
def test_past_position_8192_the_logits_are_those_of_transformers(tmp_path, name, ranks):
    kind, changes = LONG_MODELS[name]
    model = save_model(tmp_path, kind(**{**SIZES, **changes, "max_position_embeddings": 2 * LONG}))
    ids = torch.randint(0, VOCABULARY, (1, LONG), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids).logits
    configs = [configuration(tmp_path, parallel) for parallel in LAYOUTS[ranks]]
    *_, found = run_ranks(ranks, lambda: [logits_here(config, [ids]) for config in configs])
    for config, (ours,) in zip(configs, found, strict=True):
        difference = (ours - expected)[:, -512:].abs().max()
        assert difference < 1e-5, f"{config.parallel}: logits differ by {difference:.2e}"


@pytest.mark.parametrize("name", MODELS)
def test_frequencies_are_those_of_transformers_to_the_last_bit(models, name):
    """Angles at position 100,000 are only as right as the last bit of a frequency."""
    from moba_megatron.config import ModelConfig
    from moba_megatron.model.rotary import rotary_frequencies

    values = read_huggingface_config(models[name].folder)
    ours = rotary_frequencies(ModelConfig.model_validate(model_section(values)))
    config = MODELS[name][0].from_pretrained(models[name].folder)
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        exponents = torch.arange(0, values.get("head_dim", 8), 2).float() / values.get("head_dim", 8)
        expected = 1.0 / config.rope_parameters["rope_theta"] ** exponents, None
    else:
        expected = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=None)
    assert torch.equal(ours.short, expected[0])
    if kind == "longrope":
        assert torch.equal(ours.long, ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=96)[0])


def test_both_dialects_of_rope_say_the_same():
    new = LlamaConfig(rope_parameters={"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}).to_dict()
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    old |= {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert model_section(new) == model_section(old) == model_section({**new, **old})

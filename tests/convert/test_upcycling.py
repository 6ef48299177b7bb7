"""A dense model becomes a mixture of experts that computes the same, and learns to be one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from huggingface_models import MODELS, SIZES, save_model
from rich.console import Console
from small_run import TOKENS, train_here
from test_families import LONG, started
from test_round_trip import tensors
from test_starting_runs import call
from transformers import AutoModelForCausalLM

from moba_megatron.config import ConfigError
from moba_megatron.convert.export_hf import export_huggingface
from moba_megatron.convert.exported import open_exported
from moba_megatron.convert.import_hf import import_huggingface
from moba_megatron.convert.initial import check_initial_weights
from moba_megatron.convert.upcycle import Upcycling, asked_for
from moba_megatron.convert.verify import verify_own_export

BECOMES = {"llama-3.1": "mixtral", "qwen2-tied": "qwen2_moe", "qwen3": "qwen3_moe"}


def upcycled(source: Path, out: Path, **changes: Any) -> Path:
    """The export of the mixture that is made of a dense folder."""
    run_ranks(1, lambda: import_huggingface(source, out / "run", upcycling=Upcycling(4, **changes)))
    export_huggingface(open_exported(out / "run"), out / "export")
    return out / "export"


@pytest.mark.parametrize("name", BECOMES)
def test_the_first_logits_are_those_of_the_dense_model(models, tmp_path, name):
    out = upcycled(models[name].folder, tmp_path, experts_per_token=3)
    assert json.loads((out / "config.json").read_text())["model_type"] == BECOMES[name]
    model = AutoModelForCausalLM.from_pretrained(out, attn_implementation="sdpa")
    for ids, expected in zip(models[name].texts, models[name].logits, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)
    # Tokens go to different experts from the first step on.
    routers = [tensor for key, tensor in tensors(out).items() if key.endswith(".gate.weight")]
    assert len(routers) == 4 and all(router.std() > 0.05 for router in routers)


def test_noise_is_in_units_of_each_tensor(models, tmp_path):
    source = models["qwen3"].folder
    plain = tensors(upcycled(source, tmp_path / "plain"))
    noisy = tensors(upcycled(source, tmp_path / "noisy", noise=0.1, seed=5))
    run_ranks(1, verify_own_export, Console(quiet=True), open_exported(tmp_path / "noisy/run"))
    assert not list((tmp_path / "noisy").glob(".verify-*"))
    for key, tensor in plain.items():
        if ".experts." not in key:
            # The seed is the routers' as well.
            assert torch.equal(tensor, noisy[key]) != key.endswith(".gate.weight")
            continue
        assert (noisy[key] - tensor).std() / tensor.std() == pytest.approx(0.1, rel=0.05)
        other = key.replace(".experts.0.", ".experts.1.")
        assert torch.equal(tensor, plain[other])
        assert other == key or not torch.equal(noisy[key], noisy[other])


def test_experts_part_in_training(tmp_path):
    """The command with its gate, and a start of training from what it makes."""
    kind, changes = MODELS["qwen3"]
    source = tmp_path / "source"
    save_model(source, kind(**{**SIZES, **LONG, **changes}))
    shutil.copytree(TOKENS / "tokenizer", source, dirs_exist_ok=True)
    said = call("import-hf", source, tmp_path / "run", "--upcycle-experts", 4, "--verify")
    assert "4 experts in each layer; experts for each token: 2" in said and "verified" in said
    config = started(tmp_path / "on", tmp_path / "run", parallel__expert=2)
    assert (config.model.num_moe_experts, config.model.moe_aux_loss_coeff) == (4, 0.01)
    run_ranks(2, train_here, config, 2)
    export_huggingface(open_exported(config.run.dir), tmp_path / "out")
    after = tensors(tmp_path / "out")
    one, other = (after[f"model.layers.0.mlp.experts.{n}.up_proj.weight"] for n in range(2))
    assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("llama", {"experts": 1}, "--upcycle-experts = 1: a mixture has at least 2"),
        ("llama", {"experts_per_token": 5}, "--experts-per-token = 5 is over --upcycle-experts = 4: use 2 to 4"),
        ("llama", {"experts_per_token": 1}, "--experts-per-token = 1: the weights of the chosen experts add up to 1"),
        ("llama", {"noise": -0.1}, "--noise = -0.1 must be"),
        ("llama", {"noise": float("nan")}, "--noise = nan must be"),
        ("mixtral", {}, "a mixture of 4 experts already: import it without --upcycle-experts"),
        ("phi3-partial-longrope", {}, "MixtralForCausalLM not model.rotary_percent = 0.75"),
        ("smollm3", {}, "MixtralForCausalLM not model.no_rope_freq"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(models, tmp_path, name, changes, expected):
    with pytest.raises(ConfigError) as error:
        import_huggingface(models[name].folder, tmp_path / "run", upcycling=Upcycling(**{"experts": 4, **changes}))
    assert expected in str(error.value)
    assert not list(tmp_path.iterdir())


def test_details_of_a_mixture_that_is_not_asked_for_are_refused():
    assert asked_for(None, experts_per_token=None, noise=None, seed=None) is None
    assert asked_for(8, experts_per_token=None, noise=None, seed=3) == Upcycling(8, seed=3)
    with pytest.raises(ConfigError, match="--experts-per-token and --noise: .* add --upcycle-experts"):
        asked_for(None, experts_per_token=2, noise=0.0, seed=None)


def test_a_training_does_not_make_a_mixture_of_dense_weights_by_itself(models, tmp_path):
    config = started(tmp_path, models["llama"].folder, model__num_moe_experts=4)
    with pytest.raises(ConfigError, match="is dense: turn it into a mixture by .* --upcycle-experts 4, and start from"):
        check_initial_weights(config, 99)

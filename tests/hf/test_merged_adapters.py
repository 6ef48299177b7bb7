"""LoRA on a model that attends by MoBA: merged, saved and loaded, it is MoBA still. With peft where it is installed,
and without it by what its `merge_and_unload` does: modules wrapped, trained, merged and put back in a copy."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_examples import attending, build, close, tokens
from transformers import AutoModelForCausalLM

import moba_megatron.hf as hf


class Adapted(torch.nn.Module):
    """A linear layer plus a product of two thin ones."""

    def __init__(self, base: torch.nn.Linear, rank: int = 4):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = torch.nn.Linear(base.in_features, rank, bias=False, dtype=base.weight.dtype)
        self.up = torch.nn.Linear(rank, base.out_features, bias=False, dtype=base.weight.dtype)
        torch.nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))

    def merged(self) -> torch.nn.Linear:
        layer = copy.deepcopy(self.base)
        layer.weight.data += self.up.weight.data @ self.down.weight.data
        return layer


def adapt(model):
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(layer.self_attn, name, Adapted(getattr(layer.self_attn, name)))


def merge_and_unload(model):
    merged = copy.deepcopy(model)
    for layer in merged.model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(layer.self_attn, name, getattr(layer.self_attn, name).merged())
    return merged


def train(model, parameters):
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    ids = tokens(45)
    for _ in range(3):
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def export(tmp_path):
    """What a user starts from: a folder, loaded without naming the attention."""
    build().save_pretrained(tmp_path / "export")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float64)


def check_is_moba(trained, merged, folder):
    merged.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    ids = tokens(45, seed=3)
    with torch.no_grad():
        want, got = trained.eval()(ids).logits, again(ids).logits
        close(got, want)
        with attending(again, "sdpa"):
            assert (again(ids).logits - want).abs().max() > 1e-2
    assert again.config._attn_implementation == hf.NAME
    assert again.config.moba_config == build().config.moba_config


def test_a_merged_adapter_attends_by_moba(export, tmp_path):
    adapt(export)
    adapters = [p for name, p in export.named_parameters() if ".up." in name or ".down." in name]
    train(export, adapters)
    check_is_moba(export, merge_and_unload(export), tmp_path / "merged")


def test_peft_merges_a_model_that_attends_by_moba(export, tmp_path):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(export, settings)
    train(model, [p for p in model.parameters() if p.requires_grad])
    model.save_pretrained(tmp_path / "adapter")
    trained = copy.deepcopy(model)
    check_is_moba(trained, model.merge_and_unload(), tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float64)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    check_is_moba(trained, loaded.merge_and_unload(), tmp_path / "merged again")

"""The export with its own attention gives what the package gives, without the package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from small_run import small_config, train_here
from transformers import AutoModelForCausalLM

from moba_megatron.config import ConfigError
from moba_megatron.convert.export_hf import export_huggingface
from moba_megatron.convert.exported import open_exported

pytestmark = pytest.mark.once

EXPERTS = {"model__num_moe_experts": 4, "model__moe_ffn_hidden_size": 24}
KINDS = {
    "llama": {},
    "qwen2": {"model__add_qkv_bias": True},
    "phi3": {"model__rotary_percent": 0.75},
    "smollm3": {"model__no_rope_freq": [0, 0, 1, 0]},
    "mixtral": EXPERTS,
    "qwen2_moe": {
        **EXPERTS,
        "model__moe_router_pre_softmax": True,
        "model__moe_shared_expert_intermediate_size": 24,
        "model__moe_shared_expert_gate": True,
    },
}


QUICK = [kind for kind in KINDS if kind != "mixtral"]


@pytest.fixture(scope="module", params=[*QUICK, pytest.param("mixtral", marks=pytest.mark.slow)])
def folders(request, tmp_path_factory):
    """A trained hybrid model, exported plainly and with its own code."""
    folder = tmp_path_factory.mktemp(request.param)
    own = {2: {"block_size": 8, "top_k": 4}}
    config = small_config(folder, training__steps=3, attention__layers=own, **KINDS[request.param])
    run_ranks(1, train_here, config)
    for decode in ("full", "moba"):
        exported = open_exported(config.run.dir)
        export_huggingface(exported, folder / decode, decode=decode)
        export_huggingface(exported, folder / f"own-{decode}", decode=decode, self_contained=True)
    return folder


def without_the_package(cache: Path) -> None:
    """Take back what the import of `moba_megatron.hf` did to transformers, in a process of its own."""
    import transformers
    from transformers import dynamic_module_utils, masking_utils

    for registry in (transformers.AttentionInterface, masking_utils.AttentionMaskInterface):
        registry._global_mapping.pop("moba", None)
    taught = [
        (transformers.PreTrainedModel, "get_correct_attn_implementation"),
        (transformers.PretrainedConfig, "to_dict"),
    ]
    for owner, name in taught:
        setattr(owner, name, getattr(owner, name).__wrapped__)
    dynamic_module_utils.HF_MODULES_CACHE = str(cache)


def outputs(folder: Path, own: bool, cache: Path) -> tuple[str, list[torch.Tensor]]:
    """Logits of a row with left padding beside a whole one, and greedy continuations of both."""
    if own:
        without_the_package(cache)
    else:
        import moba_megatron.hf  # noqa: F401
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=own).eval()
    ids = torch.randint(0, 128, (2, 120), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :23] = 0
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        texts = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
        alone = model(ids[:1, 23:]).logits
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 23] = -100  # padding would predict it
    loss = model(ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    attention = model.model.layers[0].self_attn
    gradient = getattr(attention, "k_proj", getattr(attention, "qkv_proj", None)).weight.grad
    return type(model).__name__, [logits[0, 23:], logits[1], texts, alone, gradient]


@pytest.mark.parametrize("decode", ["full", "moba"])
def test_own_code_gives_what_the_package_gives(folders, tmp_path, decode):
    _, expected = run_ranks(1, outputs, folders / decode, False, tmp_path, prepare=False)[0]
    name, found = run_ranks(1, outputs, folders / f"own-{decode}", True, tmp_path, prepare=False)[0]
    assert name.startswith("MoBA")
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
    torch.testing.assert_close(found[0], found[3][0], rtol=0, atol=2e-6)  # left padding changes nothing


def saved_again(folder: Path, again: Path, cache: Path) -> list[torch.Tensor]:
    """Logits of a model by its own code, and of what it was saved as."""
    without_the_package(cache)
    logits = []
    for source in (folder, again):
        model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True).eval()
        with torch.no_grad():
            logits.append(model(torch.arange(120)[None]).logits)
        if source == folder:
            model.save_pretrained(again)
            assert "attn_implementation" not in model.config.__class__().to_dict()
    return logits


def test_own_code_saved_again_goes_along(folders, tmp_path):
    again = tmp_path / "again"
    before, after = run_ranks(1, saved_again, folders / "own-full", again, tmp_path / "cache", prepare=False)[0]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert (again / "modeling_moba.py").is_file()
    # Without the package and without its code transformers 5 refuses it.
    assert json.loads((again / "config.json").read_text())["attn_implementation"] == "moba"


def packed(folder: Path, cache: Path) -> str:
    """What is said where transformers does not see that rows are packed; the logits are right where it does."""
    without_the_package(cache)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    ids, bounds = torch.arange(100)[None], torch.tensor([0, 60, 100])
    told = {"position_ids": torch.cat([torch.arange(60), torch.arange(40)])[None]}
    told |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 60, "max_length_k": 60}
    with torch.no_grad():
        logits = model(ids, **told, use_cache=False).logits[0]
        for start, end in ((0, 60), (60, 100)):
            alone = model(ids[:, start:end], use_cache=False).logits[0]
            torch.testing.assert_close(logits[start:end], alone, rtol=0, atol=2e-6)
        with pytest.raises(ValueError, match=r"begins documents at \[0, 60\], the mask at \[0\]") as error:
            model(ids, **told)
    return str(error.value)


def test_own_code_takes_packed_rows_where_transformers_sees_them(folders, tmp_path):
    assert "use_cache=False" in run_ranks(1, packed, folders / "own-full", tmp_path, prepare=False)[0]


def test_engines_that_go_by_names_do_not_know_it(folders):
    values = json.loads((folders / "own-full/config.json").read_text())
    assert values["architectures"][0].startswith("MoBA") and values["attn_implementation"] == "moba"


def test_without_moba_layers_there_is_nothing_to_bring(tmp_path):
    config = small_config(tmp_path, training__steps=3, attention__kind="full")
    run_ranks(1, train_here, config)
    with pytest.raises(ConfigError, match="--self-contained: no layer"):
        export_huggingface(open_exported(config.run.dir), tmp_path / "out", self_contained=True)

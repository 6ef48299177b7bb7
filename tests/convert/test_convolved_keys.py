"""Convolved keys in an export: by its own code, with every cache, padded and packed; refused wherever the filters would
be left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from small_run import small_config, train_here
from test_self_contained import without_the_package
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache, StaticCache

from moba_megatron.config import ConfigError
from moba_megatron.convert.export_hf import export_huggingface
from moba_megatron.convert.exported import open_exported
from moba_megatron.convert.import_hf import import_huggingface
from moba_megatron.convert.verify import verify
from moba_megatron.generation.loading import load_generator


@pytest.fixture(scope="module", params=["llama", "qwen3", "full"])
def run(request, tmp_path_factory):
    """Trained filters: plain and behind norms of keys, and a model whose layers all attend fully."""
    folder = tmp_path_factory.mktemp(request.param)
    changes = {"model__qk_layernorm": request.param == "qwen3", "optimizer__lr": 0.05, "model__init_method_std": 0.2}
    if request.param == "full":
        changes["attention__kind"] = "full"
    width = 5 if request.param == "llama" else 3
    config = small_config(folder, training__steps=3, attention__key_convolution=width, **changes)
    run_ranks(1, train_here, config)
    for decode in ("full", "moba"):
        export_huggingface(
            open_exported(config.run.dir, own_code=True), folder / decode, decode=decode, self_contained=True
        )
    return Path(config.run.dir)


def apart(function, *arguments):
    """In a process of its own, whose transformers keeps code of models in a folder of the test's."""
    return run_ranks(1, function, *arguments, prepare=False)[0]


def test_the_export_is_the_model_that_was_trained(run, tmp_path):
    def check():
        from transformers import dynamic_module_utils

        dynamic_module_utils.HF_MODULES_CACHE = str(tmp_path)
        return verify(open_exported(run, own_code=True), run.parent / "full")

    (found,) = run_ranks(1, check)
    assert all(text.relative < 1e-5 for text in found), found
    filters = AutoModelForCausalLM.from_pretrained(
        run.parent / "full", attn_implementation="sdpa", output_loading_info=True
    )
    assert any("k_conv" in name for name in filters[1]["unexpected_keys"])
    card = (run.parent / "full/README.md").read_text()
    assert "**Without that code an engine runs another model**" in card


def own_model(folder: Path, cache: Path, package: bool):
    without_the_package(cache)
    if package:
        import importlib

        import moba_megatron.hf

        importlib.reload(moba_megatron.hf)
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float64).eval()


@torch.no_grad()
def differences(folder: Path, modules: Path, package: bool) -> dict[str, float]:
    """How far logits are from those of single texts, in batches, packs, pieces and steps."""
    model = own_model(folder, modules, package)
    assert type(model).__name__.startswith("ConvolvedMoBA") and model.config._attn_implementation == "moba"
    assert AttentionInterface()["moba"].__module__.startswith("moba_megatron.hf") == package
    ids = torch.randint(1, 128, (2, 120), generator=torch.Generator().manual_seed(0))
    want = [model(ids[:1, 23:], use_cache=False).logits[0], model(ids[1:], use_cache=False).logits[0]]
    found = {}

    def compare(name, got, expected):
        found[name] = float((got - expected).abs().max())

    for side, rows in (("left", slice(23, None)), ("right", slice(0, 97))):
        batch, mask = ids.clone(), torch.ones_like(ids)
        batch[0, rows] = ids[0, 23:]
        mask[0] = 0
        mask[0, rows] = 1
        places = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(batch, attention_mask=mask, position_ids=places, use_cache=False).logits
        compare(f"padded {side}", logits[0, rows], want[0])
        compare(f"beside {side}", logits[1], want[1])
    packed = torch.cat([ids[:1, 23:], ids[1:]], dim=1)
    positions = torch.cat([torch.arange(97), torch.arange(120)])[None]
    logits = model(packed, position_ids=positions, use_cache=False).logits[0]
    compare("packed", logits, torch.cat(want))
    caches = {
        "dynamic": DynamicCache(config=model.config),
        "static": StaticCache(config=model.config, max_cache_len=130),
    }
    for name, cache in caches.items():
        parts = [
            model(ids[1:, start:end], past_key_values=cache, use_cache=True).logits[0]
            for start, end in ((0, 1), (1, 3), (3, 90), *((n, n + 1) for n in range(90, 120)))
        ]
        compare(name, torch.cat(parts), want[1])
    return found


@pytest.mark.parametrize("package", [False, True])
def test_padding_packs_and_caches_change_nothing(run, tmp_path, package):
    found = apart(differences, run.parent / "moba", tmp_path, package)
    assert max(found.values()) < 1e-9, found


@torch.no_grad()
def generated(folder: Path, modules: Path) -> list[list[list[int]]]:
    """Greedy and by beams, from a left-padded batch: with a cache and without."""
    model = own_model(folder, modules, False)
    ids = torch.randint(1, 128, (2, 60), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    settings = {
        "attention_mask": mask,
        "max_new_tokens": 12,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return [
        model.generate(ids, **settings, num_beams=beams, use_cache=cached).tolist()
        for beams in (1, 3)
        for cached in (True, False)
    ]


def test_beams_reorder_what_the_filters_read(run, tmp_path):
    greedy, greedy_again, beams, beams_again = apart(generated, run.parent / "moba", tmp_path)
    assert greedy == greedy_again and beams == beams_again


def test_where_the_filters_would_be_left_out_it_is_refused(run, tmp_path):
    exported = open_exported(run, own_code=True)
    with pytest.raises(ConfigError, match="key_convolution = .*--self-contained"):
        export_huggingface(exported, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    with pytest.raises(ConfigError, match="key_convolution = .*--self-contained"):
        load_generator(run)
    with pytest.raises(ValueError, match="keys are convolved .*trust_remote_code=True"):
        load_generator(run.parent / "full")
    with pytest.raises(ConfigError, match="cannot be read from Hugging Face folders"):
        import_huggingface(run.parent / "full", tmp_path / "back")
    values = json.loads((run.parent / "full/config.json").read_text())
    assert values["moba_config"]["version"] == 2 and values["attn_implementation"] == "moba"
    assert values["architectures"][0].startswith("ConvolvedMoBA")

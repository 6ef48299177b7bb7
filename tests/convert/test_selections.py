"""Layers that choose blocks otherwise than MoBA: trained, exported, and the same in the engine, in transformers with
our package, and in transformers with the export's own code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from small_run import small_config, train_here
from test_self_contained import outputs
from transformers import AutoModelForCausalLM

from moba_megatron.checkpoint.find import saved_config
from moba_megatron.config import ConfigError, load_config
from moba_megatron.convert.export_hf import export_huggingface
from moba_megatron.convert.exported import open_exported
from moba_megatron.convert.import_hf import attention_section, import_huggingface
from moba_megatron.convert.verify import TOLERANCE, verify
from moba_megatron.generation.engine import continue_prompt
from moba_megatron.generation.loading import load_generator
from moba_megatron.hf import MoBACache
from moba_megatron.model.schedule import AttentionSchedule

LAYOUTS = {
    # Windows with a sink, and every third layer full, as in LongGen.
    "longgen": {"full_every_n": 3, "last_n_full": 0, "selector": "sink_recent"},
    "bounds": {"summary": "min_max", "share_selection": "max"},
    "several": {
        "selector": "threshold",
        "threshold": 0.7,
        "summary": "min_max",
        "layers": {1: {"selector": "recent", "block_size": 8, "top_k": 5}, 2: {"selector": "top_k"}},
    },
    # A K of its own for each key head, and summaries that differ between layers.
    "budgets": {
        "layers": {
            1: {"top_k": [2, 5]},
            2: {"selector": "sink_recent", "top_k": [4, 1]},
            3: {"summary": "min_max", "selector": "threshold", "threshold": 0.6, "top_k": [3, 4]},
        }
    },
}


@pytest.fixture(scope="module", params=LAYOUTS)
def run(request, tmp_path_factory):
    """A trained model of four layers, exported for both decode modes, plainly and with its own code."""
    folder = tmp_path_factory.mktemp(request.param)
    attention = {f"attention__{key}": value for key, value in LAYOUTS[request.param].items()}
    config = small_config(folder, training__steps=3, model__init_method_std=0.2, **attention)
    run_ranks(1, train_here, config)
    for decode in ("full", "moba"):
        exported = open_exported(config.run.dir)
        export_huggingface(exported, folder / decode, decode=decode)
        export_huggingface(exported, folder / f"own-{decode}", decode=decode, self_contained=True)
    return Path(config.run.dir)


def test_the_export_is_the_model_that_was_trained(run):
    exported = open_exported(run)
    (found,) = run_ranks(1, verify, exported, run.parent / "full")
    assert found[-1].name == "under MoBA (median token)"
    assert all(text.relative < 1e-5 for text in found), found


@pytest.mark.parametrize("decode", ["full", "moba"])
def test_own_code_gives_what_the_package_gives(run, tmp_path, decode):
    folder = run.parent
    _, expected = run_ranks(1, outputs, folder / decode, False, tmp_path, prepare=False)[0]
    _, found = run_ranks(1, outputs, folder / f"own-{decode}", True, tmp_path, prepare=False)[0]
    for ours, theirs in zip(found, expected, strict=True):
        largest = max(1.0, float(theirs.abs().max()))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE * largest)


@pytest.mark.parametrize("decode", ["full", "moba"])
def test_checkpoint_and_export_generate_the_same(run, decode):
    """By our engine, and by transformers' own with our cache."""
    prompt = torch.randint(1, 128, (90,), generator=torch.Generator().manual_seed(1)).tolist()
    settings = {"max_new_tokens": 24, "temperature": 0.0, "prefill_tokens": 20}
    texts = []
    for path in (run, run.parent / decode):
        generator = load_generator(path, decode)
        texts.append(list(continue_prompt(generator.model, prompt, **settings)))
    model = AutoModelForCausalLM.from_pretrained(run.parent / decode).eval()
    for cache in (MoBACache(), None):
        ids = torch.tensor([prompt])
        new = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None, past_key_values=cache)
        texts.append(new[0, len(prompt) :].tolist())
    assert texts[0] == texts[1] == texts[2] == texts[3]
    if decode == "moba":
        # Each token is that of one pass over the whole text before it.
        with torch.no_grad():
            logits = model(torch.tensor([prompt + texts[0]]), use_cache=False).logits
        assert logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == texts[0]


def test_the_configuration_says_it_and_comes_back(run, tmp_path):
    values = json.loads((run.parent / "full/config.json").read_text())
    moba = values["moba_config"]
    assert moba["version"] == 2
    if run.parent.name.startswith("longgen"):
        assert (moba["selector"], moba["layer_types"]) == ("sink_recent", ["moba", "moba", "full", "moba"])
        card = (run.parent / "full/README.md").read_text()
        assert "the 2 past blocks of 16 tokens that are the first one and the nearest to it" in card
    if run.parent.name.startswith("budgets"):
        assert (moba["top_k"], moba["layer_sizes"], moba["budgets"]) == (
            4,
            {"0": {"block_size": 16, "top_k": 5}},
            [2, 5],
        )
        assert moba["layer_selections"]["1"] == {"selector": "sink_recent", "summary": "mean", "budgets": [4, 1]}
        assert "1, 4 (by key head)" in (run.parent / "full/README.md").read_text()
    run_ranks(1, lambda: import_huggingface(run.parent / "full", tmp_path / "back"))
    before = AttentionSchedule.from_config(saved_config(open_exported(run).checkpoint).attention, 4)
    assert (
        before.differences(AttentionSchedule.from_config(load_config(tmp_path / "back/config.yaml").attention, 4)) == []
    )


def test_what_no_attention_section_says_is_refused():
    moba = {"block_size": 4, "top_k": 3, "version": 2, "summary": "min_max"}
    mixed = {**moba, "layer_selections": {"1": {"selector": "top_k", "share_selection": "mean"}}}
    with pytest.raises(ConfigError, match=r"layers of several share_selection \(mean, none\)"):
        attention_section({"num_hidden_layers": 3, "moba_config": mixed})
    with pytest.raises(ConfigError, match="version 9"):
        attention_section({"num_hidden_layers": 3, "moba_config": {**moba, "version": 9}})

"""Models whose blocks an index chooses: trained, exported, and the same in the engine, in transformers with our
package, and in transformers with the export's own code; and back again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from safetensors.torch import load_file
from small_run import read_metrics, small_config, train_here
from test_self_contained import outputs
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from moba_megatron.checkpoint.find import saved_config
from moba_megatron.config import ConfigError, load_config
from moba_megatron.convert.export_hf import export_huggingface
from moba_megatron.convert.exported import open_exported
from moba_megatron.convert.import_hf import import_huggingface
from moba_megatron.convert.initial import check_initial_weights
from moba_megatron.convert.stored import StoredWeights
from moba_megatron.convert.verify import TOLERANCE, verify
from moba_megatron.generation.engine import continue_prompt
from moba_megatron.generation.loading import load_generator
from moba_megatron.hf import MoBACache, configure, prefill

# Head size 8, 4 query heads, 2 key heads, the last of 4 layers full.
INDEXES = {
    # Heads of another size than attention's, so angles of their own.
    "shared": {"router_dim": 6},
    # One choice for each query head, rotated by the layer's own angles.
    "finest": {"router_dim": 8, "router_heads": "query", "router_keys": "key", "router_norm": "none"},
}


@pytest.fixture(scope="module", params=["shared", pytest.param("finest", marks=pytest.mark.slow)])
def run(request, tmp_path_factory):
    """A trained model of four layers, exported for both decode modes, plainly and with its own code."""
    folder = tmp_path_factory.mktemp(request.param)
    attention = {"router": "index", **INDEXES[request.param], "layers": {2: {"top_k": [2, 4]}}}
    config = small_config(
        folder,
        training__steps=3,
        model__init_method_std=0.2,
        **{f"attention__{key}": value for key, value in attention.items()},
    )
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
    # And the index matters: without it another choice gives other logits.
    folder = run.parent / "full"
    ids = torch.randint(1, 128, (1, 128), generator=torch.Generator().manual_seed(3))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(ids).logits
        model.model.layers[1].self_attn.block_router.query.weight.neg_()
        assert (model(ids).logits - logits).abs().max() > 1e-3


@pytest.mark.parametrize("decode", ["full", "moba"])
def test_own_code_gives_what_the_package_gives(run, tmp_path, decode):
    folder = run.parent
    _, expected = run_ranks(1, outputs, folder / decode, False, tmp_path, prepare=False)[0]
    name, found = run_ranks(1, outputs, folder / f"own-{decode}", True, tmp_path, prepare=False)[0]
    for ours, theirs in zip(found, expected, strict=True):
        largest = max(1.0, float(theirs.abs().max()))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE * largest)


@pytest.mark.parametrize("decode", ["full", "moba"])
def test_checkpoint_and_export_generate_the_same(run, decode):
    """By our engine, and by transformers' own with both kinds of cache."""
    prompt = torch.randint(1, 128, (90,), generator=torch.Generator().manual_seed(1)).tolist()
    settings = {"max_new_tokens": 24, "temperature": 0.0, "prefill_tokens": 20}
    texts = []
    for path in (run, run.parent / decode, run.parent / f"own-{decode}"):
        generator = load_generator(path, decode)
        texts.append(list(continue_prompt(generator.model, prompt, **settings)))
    model = AutoModelForCausalLM.from_pretrained(run.parent / decode).eval()
    for cache in (MoBACache(), None):
        new = model.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None, past_key_values=cache
        )
        texts.append(new[0, len(prompt) :].tolist())
    assert all(text == texts[0] for text in texts), texts
    if decode == "moba":
        # Each token is that of one pass over the whole text before it.
        with torch.no_grad():
            logits = model(torch.tensor([prompt + texts[0]]), use_cache=False).logits
        assert logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == texts[0]


def test_caches_keep_the_index_through_whatever_happens_to_their_rows(run):
    """Rows of different padding in pieces; beams; and what an index cannot keep raises."""
    model = AutoModelForCausalLM.from_pretrained(run.parent / "moba").eval()
    ids = torch.randint(1, 128, (2, 100), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :21] = 0
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, use_cache=False).logits
        for cache in (MoBACache(), DynamicCache(config=model.config)):
            prefill(model, ids, cache, piece=17, attention_mask=mask)
            seen = cache.get_seq_length()
            assert len(cache.layers) == 4 + 3 and cache.layers[4].get_seq_length() == seen
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, seen:]
            rest = model(ids[:, seen:], attention_mask=mask, position_ids=positions, past_key_values=cache).logits
            torch.testing.assert_close(rest, whole[:, seen:], rtol=0, atol=1e-4)
    beams = [
        model.generate(ids, attention_mask=mask, max_new_tokens=6, num_beams=3, do_sample=False, past_key_values=cache)
        for cache in (MoBACache(), None)
    ]
    assert torch.equal(*beams)
    static = StaticCache(config=model.config, max_cache_len=128)
    with torch.no_grad(), pytest.raises(ValueError, match="StaticCache: an index of blocks needs a cache that keeps"):
        model(ids, past_key_values=static)
    full = DynamicCache(config=model.config)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        model(ids, past_key_values=full)
    model.set_attn_implementation("moba")
    with torch.no_grad(), pytest.raises(ValueError, match="100 tokens of layer 0, and index keys of 0"):
        model(ids[:, :1], past_key_values=full)


def test_the_configuration_says_it_and_the_weights_come_back(run, tmp_path):
    folder, exported = run.parent, open_exported(run)
    moba = json.loads((folder / "full/config.json").read_text())["moba_config"]
    attention = saved_config(exported.checkpoint).attention
    assert (moba["version"], moba["router"], moba["router_dim"]) == (3, "index", attention.router_dim)
    weights = load_file(folder / "full/model.safetensors")
    assert "model.layers.2.self_attn.block_router.query.weight" in weights
    assert not any("layers.3.self_attn.block_router" in name for name in weights)
    assert "by an index with weights of its own" in (folder / "full/README.md").read_text()
    run_ranks(1, lambda: import_huggingface(folder / "full", tmp_path / "back"))
    back = load_config(tmp_path / "back/config.yaml").attention
    for key in ("router", "router_dim", "router_heads", "router_keys", "router_norm"):
        assert getattr(back, key) == getattr(attention, key)
    ours, theirs = StoredWeights(exported.checkpoint), StoredWeights(open_exported(tmp_path / "back").checkpoint)
    names = ours.names(exported.model)
    assert theirs.names(exported.model) == names and any("block_router" in name for name in names)
    for name in names:
        shape = ours._shape(name)
        assert torch.equal(ours.read(name, shape), theirs.read(name, shape)), name


def test_training_starts_from_the_folder_at_every_layout(run, tmp_path):
    """The index of a rank has the rows of its heads: the same losses, its own too."""
    first = []
    for ranks in (1, 2):
        attention = open_exported(run).config.attention.model_dump(mode="json")
        config = small_config(
            tmp_path / f"on_{ranks}",
            training__steps=3,
            model__init_from=str(run.parent / "full"),
            parallel__tensor=ranks,
            **{f"attention__{key}": value for key, value in attention.items()},
        )
        run_ranks(ranks, train_here, config, ranks)
        first.append(next(line for line in read_metrics(Path(config.run.dir)) if "loss" in line))
    assert first[1]["loss"] == pytest.approx(first[0]["loss"], rel=1e-6)
    (by_layer,) = (value for value in first[0].values() if isinstance(value, list) and "entropy" in value[0])
    (of_two,) = (value for value in first[1].values() if isinstance(value, list) and "entropy" in value[0])
    assert [layer["layer"] for layer in by_layer] == [1, 2, 3]
    for ours, theirs in zip(by_layer, of_two, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4)


def test_a_folder_without_the_runs_index_is_refused(run, tmp_path):
    folder, config = run.parent / "full", open_exported(run).config
    same = config.model_copy(update={"model": config.model.model_copy(update={"init_from": str(folder)})})
    assert not any("index" in line for line in check_initial_weights(same, 128))
    own = same.attention.model_copy(update={"router": "own"})
    with pytest.raises(ConfigError, match="attention.router = own, but .* has an index"):
        check_initial_weights(same.model_copy(update={"attention": own}), 128)
    other = same.attention.model_copy(update={"router_dim": 4})
    with pytest.raises(ConfigError, match=r"another one: attention.router_dim = 4, not"):
        check_initial_weights(same.model_copy(update={"attention": other}), 128)


OTHERS = {
    "convolved": {"attention__key_convolution": 3, "attention__router_keys": "key"},
    "smollm3": {"model__no_rope_freq": [0, 0, 1, 0]},
    "phi3": {"model__rotary_percent": 0.75, "attention__router_dim": 16},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_models(kind, tmp_path):
    """Convolved keys, whose export brings the code of both; layers without rotation; heads that are rotated in part."""
    settings = {"attention__router": "index", "attention__router_dim": 6, **OTHERS[kind]}
    config = small_config(tmp_path, training__steps=3, model__init_method_std=0.2, **settings)
    run_ranks(1, train_here, config)
    exported = open_exported(config.run.dir, own_code=True)
    export_huggingface(exported, tmp_path / "out", self_contained=kind == "convolved")
    (found,) = run_ranks(1, verify, exported, tmp_path / "out")
    assert found[-1].name == "under MoBA (median token)" and all(text.relative < 1e-5 for text in found), found


def test_a_loaded_model_is_saved_with_its_index(run, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(run.parent / "moba").eval()
    index = [name for name, parameter in model.named_parameters() if "block_router" in name]
    assert index and not any(parameter.requires_grad for name, parameter in model.named_parameters() if name in index)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    ids = torch.randint(1, 128, (1, 120), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
    configure(again, block_size=8, top_k=3, last_n_full=1)
    assert again.config.moba_config["router"] == "index"
    with torch.no_grad():
        again(ids)
    with pytest.raises(ValueError, match=r"by an index .*, and layers 3, counted from 0, have none: let them attend"):
        configure(again, block_size=8, top_k=3)
    assert again.config.moba_config["layer_types"][3] == "full"


def test_layers_that_become_full_lose_their_index(run, tmp_path):
    """So a saved folder has the weights that its configuration tells of."""
    model = AutoModelForCausalLM.from_pretrained(run.parent / "moba").eval()
    configure(model, block_size=8, top_k=3, last_n_full=3, decode="moba")
    names = {name for name, _ in model.named_parameters() if "block_router" in name}
    assert names and all(name.startswith("model.layers.0.") for name in names)
    model.save_pretrained(tmp_path)
    again, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not found["unexpected_keys"] and not found["missing_keys"]
    ids = torch.randint(1, 128, (1, 120), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        whole = model(ids).logits
        assert torch.equal(whole, again.eval()(ids).logits)
        cached = model(ids[:, :100], past_key_values=(cache := MoBACache())).logits
        cached = torch.cat([cached, model(ids[:, 100:], past_key_values=cache).logits], dim=1)
    assert (cached - whole).abs().max() < 1e-4

"""The attention in transformers models: whole texts, padded, packed and in batches, compared with the definition."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hf_examples import (
    BLOCK_SIZE,
    MODELS,
    SELECTIONS,
    TOP_K,
    attending,
    build,
    choosing,
    close,
    padded,
    tokens,
    truth,
)
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, MistralConfig, MistralForCausalLM

import moba_megatron.hf as hf

RECENT = {"selector": "recent", "summary": "mean"}
LENGTHS = (18, 1, 26)
BOUNDS = torch.tensor([0, 18, 19, 45], dtype=torch.int32)


@pytest.mark.parametrize("family", MODELS)
def test_stock_models_attend_by_moba(family):
    model, ids = build(family), tokens(45)
    with torch.no_grad():
        got = model(ids).logits
        with attending(model, "sdpa"):
            full = model(ids).logits
    close(got, truth(model, ids))
    assert (got - full)[:, TOP_K * BLOCK_SIZE :].abs().max() > 1e-2
    close(got[:, : TOP_K * BLOCK_SIZE], full[:, : TOP_K * BLOCK_SIZE])


def test_layers_attend_by_their_kind():
    ids = tokens(45)
    with torch.no_grad():
        kinds = [build(last_n_full=n)(ids).logits for n in (0, 1, 3)]
        model = build()
        with attending(model, "sdpa"):
            full = model(ids).logits
    assert (kinds[0] - kinds[1]).abs().max() > 1e-2
    close(kinds[2], full)


def test_layers_may_have_sizes_of_their_own():
    model, ids = build(), tokens(45)
    with torch.no_grad():
        same = model(ids).logits
        model.config.moba_config["layer_sizes"] = {"1": {"block_size": 8, "top_k": 2}}
        other = model(ids).logits
        close(other, truth(model, ids))
    assert (same - other).abs().max() > 1e-2
    settings = hf.MoBASettings.from_config(model.config)
    assert settings.covered == 12 and settings.to_config() == model.config.moba_config


@pytest.mark.parametrize("name", SELECTIONS)
@torch.no_grad()
def test_blocks_are_chosen_as_the_layers_say(name):
    """Whole, padded and packed. Bounds of channels change with positions, which are said therefore."""
    model, ids = choosing(build(), SELECTIONS[name]), tokens(45)
    want = truth(model, ids)
    close(model(ids).logits, want)
    assert (build()(ids).logits - want).abs().max() > 1e-2
    batch, mask = padded([tokens(45), tokens(30, seed=1)], "left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(batch, attention_mask=mask, position_ids=positions).logits
    close(logits[1, 15:][None], truth(model, tokens(30, seed=1)))
    separate = torch.cat([truth(model, tokens(length, seed=length)) for length in LENGTHS], dim=1)
    close(model(**packed()).logits, separate)


def test_settings_of_selections_come_back(tmp_path):
    model = choosing(build(), SELECTIONS["threshold"])
    settings = hf.MoBASettings.from_config(model.config)
    assert settings.to_config() == {**model.config.moba_config, "layer_selections": {"1": RECENT}}
    assert settings.covered == 8  # a threshold takes one past block at least
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    with torch.no_grad():
        close(again(tokens(45)).logits, model(tokens(45)).logits)
    configured = hf.configure(build(), block_size=4, top_k=3, last_n_full=1, decode="moba", selector="recent")
    assert configured.to_config() == {**build().config.moba_config, "version": 2, **RECENT}
    # Plain layers keep the words and the version that older readers know.
    assert hf.MoBASettings(4, 3, ("moba", "full")).to_config() == {
        **{"block_size": 4, "top_k": 3, "layer_types": ["moba", "full"]},
        **{"decode": "full", "version": 1},
    }


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", [True, False])
def test_padding_changes_nothing(side, positions):
    model, rows = build(), [tokens(length, seed=length) for length in (45, 9, 30, 1)]
    ids, mask = padded(rows, side)
    given = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if positions else {}
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, **given).logits
    for row, text in enumerate(rows):
        close(logits[row, mask[row].bool()][None], truth(model, text))


@pytest.mark.parametrize("use_cache", [True, False])
def test_packed_rows_are_separate(use_cache):
    model = build()
    rows = [[tokens(length, seed=length) for length in lengths] for lengths in ((18, 1, 26), (45,), (7, 38))]
    ids = torch.cat([torch.cat(row, dim=1) for row in rows])
    positions = torch.stack([torch.cat([torch.arange(text.shape[1]) for text in row]) for row in rows])
    with torch.no_grad():
        logits = model(ids, position_ids=positions, use_cache=use_cache).logits
    for got, row in zip(logits, rows, strict=True):
        close(got[None], torch.cat([truth(model, text) for text in row], dim=1))


def packed(lengths=LENGTHS, **keywords):
    """A packed row [1, 45] as transformers' own collator makes it for trainers, and what else a call is given."""
    texts = [{"input_ids": tokens(length, seed=length)[0].tolist()} for length in lengths]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = collate(texts, return_tensors="pt")
    del batch["labels"]
    return {**batch, "use_cache": False, **keywords}


@torch.no_grad()
def test_keywords_of_packing_are_taken_where_they_say_what_positions_say():
    model, given = build(), packed()
    separate = torch.cat([truth(model, tokens(length, seed=length)) for length in LENGTHS], dim=1)
    close(model(**given).logits, separate)
    for left_out in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"):
        some = {name: value for name, value in given.items() if name != left_out}
        close(model(**some).logits, separate)
    # Two rows laid end to end, and an empty document.
    ids, positions = (given[name].expand(2, -1) for name in ("input_ids", "position_ids"))
    bounds = torch.tensor([0, 18, 19, 19, 45, 63, 64, 90])
    both = model(input_ids=ids, position_ids=positions, use_cache=False, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds)
    close(both.logits, separate.expand(2, -1, -1))


@torch.no_grad()
def test_keywords_of_packing_may_stop_before_padding():
    """Padding after the last boundary, or hidden by the mask, is of no document."""
    model, given, padding = build(), packed(), torch.zeros(1, 3, dtype=torch.int64)
    wider = {name: torch.cat([given[name], padding], dim=1) for name in ("input_ids", "position_ids")}
    want = model(**packed()).logits
    rest = {name: given[name] for name in ("cu_seq_lens_q", "cu_seq_lens_k", "use_cache")}
    close(model(**wider, **rest).logits[:, :45], want)
    hidden = {"attention_mask": (torch.arange(48) < 45).long()[None]}
    rest["cu_seq_lens_q"] = rest["cu_seq_lens_k"] = torch.cat([BOUNDS, torch.tensor([48])])
    close(model(**wider, **hidden, **rest).logits[:, :45], want)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (
            {"cu_seq_lens_k": BOUNDS + torch.tensor([0, 1, 0, 0])},
            r"cu_seq_lens_k and position_ids .*\[0, 19\].*\[0, 18, 19\]",
        ),
        (
            {"cu_seq_lens_q": torch.tensor([0, 45])},
            r"cu_seq_lens_q and position_ids describe different documents.*\[0\]",
        ),
        ({"cu_seq_lens_q": torch.tensor([0, 9, 18, 19, 45])}, r"\[0, 9, 18, 19\].*\[0, 18, 19\]"),
        ({"cu_seq_lens_q": torch.tensor([0, 18, 19, 44])}, "ends at 44"),
        ({"cu_seq_lens_q": torch.tensor([0, 18, 19, 46])}, "ends at token 46, but the batch has 1 x 45 = 45"),
        ({"cu_seq_lens_q": torch.tensor([5, 18, 45])}, r"\[5, 18, 45\] must rise from 0"),
        ({"position_ids": None}, "seq_idx and position_ids describe different documents.*start again at 0"),
        ({"seq_idx": torch.zeros(1, 45, dtype=torch.int32)}, "seq_idx and position_ids describe different documents"),
        ({"seq_idx": torch.zeros(1, 44, dtype=torch.int32)}, r"seq_idx of shape \(1, 44\)"),
    ],
)
@torch.no_grad()
def test_keywords_of_packing_that_say_something_else_raise(keywords, message):
    with pytest.raises(ValueError, match=message):
        build()(**packed(**keywords))


@torch.no_grad()
def test_packed_rows_are_not_continued_with_keywords_of_packing():
    model, cache = build(), hf.MoBACache()
    model(tokens(20), past_key_values=cache)
    with pytest.raises(ValueError, match="cu_seq_lens_q and cu_seq_lens_k with a cache"):
        bounds = torch.tensor([0, 1], dtype=torch.int32)
        model(tokens(1), past_key_values=cache, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds)


def test_gradients_also_under_recomputation():
    """Against autograd through the definition, for a padded batch of two."""
    rows = [tokens(33), tokens(21, seed=1)]
    ids, mask = padded(rows, "left")
    # The first token of a text has nothing to be predicted from.
    labels = ids.masked_fill(mask.cumsum(1) < 2, -100)

    def gradients(model, recompute):
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        loss = model(ids, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        return [p.grad for p in model.parameters()]

    model = build()
    with attending(model, "moba_by_definition"):
        losses = [model(row, labels=row, use_cache=False).loss * (row.shape[1] - 1) for row in rows]
        (sum(losses) / (mask.sum() - 2)).backward()
    for recompute in (False, True):
        for got, parameter in zip(gradients(build(), recompute), model.parameters(), strict=True):
            close(got, parameter.grad)


def test_saved_settings_come_back(tmp_path):
    model, ids = build(), tokens(30)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="moba", dtype=torch.float64).eval()
    with torch.no_grad():
        close(again(ids).logits, model(ids).logits)


def test_missing_settings_raise():
    model = build()
    del model.config.moba_config
    with pytest.raises(ValueError, match=r"llama has no moba_config.*configure"):
        model(tokens(5))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"block_size": 4}, r"lacks \['top_k'\]"),
        ({"block_size": 4, "top_k": 2, "blocks": 1}, r"unknown keys \['blocks'\]"),
        ({"block_size": 0, "top_k": 2}, "block_size.*0"),
        ({"block_size": 4, "top_k": 2, "decode": "sparse"}, "decode.*'sparse'"),
        ({"block_size": 4, "top_k": 2, "layer_types": ["moba"]}, "1 layer_types, the model has 3"),
        ({"block_size": 4, "top_k": 2, "layer_types": ["moba", "dense", "full"]}, r"layer_types\[1\].*'dense'"),
        ({"block_size": 4, "top_k": 2, "version": 7}, "version 7"),
        ({"block_size": 4, "top_k": 2, "layer_sizes": {"0": [8, 2]}}, "layer_sizes must be like"),
        ({"block_size": 4, "top_k": 2, "selector": "recent"}, r"unknown keys \['selector'\]"),
        ({"block_size": 4, "top_k": 2, "version": 2, "selector": "best"}, "selector = 'best'"),
        ({"block_size": 4, "top_k": 2, "version": 2, "selector": "threshold"}, "threshold = None"),
        ({"block_size": 4, "top_k": 2, "version": 2, "layer_selections": {"0": "recent"}}, "layer_selections must be"),
        ({"block_size": 4, "top_k": 2, "version": 2, "layer_selections": {"0": {"top_k": 3}}}, r"got \['top_k'\]"),
        (
            {"block_size": 4, "top_k": 2, "version": 2, "layer_selections": {"3": RECENT}},
            "layer 3, .* not a moba layer",
        ),
        (
            {"block_size": 4, "top_k": 2, "layer_sizes": {"3": {"block_size": 8, "top_k": 2}}},
            "layer 3, .* not a moba layer",
        ),
    ],
)
def test_wrong_settings_raise(entry, message):
    model = build()
    model.config.moba_config = entry
    with pytest.raises(ValueError, match=message):
        model(tokens(5))


def test_configure_refuses_more_full_layers_than_layers():
    with pytest.raises(ValueError, match="number of layers, 3, got 4"):
        hf.configure(build(), block_size=4, top_k=2, last_n_full=4)


def test_what_is_not_moba_raises():
    model, ids = build(), tokens(20)
    causal = torch.ones(20, 20, dtype=torch.bool).tril()[None, None]
    gap = torch.ones(1, 20, dtype=torch.int64).index_fill(1, torch.tensor([7]), 0)
    for arguments, message in (
        ({"attention_mask": causal}, r"mask of torch.bool and shape \(1, 1, 20, 20\)"),
        ({"attention_mask": gap}, "padding between real tokens in row 0"),
        ({"attention_mask": gap[:, :5]}, "covers 5 tokens, cache and input hold 20"),
        ({"output_attentions": True}, "output_attentions"),
        ({"softcap": 30.0}, "softcap = 30.0"),
    ):
        with pytest.raises(ValueError, match=message):
            model(ids, **arguments)
    model.model.layers[0].self_attn.is_causal = False
    with pytest.raises(ValueError, match="causal"):
        model(ids)


def test_dropout_and_windows_raise():
    model = build(attention_dropout=0.1)
    model(tokens(5))
    with pytest.raises(ValueError, match="dropout in attention, got 0.1"):
        model.train()(tokens(5))
    sizes = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    windowed = MistralForCausalLM(MistralConfig(vocab_size=97, sliding_window=8, **sizes))
    hf.configure(windowed, block_size=4, top_k=2)
    for length in (5, 20):
        with pytest.raises(ValueError, match="window"):
            windowed(tokens(length))


def test_a_window_matters_to_the_layers_that_have_it():
    """Qwen 2 MoE always makes a mask with a window, of 0 tokens where no layer has one."""
    assert build("qwen2_moe").config.sliding_window == 0
    # The first layer of three has the window.
    windowed = build("qwen2_moe", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    assert windowed.config.layer_types == ["sliding_attention", "full_attention", "full_attention"]
    windowed(tokens(5))
    with pytest.raises(ValueError, match="the mask hides early tokens of a document \\(a window\\)"):
        windowed(tokens(20))


def test_16_bit_and_autocast():
    model, ids = build().float(), tokens(45)
    with torch.no_grad():
        want = model(ids).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (model(ids).logits - want).isfinite().all()
        logits = model.bfloat16()(ids).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


def test_imports_without_megatron():
    code = (
        "import sys\n"
        "for name in ('megatron', 'triton', 'pydantic', 'omegaconf'): sys.modules[name] = None\n"
        "import moba_megatron.hf, transformers\n"
        "print('moba' in transformers.AttentionInterface())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "True", done.stderr


@torch.no_grad()
def test_a_compiled_model_gives_the_same():
    model, (ids, mask) = build(), padded([tokens(45), tokens(20, seed=1)], "left")
    compiled = torch.compile(model, backend="eager")
    close(compiled(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)

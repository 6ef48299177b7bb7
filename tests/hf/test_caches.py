"""Generation: a cache changes nothing, whichever it is, however the prompt comes and whatever beams do to it."""

from __future__ import annotations

import pytest
import torch
from hf_examples import MODELS, SELECTIONS, build, choosing, close, padded, tokens, truth
from transformers import DynamicCache, StaticCache

import moba_megatron.hf as hf
from moba_megatron.benchmark.calls import peak_bytes
from moba_megatron.generation.engine import continue_prompt

CACHES = {
    "moba": lambda model: hf.MoBACache(),
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=70),
}


@torch.no_grad()
def in_pieces(model, cache, ids, bounds, mask=None):
    """Logits of texts that go through a cache piece by piece."""
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    parts = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        out = model(
            ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            cache_position=torch.arange(start, end),
            past_key_values=cache,
            use_cache=True,
        )
        parts.append(out.logits)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", MODELS)
def test_moba_mode_token_by_token_equals_one_pass(family, cache):
    model, ids = build(family), tokens(45)
    bounds = [0, 10, *range(11, 46)]
    close(in_pieces(model, CACHES[cache](model), ids, bounds), truth(model, ids))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", SELECTIONS)
def test_every_selection_goes_through_a_cache(name, cache):
    """In pieces and token by token, alone and in padded rows, like one pass."""
    model, ids = choosing(build(), SELECTIONS[name]), tokens(45)
    close(in_pieces(model, CACHES[cache](model), ids, [0, 3, 20, 33, *range(34, 46)]), truth(model, ids))
    rows = [tokens(length, seed=length) for length in (40, 29)]
    batch, mask = padded(rows, "left")
    logits = in_pieces(model, CACHES[cache](model), batch, [0, 9, 31, *range(32, 41)], mask)
    for row, text in enumerate(rows):
        close(logits[row, mask[row].bool()][None], truth(model, text))


def test_a_cache_whose_selection_changes_forgets_its_summaries():
    cache, ids = hf.MoBACache(), tokens(45)
    model = build()
    in_pieces(model, cache, ids[:, :40], [0, *range(30, 41)])
    other = choosing(build(), SELECTIONS["min_max"])
    settings = {"past_key_values": cache, "cache_position": torch.arange(40, 45), "use_cache": True}
    fresh = DynamicCache(config=model.config)
    in_pieces(model, fresh, ids[:, :40], [0, *range(30, 41)])
    with torch.no_grad():
        got = other(ids[:, 40:], **settings).logits
        close(got, other(ids[:, 40:], **settings | {"past_key_values": fresh}).logits)


@pytest.mark.parametrize("cache", CACHES)
def test_full_mode_equals_the_hybrid_of_prompt_and_the_rest(cache):
    model, ids = build(decode="full"), tokens(60)
    got = in_pieces(model, CACHES[cache](model), ids, [0, *range(33, 61)])
    want = truth(model, ids, prompt_length=33)
    close(got, want)
    assert (got - truth(model, ids)).abs().max() > 1e-2


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("decode", ["moba", "full"])
def test_pieces_of_a_prompt_equal_one_pass(cache, decode):
    """Pieces of few and of many tokens, that end inside blocks and at their ends."""
    model, ids = build(decode=decode), tokens(64)
    close(in_pieces(model, CACHES[cache](model), ids, [0, 3, 5, 16, 31, 33, 54, 64]), truth(model, ids))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("decode", ["moba", "full"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_through_a_cache(cache, decode, side):
    """Each row is its own text; a piece may hold nothing but padding of a row."""
    model, lengths = build(decode=decode), (40, 17, 29)
    rows = [tokens(length, seed=length) for length in lengths]
    ids, mask = padded(rows, side)
    # In `full` mode single tokens come last, and only where no row has ended.
    bounds = [0, 9, 20, *range(37, 41)] if side == "left" else [0, 9, 20, 37, 40]
    logits = in_pieces(model, CACHES[cache](model), ids, bounds, mask)
    for row, text in enumerate(rows):
        prompt = text.shape[1] - 3 if decode == "full" and side == "left" else None
        close(logits[row, mask[row].bool()][None], truth(model, text, prompt))


@pytest.mark.parametrize("decode", ["moba", "full"])
@pytest.mark.parametrize("search", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 20}])
def test_generate_is_the_same_with_every_cache(decode, search):
    """Left-padded batch, and each row alone. Without a cache, `moba` mode only: full mode is about caches."""
    model, rows = build(decode=decode), [tokens(length, seed=length) for length in (30, 13)]
    ids, mask = padded(rows, "left")

    def generate(ids, mask, **arguments):
        torch.manual_seed(0)
        settings = {"do_sample": False, "max_new_tokens": 14} | search | arguments
        return model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]

    want = generate(ids, mask)
    assert torch.equal(generate(ids, mask, past_key_values=hf.MoBACache()), want)
    assert torch.equal(generate(ids, mask, cache_implementation="static"), want)
    filled = hf.prefill(model, ids, hf.MoBACache(room=60), piece=7, attention_mask=mask)
    assert filled.get_seq_length() == 28
    if "num_beams" in search:
        filled.batch_repeat_interleave(3)
    assert torch.equal(generate(ids, mask, past_key_values=filled), want)
    if decode == "moba":
        assert torch.equal(generate(ids, mask, use_cache=False), want)
    if "do_sample" not in search:
        for row, text in enumerate(rows):
            assert torch.equal(generate(text, torch.ones_like(text))[0], want[row])


@pytest.mark.parametrize("cache", [None, hf.MoBACache])
def test_guessed_tokens_are_cropped_again(cache):
    """Prompt lookup: several guessed tokens a step, of which the wrong ones leave the cache. `moba` mode."""
    model, ids = build(), torch.cat([tokens(20), tokens(20)], dim=1)
    settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 25, "eos_token_id": 1}
    given = {} if cache is None else {"past_key_values": cache()}
    assert torch.equal(
        model.generate(ids, prompt_lookup_num_tokens=4, **given, **settings), model.generate(ids, **settings)
    )


@torch.no_grad()
def test_reordering_repeating_choosing_and_cropping():
    """After each of them the cache goes on as one that was filled with the rows as they are then."""
    model = build()
    ids = torch.cat([tokens(60, seed=seed) for seed in range(3)])
    cache = hf.MoBACache()
    in_pieces(model, cache, ids[:, :21], [0, 20, 21])
    for change, order in (
        (lambda: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda: cache.batch_select_indices(torch.tensor([1, 4, 5])), [1, 4, 5]),
        (lambda: cache.crop(-3), [0, 1, 2]),
    ):
        change()
        ids, seen = ids[order], cache.get_seq_length()
        ids[:, seen:] = torch.cat([tokens(60 - seen, seed=seen + row) for row in range(len(ids))])
        logits = model(ids[:, seen : seen + 1], past_key_values=cache, use_cache=True).logits
        logits = [logits, model(ids[:, seen + 1 : seen + 7], past_key_values=cache, use_cache=True).logits]
        for row, got in zip(ids, torch.cat(logits, dim=1), strict=True):
            close(got[None], truth(model, row[None, : seen + 7])[:, seen:])
    cache.crop(10)
    assert cache.get_seq_length() == 10
    cache.reset()
    assert cache.get_seq_length() == 0
    close(in_pieces(model, cache, ids[:1], [0, 30, 31]), truth(model, ids[:1, :31]))


def test_room_is_kept_and_doubles():
    cache = hf.MoBACache(room=100)
    keys = torch.randn(1, 2, 90, 8)
    cache.update(keys, keys, 0)
    layer = cache.layers[0]
    where = layer.keys.data_ptr()
    for _ in range(10):
        got, _ = cache.update(keys[:, :, :1], keys[:, :, :1], 0)
    assert layer.keys.data_ptr() == where == got.data_ptr()
    cache.update(keys[:, :, :1], keys[:, :, :1], 0)
    assert layer.keys.data_ptr() != where and layer._store.shape[3] == 202
    assert torch.equal(layer.keys[:, :, :90], keys)
    with pytest.raises(ValueError, match="one shape"):
        cache.update(keys, keys[:, :, :1], 0)
    with pytest.raises(ValueError, match="holds 1 rows, got 2"):
        cache.update(keys.expand(2, -1, -1, -1), keys.expand(2, -1, -1, -1), 0)


def test_no_gradient_through_a_cache():
    model, ids, cache = build(), tokens(30), hf.MoBACache()
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
    loss = model(ids[:, 20:], past_key_values=cache, labels=ids[:, 20:]).loss
    with pytest.raises(RuntimeError, match="no gradient through a key/value cache"):
        loss.backward()


@torch.no_grad()
def test_packed_rows_are_not_continued():
    model, ids, cache = build(), tokens(30), hf.MoBACache()
    positions = torch.cat([torch.arange(20), torch.arange(10)])[None]
    model(ids, position_ids=positions, past_key_values=cache)
    with pytest.raises(ValueError, match="row 0 goes on at position 10 after 30 tokens"):
        model(ids[:, :1], position_ids=torch.tensor([[10]]), past_key_values=cache)


def test_the_peak_of_a_prefill_goes_with_its_pieces_and_not_with_the_prompt():
    """Beside the cache, whose room is for the whole text."""
    model = build(intermediate_size=512, max_position_embeddings=2048)
    hf.configure(model, block_size=64, top_k=3, last_n_full=1)

    def beside_the_cache(length: int, piece: int) -> int:
        prompt = tokens(length)[0].tolist()
        settings = {"max_new_tokens": 1, "temperature": 0.0, "prefill_tokens": piece}
        cache = (length + 1) * 3 * 2 * (2 * 8) * 8  # keys and values of three layers, two heads of 8 in fp64
        return peak_bytes(lambda: list(continue_prompt(model, prompt, **settings)), "cpu") - cache

    small, large = ([beside_the_cache(length, piece) for length in (1024, 2048)] for piece in (256, 512))
    for short, long in (small, large):
        assert long == pytest.approx(short, rel=0.05)
    assert 0 < small[1] < 0.6 * large[1]
    assert beside_the_cache(1024, 1024) > 1.7 * large[0]


def test_prefill_refuses_pieces_that_leave_single_tokens():
    with pytest.raises(ValueError, match="at least 3 tokens, got 2"):
        hf.prefill(build(), tokens(9), hf.MoBACache(), piece=2)

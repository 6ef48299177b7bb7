"""The convolution of keys: its definition, at every parallel size, in training, checkpoints and at the borders."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from model_examples import pack, tiny, train, train_each
from parallel.examples import zigzag
from small_run import numbers_of, read_metrics, small_config, train_here

from moba_megatron.config import ConfigError
from moba_megatron.convert.export_hf import export_huggingface
from moba_megatron.convert.exported import open_exported
from moba_megatron.convert.initial import check_initial_weights
from moba_megatron.convert.stored import StoredWeights
from moba_megatron.model.builder import count_parameters, transformer_config
from moba_megatron.model.key_convolution import KeyConvolution

VOCABULARY, STEPS, HEADS, SIZE = 62, 3, 2, 4
BOUNDS = [0, 16, 24, 24, 56, 64]
PACKS = [[0, 30, 31, 64], [0, 64], [0, 5, 9, 40, 63, 64], [0, 33, 64]]


def convolution(width: int) -> KeyConvolution:
    """With filters drawn, and in fp64."""
    config = dataclasses.replace(transformer_config(tiny(), device_type="cpu"), use_cpu_initialization=True)
    module = KeyConvolution(config, width, HEADS, SIZE, None).double()
    generator = torch.Generator().manual_seed(width)
    module.weight.data = torch.randn(module.weight.shape, generator=generator, dtype=torch.float64)
    return module


def keys(tokens: int, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and the gradient of what they become, [tokens, batch, heads, size]."""
    generator = torch.Generator().manual_seed(tokens)
    return tuple(torch.randn(tokens, batch, HEADS, SIZE, generator=generator, dtype=torch.float64) for _ in range(2))


def definition(key: torch.Tensor, weight: torch.Tensor, bounds: list[int]) -> torch.Tensor:
    """One document, channel and token after the other: [tokens, channels]."""
    flat, rows = key.flatten(1), []
    for start, end in zip(bounds, bounds[1:], strict=False):
        for token in range(start, end):
            mixed = sum(
                weight[:, back] * flat[token - back] for back in range(weight.shape[1]) if token - back >= start
            )
            rows.append(flat[token] + mixed * torch.sigmoid(mixed))
    return torch.stack(rows).view_as(key)


def outcome(function, module: KeyConvolution, key: torch.Tensor, dout: torch.Tensor) -> list[torch.Tensor]:
    """Output and the gradients of keys and filters."""
    key = key.clone().requires_grad_()
    out = function(key)
    return [out.detach(), *torch.autograd.grad(out, [key, module.weight], dout)]


@pytest.mark.parametrize("width", [3, 5])
def test_equals_the_definition(width):
    module = convolution(width)
    key, dout = keys(64)
    packed = outcome(lambda k: module(k, pack(BOUNDS, 32), None), module, key, dout)
    expected = outcome(lambda k: definition(k, module.weight, BOUNDS), module, key, dout)
    for got, want in zip(packed, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    key, dout = keys(20, batch=2)
    together = outcome(lambda k: module(k, None, None), module, key, dout)
    apart = [
        outcome(lambda k: definition(k, module.weight, [0, 20]), module, key[:, [b]], dout[:, [b]]) for b in (0, 1)
    ]
    torch.testing.assert_close(together[0], torch.cat([a[0] for a in apart], dim=1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(together[2], apart[0][2] + apart[1][2], rtol=1e-12, atol=1e-12)


def test_no_future_token_and_no_other_document_shows():
    module = convolution(5)
    key, _ = keys(64)
    before = module(key, pack(BOUNDS, 32), None)
    key[20:24] = 9.0
    after = module(key, pack(BOUNDS, 32), None)
    assert torch.equal(before[:20], after[:20]) and torch.equal(before[24:], after[24:])
    assert (before[20:24] != after[20:24]).any(dim=-1).all()


def test_filters_of_zero_do_nothing():
    module = convolution(3)
    module.weight.data.zero_()
    key, _ = keys(64)
    assert torch.equal(module(key, None, None), key)
    # Sums of half-precision keys are exact but for the last rounding of the residual and of what is added.
    half, wide = convolution(3).bfloat16(), convolution(3).bfloat16().double()
    got, want = (m(key.bfloat16().to(m.weight.dtype), None, None) for m in (half, wide))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2**-8 * float(want.abs().max()))
    with pytest.raises(ValueError, match="a key convolution of width 4: use 3 or 5"):
        convolution(4)


def shard_disagreements(width: int, bounds: list[int]) -> list[str]:
    size, rank = dist.get_world_size(), dist.get_rank()
    module, (key, dout) = convolution(width), keys(64)
    whole = outcome(lambda k: definition(k, module.weight, bounds), module, key, dout)
    mine = torch.tensor(zigzag(bounds, size, rank))
    packed = pack(bounds, 64) if len(bounds) > 2 else None
    out, dkey, dweight = outcome(lambda k: module(k, packed, dist.group.WORLD), module, key[mine], dout[mine])
    dist.all_reduce(dweight)
    pairs = {"out": (out, whole[0][mine]), "dkey": (dkey, whole[1][mine]), "dweight": (dweight, whole[2])}
    return [
        f"{what} {bounds} W={width}: {(got - want).abs().max()}"
        for what, (got, want) in pairs.items()
        if not torch.allclose(got, want, rtol=1e-12, atol=1e-12)
    ]


def disagreements() -> list[str]:
    """On one of several ranks. Chunks of one token and more: shorter than the filter, and longer."""
    packs = ([0, 64], [0, 8, 16, 16, 32, 64], [0, 8, 64])
    return [line for width in (3, 5) for bounds in packs for line in shard_disagreements(width, bounds)]


@pytest.mark.parametrize("size", [2, 4])
def test_context_parallel_ranks_equal_the_definition(size):
    assert run_ranks(size, disagreements) == [[]] * size


def config(parallel=None, recompute="none", **attention):
    return tiny(
        model={"num_layers": 2, "num_query_groups": 4, "vocab_size": VOCABULARY},
        attention={"block_size": 8, "top_k": 2, "last_n_full": 1, **attention},
        training={
            "steps": STEPS,
            "global_batch_size": 4,
            "precision": "fp32",
            "loss_chunk_size": 24,
            "recompute": recompute,
        },
        parallel=parallel or {},
    )


def test_training_starts_as_without_it_and_is_the_same_over_all_ranks():
    convolved = config(key_convolution=3)
    _, _, weights = run_ranks(1, train, convolved, VOCABULARY, 0)[0]
    one_rank = run_ranks(1, train_each, [convolved, config()], VOCABULARY, STEPS, weights, PACKS)[0]
    (losses, norms), (plain, _) = one_rank
    assert losses[0] == plain[0] and abs(losses[-1] - plain[-1]) > 1e-4
    layouts = [{"tensor": 2, "sequence": True}, {"pipeline": 2}, {"context": 2}, {"context": 2, "exchange": "p2p"}]
    configs = [config(parallel, key_convolution=3) for parallel in layouts]
    layouts.append({"context": 2, "distributed_optimizer": True})
    configs.append(config(layouts[-1], recompute="full", key_convolution=3))
    for rank in run_ranks(2, train_each, configs, VOCABULARY, STEPS, weights, PACKS):
        for parallel, (ours, our_norms) in zip(layouts, rank, strict=True):
            torch.testing.assert_close(ours, losses, rtol=3e-4, atol=0, msg=str(parallel))
            torch.testing.assert_close(our_norms, norms, rtol=3e-4, atol=0, msg=str(parallel))


def test_it_has_parameters_of_its_own():
    with_it, without = (count_parameters(config(key_convolution=width)) for width in (5, None))
    assert with_it.layers - without.layers == 2 * 4 * 8 * 5


def test_checkpoints_keep_it_and_plain_formats_refuse_it(tmp_path):
    """A run is stopped and goes on over two tensor-parallel ranks; its export and a start without it are refused."""
    changes = {"attention__key_convolution": 3, "training__steps": 4}
    straight = small_config(tmp_path / "straight", **changes)
    run_ranks(1, train_here, straight)
    stopped = small_config(tmp_path / "stopped", **changes, training__stop_after=2)
    run_ranks(1, train_here, stopped)
    resumed = small_config(tmp_path / "stopped", **changes, parallel__tensor=2)
    run_ranks(2, train_here, resumed, 2)
    ours, expected = (numbers_of(read_metrics(tmp_path / name / "run")) for name in ("stopped", "straight"))
    for got, want in zip(ours, expected, strict=True):
        assert got[0] == want[0] and got[2:4] == pytest.approx(want[2:4], rel=2e-4)
    assert_the_filters_went_on(*(tmp_path / f"{name}/run/checkpoints/step_4" for name in ("stopped", "straight")))
    without = small_config(tmp_path / "stopped", training__steps=4, checkpoint__allow_changed=["attention"])
    with pytest.raises(AssertionError, match="attention.key_convolution = None, but the run has 3: it is parameters"):
        run_ranks(1, train_here, without)
    with pytest.raises(ConfigError, match="attention.key_convolution = 3: no plain model of transformers"):
        open_exported(tmp_path / "straight/run")
    checkpoint = tmp_path / "straight/run/checkpoints/step_4"
    plain_weights_may_be_continued_with_it(tmp_path)
    for width in (None, 5):
        start = small_config(tmp_path / "start", model__init_from=str(checkpoint), attention__key_convolution=width)
        with pytest.raises(ConfigError, match=f"attention.key_convolution = {width}, but .* was trained with 3"):
            check_initial_weights(start, 0)


def assert_the_filters_went_on(resumed: Path, straight: Path) -> None:
    """Losses of so short a run hardly feel the filters: they are looked at themselves."""
    for layer in range(4):
        name = f"decoder.layers.{layer}.self_attention.key_convolution.weight"
        got, want = (StoredWeights(folder).read(name, (16, 3)) for folder in (resumed, straight))
        size = want.abs().mean()
        # Adam makes a step of a rounding error where a gradient is one, so not each of them is the same.
        assert size > 1e-3 and (got - want).abs().mean() < 0.01 * size


def plain_weights_may_be_continued_with_it(folder) -> None:
    """From a plain Hugging Face folder: filters of zero, so the first loss is that of the plain model."""
    run_ranks(1, train_here, small_config(folder / "plain", training__steps=1, optimizer__warmup_steps=0))
    export_huggingface(open_exported(folder / "plain/run"), folder / "hf")
    first = {}
    for width in (None, 3):
        changes = {"attention__key_convolution": width, "model__init_from": str(folder / "hf"), "training__steps": 4}
        run_ranks(1, train_here, small_config(folder / f"from_{width}", **changes, training__stop_after=2))
        first[width] = [line["loss"] for line in read_metrics(folder / f"from_{width}/run")]
    assert first[3][0] == first[None][0] and first[3][1] != first[None][1]

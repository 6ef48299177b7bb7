"""The loss in chunks: megatron-core's own numbers and gradients, sharded or not, and its bound on memory."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed import run_ranks
from model_examples import gradients, tiny, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from moba_megatron import platform
from moba_megatron.model.loss import chunked_cross_entropy
from moba_megatron.model.schedule import AttentionSchedule

LENGTH, BATCH, HIDDEN, VOCABULARY = 12, 2, 16, 37


def problem(dtype=torch.float32, padding: int = 0):
    """hidden [s, b, h], weight [v + padding, h], labels [b, s], gradient of the loss [b, s] with zeros."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(LENGTH, BATCH, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(2 * VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64)[: VOCABULARY + padding].to(
        dtype
    )
    labels = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)
    gradient = torch.rand(BATCH, LENGTH, generator=generator).masked_fill(labels % 5 == 0, 0.0)
    return hidden.requires_grad_(), weight.requires_grad_(), labels, gradient


def results(loss, gradient, hidden, weight):
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight), gradient.to(loss.dtype))


def whole_loss(hidden, weight, labels):
    logits = hidden @ weight.t()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.permute(1, 2, 0), labels, reduction="none")


def exact_and_chunked(dtype, chunk_size, padding=0):
    hidden, weight, labels, gradient = problem(dtype, padding)
    chunked = chunked_cross_entropy(hidden, weight, labels, chunk_size=chunk_size, vocab_size=VOCABULARY)
    ours = results(chunked, gradient, hidden, weight)
    wide, rows = hidden.detach().double().requires_grad_(), weight.detach()[:VOCABULARY].double().requires_grad_()
    return results(whole_loss(wide, rows, labels), gradient, wide, rows), ours


@pytest.mark.parametrize("chunk_size", [1, 5, 8, 24, 100])
def test_equals_the_whole_loss(chunk_size):
    exact, ours = exact_and_chunked(torch.float32, chunk_size)
    assert ours[0].dtype == torch.float32 and ours[0].shape == (BATCH, LENGTH)
    for expected, actual in zip(exact, ours, strict=True):
        bound = HIDDEN * torch.finfo(torch.float32).eps * expected.abs().max().item()
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("chunk_size", [5, 24])
def test_bf16_is_as_exact_as_the_whole_loss_in_bf16(chunk_size):
    exact, ours = exact_and_chunked(torch.bfloat16, chunk_size)
    hidden, weight, labels, gradient = problem(torch.bfloat16)
    stock = results(whole_loss(hidden, weight, labels), gradient, hidden, weight)
    assert [tensor.dtype for tensor in ours] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for expected, plain, actual in zip(exact, stock, ours, strict=True):
        rounding = torch.finfo(plain.dtype).eps * expected.abs().max()
        allowed = 2 * (plain.double() - expected).abs().max() + rounding
        assert (actual.double() - expected).abs().max() <= allowed


@pytest.mark.parametrize("chunk_size", [5, 24])
def test_padded_rows_have_no_part(chunk_size):
    exact, ours = exact_and_chunked(torch.float32, chunk_size, padding=3)
    for expected, actual in zip(exact, (*ours[:2], ours[2][:VOCABULARY]), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.count_nonzero(ours[2][VOCABULARY:]) == 0


@pytest.mark.parametrize("chunk_size", [5, 24])
def test_derivative_by_finite_differences(chunk_size):
    hidden, weight, labels, _ = problem(torch.float64)
    loss = functools.partial(chunked_cross_entropy, labels=labels, chunk_size=chunk_size, vocab_size=VOCABULARY)
    assert torch.autograd.gradcheck(loss, (hidden, weight), fast_mode=True)


def sharded(padding: int, sequence_parallel: bool):
    """This rank's loss, gradient of its part of the hidden states, gradient of its rows."""
    hidden, weight, labels, gradient = problem(torch.float64, padding)
    group, rank = dist.group.WORLD, dist.get_rank()
    mine = weight.detach().chunk(2)[rank].requires_grad_()
    part = hidden.detach().chunk(2)[rank].requires_grad_() if sequence_parallel else hidden
    loss = chunked_cross_entropy(
        part, mine, labels, chunk_size=7, vocab_size=VOCABULARY, tp_group=group, sequence_parallel=sequence_parallel
    )
    return results(loss, gradient, part, mine)


def test_sharded_vocabulary_equals_one_rank():
    """37 entries over two ranks: one padded row; with 37 more rows of padding the second rank has no entry at all."""
    hidden, weight, labels, gradient = problem(torch.float64)
    exact = results(whole_loss(hidden, weight, labels), gradient, hidden, weight)

    def cases():
        return [sharded(padding, sp) for padding in (1, VOCABULARY) for sp in (False, True)]

    per_rank = run_ranks(2, cases)
    for case, sequence_parallel in enumerate((False, True, False, True)):
        (loss_0, hidden_0, rows_0), (loss_1, hidden_1, rows_1) = per_rank[0][case], per_rank[1][case]
        whole_hidden = torch.cat([hidden_0, hidden_1]) if sequence_parallel else hidden_0
        rows = torch.cat([rows_0, rows_1])
        assert torch.equal(loss_0, loss_1)
        assert torch.count_nonzero(rows[VOCABULARY:]) == 0
        for expected, actual in zip(exact, (loss_0, whole_hidden, rows[:VOCABULARY]), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def chunked_and_stock(config, vocabulary: int):
    """Loss and every gradient of one model, by chunks and by megatron-core's own output layer and loss."""
    from megatron.core.models.gpt import GPTModel

    from moba_megatron.model.builder import build_model

    schedule = AttentionSchedule.from_config(config.attention, config.model.num_layers)
    (model,) = build_model(config, vocabulary, schedule)
    ids, positions, labels = tokens(2, 64)
    found = []
    for stock in (False, True):
        if stock:
            model._postprocess = functools.partial(GPTModel._postprocess, model)
        model.zero_grad()
        loss = model(ids, positions, None, labels=labels)
        (loss * (labels % 5 != 0)).sum().backward()
        found.append((loss.detach(), gradients(model)))
    return found


def compare(found, eps: float):
    """Both sum the same products in another order: differences stay within a few roundings of the largest entry."""
    (loss, grads), (stock_loss, stock_grads) = found
    assert loss.dtype == stock_loss.dtype == torch.float32 and loss.shape == stock_loss.shape
    torch.testing.assert_close(
        loss, stock_loss, rtol=0, atol=32 * torch.finfo(torch.float32).eps * stock_loss.max().item()
    )
    assert grads.keys() == stock_grads.keys()
    for name, expected in stock_grads.items():
        scale = expected.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(
            grads[name], expected, rtol=0, atol=32 * eps * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_equals_megatron_core_on_one_rank():
    def cases():
        platform.start_model_parallel(tiny().parallel)
        for shared in (False, True):
            for precision, eps in (("fp32", 2**-23), ("bf16", 2**-8)):
                for chunk_size in (16, 1000):
                    config = tiny(
                        model={"share_embeddings_and_output_weights": shared},
                        training={"precision": precision, "loss_chunk_size": chunk_size},
                    )
                    compare(chunked_and_stock(config, 61), eps)

    run_ranks(1, cases)


def test_equals_megatron_core_under_tensor_and_sequence_parallelism():
    def cases():
        platform.start_model_parallel(tiny(parallel={"tensor": 2}).parallel)
        for sequence in (False, True):
            for shared in (False, True):
                config = tiny(
                    model={"share_embeddings_and_output_weights": shared, "vocab_size": 62},
                    parallel={"tensor": 2, "sequence": sequence},
                )
                compare(chunked_and_stock(config, 62), 2**-23)

    run_ranks(2, cases)


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_logits_of_the_sequence_never_exist():
    length, hidden_size, vocabulary, chunk_size = 512, 8, 256, 32
    hidden = torch.randn(length, 1, hidden_size, requires_grad=True)
    weight = torch.randn(vocabulary, hidden_size, requires_grad=True)
    labels = torch.zeros(1, length, dtype=torch.long)
    with LargestTensor() as largest:
        loss = chunked_cross_entropy(hidden, weight, labels, chunk_size=chunk_size, vocab_size=vocabulary)
        loss.sum().backward()
    assert largest.elements == chunk_size * vocabulary


class SixteenBitWeights(TorchDispatchMode):
    """Counts tensors of a shape that are made in bf16."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.shape == self.shape and out.dtype == torch.bfloat16:
            self.count += not func.is_view
        return out


def test_on_a_gpu_no_chunk_makes_a_copy_of_the_weights_gradient():
    """Each product is added to the fp32 sum as it is computed. The one copy is what is returned."""
    length, hidden_size, vocabulary = 64, 8, 48
    hidden = torch.randn(length, 1, hidden_size, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight = torch.randn(vocabulary, hidden_size, dtype=torch.bfloat16, device="meta", requires_grad=True)
    labels = torch.zeros(1, length, dtype=torch.long, device="meta")
    loss = chunked_cross_entropy(hidden, weight, labels, chunk_size=8, vocab_size=vocabulary)
    with SixteenBitWeights((vocabulary, hidden_size)) as made:
        torch.autograd.grad(loss, (hidden, weight), torch.ones_like(loss))
    assert made.count == 1


def test_shapes_that_do_not_fit_are_refused():
    hidden, weight, labels, _ = problem()
    with pytest.raises(ValueError, match="do not belong together"):
        chunked_cross_entropy(hidden, weight, labels.t(), chunk_size=4, vocab_size=VOCABULARY)
    with pytest.raises(ValueError, match="chunk_size = 0"):
        chunked_cross_entropy(hidden, weight, labels, chunk_size=0, vocab_size=VOCABULARY)

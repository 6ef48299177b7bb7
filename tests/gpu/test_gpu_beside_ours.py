"""Full attention and other packages on a GPU, and the benchmark end to end: `pytest -m gpu`."""

import io

import gpu_checks as checks
import pytest
import torch
from gpu_checks import Shape
from rich.console import Console

from moba_megatron.benchmark.exchanges import run_context_bench
from moba_megatron.benchmark.operator import disagreement, run_bench
from moba_megatron.benchmark.settings import BenchSettings
from moba_megatron.ops import full_attention
from moba_megatron.ops.backends import BACKENDS, FULL_BACKENDS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

PACK = Shape((0, 1, 1, 700, 733, 2000), block_size=2048, top_k=1, heads=8, kv_heads=2, size=128)


def skip_without(table, name):
    reason = table[name].unavailable(torch.device("cuda"))
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.bfloat16) for name in FULL_BACKENDS), ("torch", torch.float32)]
)
@pytest.mark.parametrize("bounds", [(0, 2000), PACK.bounds])
def test_full_attention_equals_the_definition(name, dtype, bounds):
    """Blocks longer than every document make MoBA's definition full attention. Heads are grouped, for which PyTorch has
    no fused kernel in fp32."""
    skip_without(FULL_BACKENDS, name)
    shape = Shape(bounds, PACK.block_size, 1, PACK.heads, PACK.kv_heads, PACK.size)
    q, k, v, do = checks.inputs(shape, "cuda", dtype)
    cu = None if len(bounds) == 2 else shape.cu_seqlens("cuda")
    got = checks.results(lambda *x: full_attention(*x, cu, max_seqlen=2000, backend=name), q, k, v, do)
    want = checks.results(checks.operator(shape, "cuda", "reference"), *(x.double() for x in (q, k, v, do)))
    none = torch.empty(*q.shape[:2], 0, dtype=torch.int32, device="cuda")
    plain = checks.results(lambda *x: checks.plain_attend(*x, none, shape), q, k, v, do)
    for a, b, c in zip(got, want, plain, strict=True):
        rounding = (8 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps * float(b.abs().max())
        assert float((a - b).abs().max()) <= 2 * float((c - b).abs().max()) + rounding


@pytest.mark.parametrize(("block_size", "top_k"), [(64, 16), (128, 8), (512, 3)])
def test_flash_moba_counts_blocks_as_we_do(block_size, top_k):
    skip_without(BACKENDS, "flash_moba")
    settings = BenchSettings(num_heads=4, num_kv_heads=2, head_size=128, backend="flash_moba", device="cuda")
    assert disagreement(settings, "bf16", block_size, top_k) is None


def test_the_benchmark_of_exchanges_runs(tmp_path):
    """On as many GPUs as there are; on one, every exchange with itself, through NCCL and the kernels."""
    ranks = torch.cuda.device_count()
    settings = BenchSettings(
        lengths=(8192,), blocks=((128, 8),), dtypes=("bf16",), backend="auto", device="cuda", runs=1, num_heads=16,
        num_kv_heads=8, head_size=128,
    )  # fmt: skip
    result = run_context_bench(settings, ranks, tmp_path, Console(file=io.StringIO()))
    run = {row.exchange for row in result.rows if row.block_size}
    assert result.wrong == []
    assert run >= {"p2p", "all_gather", "dispatch"} and ("a2a" in run or ranks > 8)


def test_the_benchmark_runs(tmp_path):
    settings = BenchSettings(
        lengths=(4096, 8192), blocks=((128, 8),), dtypes=("bf16",), backend="auto", device="cuda", runs=2,
        num_heads=8, num_kv_heads=2, head_size=128, full=tuple(name for name in FULL_BACKENDS if name != "torch"),
    )  # fmt: skip
    result = run_bench(settings, tmp_path, console=Console(file=io.StringIO()))
    assert len(result.rows) == 4 and not [line for line in result.refused if not line.startswith("flash_moba")]
    assert all(row.dense_by in settings.full and row.attended_flops > 0 for row in result.rows)

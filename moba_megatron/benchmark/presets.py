"""Named sets of benchmark settings.

`targets` are single cases on two CPU threads with the speed-up that each must reach and the one it aims at: dtype,
length, block size, top-k, mode, floor, goal. Others are changes to the settings, one after the other. `real` is a layer
of SmolLM2-135M, a model that people do train on a CPU.
"""

from __future__ import annotations

K, M = 2**10, 2**20

GPU_LENGTHS = (8 * K, 16 * K, 32 * K, 64 * K, 128 * K, 256 * K, 512 * K, M)
GPU_BLOCKS = ((64, 16), (128, 8), (512, 3), (2048, 3), (4096, 12))
# Query and key heads of the grid: Llama 3.1 8B's, and as many key heads as query heads.
GPU_HEADS = ((32, 8), (16, 16))
GPU_HEAD_SIZE = 128


def _gpu_grid(lengths: tuple[int, ...]) -> tuple[dict, ...]:
    return tuple(
        {
            "lengths": lengths,
            "blocks": GPU_BLOCKS,
            "dtypes": ("bf16",),
            "modes": ("fwd", "fwd+bwd"),
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_size": GPU_HEAD_SIZE,
            "full": ("torch_flash", "cudnn", "flash_attn", "flash_attn_3", "flash_attn_4"),
            # Full attention of a million tokens takes most of a minute, forward and backward.
            "limit": 20.0,
        }
        for heads, kv_heads in GPU_HEADS
    )


PRESETS = {
    "targets": (
        ("fp32", 32 * K, 512, 3, "fwd+bwd", 5.5, 9.0),
        ("bf16", 32 * K, 512, 3, "fwd+bwd", 5.5, 9.0),
        ("fp32", 32 * K, 128, 8, "fwd+bwd", 3.5, 7.0),
        ("fp32", 4 * K, 512, 3, "fwd+bwd", 1.0, 1.4),
        ("fp32", 128 * K, 512, 3, "fwd", 14.0, 25.0),
    ),
    "real": tuple(
        {
            "lengths": lengths,
            "blocks": blocks,
            "modes": ("fwd+bwd",),
            "num_heads": 9,
            "num_kv_heads": 3,
            "head_size": 64,
        }
        for lengths, blocks in (((2 * K, 8 * K), ((64, 8),)), ((8 * K,), ((256, 8), (128, 16))))
    ),
    "gpu": _gpu_grid(GPU_LENGTHS),
    "gpu-128k": _gpu_grid(tuple(length for length in GPU_LENGTHS if length <= 128 * K)),
}

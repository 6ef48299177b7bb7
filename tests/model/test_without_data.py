"""The whole packed model on tensors without data: a training step that reads no value anywhere, as on a GPU, where a
read makes the host wait. The operator itself is a shape here (`tests/ops/triton/test_host_waits.py` runs its host
code)."""

from __future__ import annotations

import pytest
import torch
from distributed import run_ranks
from model_examples import VOCABULARY, tiny

from moba_megatron.model.schedule import AttentionSchedule

TOKENS = 256


def step_without_data(config, packed: bool) -> str:
    """Forward and backward on the meta device; what raised, and where, or nothing."""
    from moba_megatron import platform
    from moba_megatron.data.batches import packed_seq_params
    from moba_megatron.model.builder import build_model
    from moba_megatron.ops import dense

    platform.start_model_parallel(config.parallel)
    (model,) = build_model(config, VOCABULARY, AttentionSchedule.from_config(config.attention, 3))
    model.to("meta")
    torch.cuda.current_device = lambda: torch.device("meta")
    model.rotary_pos_emb.inv_freq = model.rotary_pos_emb.inv_freq.to("meta")
    # Full layers of a pack: PyTorch's kernel for packs, as on CUDA.
    dense._runs_packs = lambda q, kernels: True
    integers = {name: torch.empty(1, TOKENS, dtype=torch.int64, device="meta") for name in ("tokens", "labels", "at")}
    batch = dict(integers)
    if packed:
        batch |= {"cu_seqlens": torch.empty(5, dtype=torch.int32, device="meta"), "max_seqlen": 100}
    losses = model(
        batch["tokens"], batch["at"], attention_mask=None, labels=batch["labels"],
        packed_seq_params=packed_seq_params(batch),
    )  # fmt: skip
    losses.sum().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    return f"{tuple(losses.shape)} {losses.device} {without}"


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("packed", [True, False])
def test_a_training_step_reads_nothing(recompute, packed):
    config = tiny(
        model={"qk_layernorm": True, "num_layers": 3},
        attention={"block_size": 32, "top_k": 3, "last_n_full": 1},
        data={"sequence_length": TOKENS},
        training={"precision": "bf16", "loss_chunk_size": 64, "recompute": recompute},
    )
    assert run_ranks(1, step_without_data, config, packed) == [f"(1, {TOKENS}) meta []"]

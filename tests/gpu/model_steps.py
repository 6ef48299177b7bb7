"""A training step of a small hybrid on this machine's device, through public functions only; on a CPU as well, so that
the step itself is proven where there is no GPU."""

from __future__ import annotations

import torch
import torch.distributed as dist
from model_examples import VOCABULARY, tiny, tokens

TOKENS = 512
CONFIG = tiny(
    model={"num_layers": 3, "hidden_size": 256, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 512,
           "qk_layernorm": True, "init_method_std": 0.02},
    attention={"block_size": 64, "top_k": 3, "last_n_full": 1},
    data={"sequence_length": TOKENS},
    training={"precision": "bf16", "loss_chunk_size": 128},
)  # fmt: skip


def step(packed: bool, implementation: str, *, forbid_waiting: bool = False) -> dict[str, float]:
    """Loss and gradient norm of one batch, from weights that are the same in every implementation.

    Args:
        forbid_waiting: let whatever makes the host wait for the GPU raise, once the kernels are compiled.
    """
    from moba_megatron.convert.mapping import canonical_name
    from moba_megatron.data.batches import packed_seq_params
    from moba_megatron.model import builder, specs
    from moba_megatron.model.schedule import AttentionSchedule
    from moba_megatron.platform.start import start_single_rank
    from moba_megatron.training.optimizer import wrap_data_parallel

    device = builder.current_device()
    if not dist.is_initialized():
        start_single_rank(CONFIG.run.seed)
    chosen = specs.choose_implementation
    specs.choose_implementation = builder.choose_implementation = lambda device_type: implementation
    try:
        schedule = AttentionSchedule.from_config(CONFIG.attention, CONFIG.model.num_layers)
        chunks = builder.build_model(CONFIG, VOCABULARY, schedule)
    finally:
        specs.choose_implementation = builder.choose_implementation = chosen
    named = sorted((canonical_name(name, 0), parameter) for name, parameter in chunks[0].named_parameters())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in named:
            centre = 1.0 if parameter.dim() == 1 else 0.0
            parameter.copy_(centre + 0.02 * torch.randn(parameter.shape, generator=generator))
    (model,) = wrap_data_parallel(chunks, CONFIG)
    ids, positions, labels = (x.to(device) for x in tokens(1, TOKENS))
    batch = {"tokens": ids}
    if packed:
        batch |= {
            "cu_seqlens": torch.tensor([0, 100, 101, TOKENS], dtype=torch.int32, device=device),
            "max_seqlen": 411,
        }
    params = packed_seq_params(batch)
    for attempt in range(2):
        model.zero_grad_buffer()
        if attempt and forbid_waiting:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            losses = model(ids, positions, attention_mask=None, labels=labels, packed_seq_params=params)
            losses.mean().backward()
        finally:
            if forbid_waiting:
                torch.cuda.set_sync_debug_mode("default")
    squares = sum(float(parameter.main_grad.double().square().sum()) for _, parameter in named)
    return {"loss": float(losses.mean()), "norm": squares**0.5}

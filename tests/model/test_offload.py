"""Activations in the memory of the host: megatron-core's own machinery over our attention, without a GPU.

Streams, events and pinned memory are stand-ins; what is copied to the host and back is real, and so are the losses.
"""

from __future__ import annotations

import contextlib
import types
from collections import Counter
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from small_run import read_metrics, small_config, train_here

from moba_megatron.config import Config
from moba_megatron.model.schedule import AttentionSchedule
from moba_megatron.planning.memory_layer import Shape, layer_bytes, offloaded
from moba_megatron.training.preflight import preflight

ATTENTION = ["qkv_linear", "core_attn", "attn_proj"]


class _Now:
    """A stream, or an event, of a machine that does one thing after the other."""

    def __getattr__(self, name):
        return lambda *args, **more: None


def _train(config: Config, ranks: int, modules: list[str]) -> Counter[str]:
    """Train with these modules offloaded; bytes that went to the host, by module."""
    import megatron.core.extensions.transformer_engine as extensions
    from megatron.core.pipeline_parallel import fine_grained_activation_offload as offloading

    from moba_megatron.model import builder

    moved: Counter[str] = Counter()
    torch.cuda.Stream = torch.cuda.Event = lambda *args, **more: _Now()
    torch.cuda.current_stream = lambda *args: _Now()
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.nvtx = _Now()
    torch.Tensor.record_stream = lambda *args: None
    extensions.cpu_offload = types.SimpleNamespace(CPUOffloadEnabled=False)

    # The pool has another name since 0.19.
    pool = getattr(offloading, "OffloadTensorPool", None) or offloading.GPUTensorPool
    copy, groups = offloading.ChunkOffloadHandler, offloading.OffloadTensorGroup
    start, push, note = pool.__init__, copy.offload, groups.update_offload_info
    pool.__init__ = lambda self, device="cuda", pin_memory=False: start(self, device, False)
    copy.offload = lambda self, tensor, pin_memory=True, use_cpu_pool=True: push(self, tensor, False, use_cpu_pool)

    # From 0.19 on it leaves alone what is not on a GPU.
    copy._can_manage_tensor_for_offload = staticmethod(lambda tensor: not isinstance(tensor, torch.nn.Parameter))

    def noted(self, tensor):
        moved[self._name] += tensor.nbytes
        return note(self, tensor)

    groups.update_offload_info = noted
    settings = {"fine_grained_activation_offloading": True, "offload_modules": modules, "min_offloaded_tensor_size": 16}
    assert builder._offload_settings(config.training.model_copy(update={"offload": modules}), "transformer_engine")
    builder._offload_settings = lambda *args: settings
    train_here(config, ranks)
    return moved


def _planned(config: Config, modules: list[str]) -> int:
    """Bytes that the planner expects to go to the host in a step."""
    training, shape = config.training.model_copy(update={"offload": modules}), Shape.of(config, "cpu")
    (layers,) = AttentionSchedule.from_config(config.attention, config.model.num_layers).stages
    microbatches = training.global_batch_size // training.micro_batch_size
    return microbatches * sum(offloaded(training, shape, layer_bytes(shape, layer, None)).moved for layer in layers)


@pytest.mark.parametrize(
    ("ranks", "settings", "modules"),
    [
        (1, {}, ATTENTION),
        pytest.param(1, {"training__recompute": ["mlp"]}, ["core_attn"], marks=pytest.mark.slow),
        pytest.param(2, {"parallel__pipeline": 2}, ATTENTION, marks=pytest.mark.slow),
        (2, {"parallel__context": 2}, ATTENTION),
    ],
)
def test_losses_are_the_same_and_the_tensors_move(tmp_path, ranks, settings, modules):
    kept = small_config(tmp_path / "kept", training__steps=3, **settings)
    moved = small_config(tmp_path / "moved", training__steps=3, **settings)
    run_ranks(ranks, train_here, kept, ranks)
    for bytes_ in run_ranks(ranks, _train, moved, ranks, modules):
        assert set(modules) <= {name for name, count in bytes_.items() if count}
        if ranks == 1:
            assert bytes_.total() == _planned(kept, modules)
    losses = [[line["loss"] for line in read_metrics(Path(config.run.dir))] for config in (kept, moved)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_training_refuses_it_without_a_gpu(tmp_path):
    with pytest.raises(ValueError, match=r"training.offload = \['core_attn'\] needs a GPU .*: leave it out"):
        preflight(small_config(tmp_path, training__offload=["core_attn"]), 1)

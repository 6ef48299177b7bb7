"""Every shipped configuration through the choices of a start, as on an H100: with and without Transformer Engine and
flash-attn. No GPU is needed, only what a GPU machine would answer."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import itertools
import sys
from pathlib import Path

import pytest
import torch
from model_examples import tiny

from moba_megatron.config import check_world, load_config
from moba_megatron.config.named import names_in
from moba_megatron.model.schedule import checked_schedule
from moba_megatron.ops import adapters
from moba_megatron.platform import libraries
from moba_megatron.training import preflight

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = [
    path for path in sorted(CONFIGS.rglob("*.yaml")) if "base" not in path.stem and "\naxes:" not in path.read_text()
]
FLASH_ATTENTION = {None: "torch", "flash_attn": "flash_attn", "flash_attn_interface": "flash_attn_3"}


@pytest.fixture
def h100(monkeypatch):
    """A function that sets up the machine: (has Transformer Engine, module of flash-attn or None)."""

    def set_up(transformer_engine: bool, module: str | None) -> None:
        find = libraries._find

        def found(name):
            if name != "transformer_engine":
                return find(name)
            return libraries.Library(name, transformer_engine, None, "" if transformer_engine else "not here", "", "")

        monkeypatch.setattr(libraries, "_find", found)
        libraries.optional_libraries.cache_clear()
        monkeypatch.setattr(preflight, "current_device", lambda: torch.device("cuda", 0))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
        adapters._import_problem.cache_clear()
        if module is not None:
            stand_in = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(module, None))
            stand_in.flash_attn_varlen_func = lambda **words: None
            monkeypatch.setitem(sys.modules, module, stand_in)

    yield set_up
    libraries.optional_libraries.cache_clear()
    adapters._import_problem.cache_clear()


def choices(config) -> list[str]:
    check_world(config, config.parallel.model_ranks)
    return preflight.run_choices(config, checked_schedule(config))


@pytest.mark.parametrize(("transformer_engine", "module"), list(itertools.product([True, False], FLASH_ATTENTION)))
def test_every_shipped_configuration_can_run(h100, transformer_engine, module):
    h100(transformer_engine, module)
    named = [(path, name) for path in SHIPPED for name in (None, *names_in(path))]
    for path in [path if name is None else f"{path}:{name}" for path, name in named]:
        config = load_config(path)
        moba, full, layers, *_ = choices(config)
        assert moba == "attention.backend = auto: triton (auto: the GPU kernels)", path
        assert layers.startswith(f"layers: {'transformer_engine' if transformer_engine else 'local'}"), path
        if config.parallel.context > 1:
            assert full == "attention.full_backend = auto: the exchange (context parallelism)"
        else:
            half = config.training.precision == "bf16"
            name = FLASH_ATTENTION[module] if half and config.attention.full_backend == "auto" else "torch"
            assert full.startswith(f"attention.full_backend = auto: {name} ("), (path, full)


def test_grouped_heads_in_fp32_are_named(h100):
    """PyTorch has no fused kernel for them on CUDA: they are repeated, and who starts the run is told."""
    h100(False, None)
    grouped = tiny(training={"precision": "fp32"})
    told = "keys are repeated for each query head, because no fused kernel takes groups in torch.float32"
    assert told in choices(grouped)[1]
    assert told not in choices(tiny(training={"precision": "bf16"}))[1]
    assert told not in choices(tiny(model={"num_query_groups": 4}))[1]


def test_always_full_layers_in_fp32_are_not_transformer_engines(h100):
    h100(True, None)
    for precision, keep in (("bf16", True), ("fp32", False)):
        config = tiny(attention={"last_n_full": 1}, training={"precision": precision})
        assert ("keep Transformer Engine's" in choices(config)[1]) == keep


def test_where_full_attention_would_be_faster_the_start_says_so(h100):
    h100(False, None)
    config = CONFIGS / "paper/scaling_8k.yaml:545m_moba"
    for length, told in ((2048, True), (8192, False)):
        lines = choices(load_config(config, [f"data.sequence_length={length}"]))
        assert any("MoBA takes" in line and "on H100 (estimate" in line for line in lines) == told

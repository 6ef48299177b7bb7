"""What Megatron-LM saves becomes a run folder, bit for bit, and a Hugging Face folder from there."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import yaml
from distributed import run_ranks
from huggingface_models import VOCABULARY
from megatron.core.transformer.enums import AttnBackend
from safetensors.torch import load_file
from small_run import TOKENS
from test_round_trip import assert_same_tensors

from moba_megatron.checkpoint import CheckpointError
from moba_megatron.config import (
    AttentionConfig,
    ConfigError,
    ModelConfig,
    attention_checks,
    config_from_dict,
    load_config,
)
from moba_megatron.config.huggingface import model_section, read_huggingface_config
from moba_megatron.convert.export_hf import export_huggingface
from moba_megatron.convert.exported import open_exported
from moba_megatron.convert.import_megatron import LATEST, as_section, find_iteration, import_megatron
from moba_megatron.convert.megatron_flags import differences, read_flags
from moba_megatron.model.schedule import AttentionSchedule

ATTENTION = {"block_size": 16, "top_k": 2, "last_n_full": 1}
NAME = "qwen3"
FLAGS = dict(
    num_layers=4, num_attention_heads=8, group_query_attention=True, num_query_groups=4, kv_channels=12,
    rotary_base=10000, norm_epsilon=1e-6, swiglu=True, normalization="RMSNorm", use_rope_scaling=False,
    untie_embeddings_and_output_weights=True, attention_backend=AttnBackend.auto, params_dtype=torch.float32,
)  # fmt: skip


def save_as_megatron_lm(source: Path, folder: Path, parallel: dict | None = None, **flags: object) -> None:
    """The weights of a Hugging Face folder, on two tensor-parallel ranks, as `--ckpt-format torch_dist` saves them."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedObject

    from moba_megatron import platform
    from moba_megatron.convert.weights import open_weights, read_weights
    from moba_megatron.model.builder import build_model
    from moba_megatron.platform.megatron_core import save_arguments

    config = config_from_dict({
        "run": {"dir": "unused"},
        "model": {"init_from": str(source), **model_section(read_huggingface_config(source))},
        "data": {"train": "unused", "tokenizer": "unused", "sequence_length": 64},
        "attention": {"block_size": 16},
        "training": {"steps": 1, "global_batch_size": 1, "precision": "fp32"},
        "optimizer": {"lr": 1e-3},
        "parallel": parallel or {"tensor": 2},
    })  # fmt: skip
    platform.start_model_parallel(config.parallel)
    model = build_model(config, VOCABULARY, AttentionSchedule.from_config(config.attention, config.model.num_layers))
    read_weights(model, open_weights(source, config.model), config.model)
    rank = torch.distributed.get_rank()
    if rank == 0:
        (folder / "iter_0000003").mkdir(parents=True)
        (folder / LATEST).write_text("3")
    torch.distributed.barrier()
    state = {
        "model": model[0].sharded_state_dict(),
        "rng_state": ShardedObject("rng_state", {"any": 1}, (1, 2), (0, rank), replica_id=0),
        "iteration": 3,
        # Among the flags are objects of classes that need not be here.
        "args": Namespace(**{**FLAGS, **flags}),
    }
    if config.model.num_moe_experts:
        name_norms_as_transformer_engine(state["model"])
    dist_checkpointing.save(state, str(folder / "iter_0000003"), **save_arguments())


def name_norms_as_transformer_engine(state: dict) -> None:
    """In its layers with experts the norm before them is a module of its own."""
    keys = {part.key for part in state.values()}
    for part in state.values():
        before, norm, _ = part.key.partition("mlp.linear_fc1.layer_norm_")
        if norm and f"{before}mlp.router.weight" in keys:
            part.key = f"{before}pre_mlp_layernorm.weight"


@pytest.fixture(scope="module")
def saved(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("megatron")
    run_ranks(2, save_as_megatron_lm, models[NAME].folder, folder)
    return folder


def imported(source: Path, out: Path, **given):
    settings = {"attention": ATTENTION, "sequence_length": 64, **given}
    return run_ranks(1, lambda: import_megatron(source, out, **settings)[1], prepare=False)[0]


def test_weights_come_back_bit_for_bit(models, saved, tmp_path):
    notes = imported(saved, tmp_path / "run", model=models[NAME].folder)
    assert len(notes) == 1 and notes[0].startswith("no tokenizer was imported")
    config = load_config(tmp_path / "run/config.yaml")
    assert config.data.sequence_length == 64 and config.training.precision == "fp32"
    layers = AttentionSchedule.from_config(config.attention, 4).stages[0]
    assert layers == AttentionSchedule.from_config(AttentionConfig(**ATTENTION), 4).stages[0]
    export_huggingface(open_exported(tmp_path / "run"), tmp_path / "out")
    before, after = (
        {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for folder in (models[NAME].folder, tmp_path / "out")
    )
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_mixture_of_experts_comes_back_bit_for_bit(models, tmp_path):
    """Saved with its experts on two ranks; what its router computes stands in the flags alone."""
    source = models["qwen2-moe"].folder
    routing = {"moe_router_topk": 1, "moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": None}
    run_ranks(2, lambda: save_as_megatron_lm(source, tmp_path / "saved", {"expert": 2}, kv_channels=8, **routing))
    imported(tmp_path / "saved", tmp_path / "run", model=source)
    export_huggingface(open_exported(tmp_path / "run"), tmp_path / "out")
    assert_same_tensors(source, tmp_path / "out")
    section = model_section(read_huggingface_config(source)) | {"moe_router_topk": 2}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({"model": section}))
    settings = {"attention": ATTENTION, "sequence_length": 64}
    with pytest.raises(CheckpointError, match="model.moe_router_topk = 2, but the checkpoint was trained with 1"):
        import_megatron(tmp_path / "saved", tmp_path / "other", model=tmp_path / "model.yaml", **settings)


def test_a_file_with_the_model_section_serves_as_well(models, saved, tmp_path, monkeypatch):
    section = model_section(read_huggingface_config(models[NAME].folder))
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({"model": section}))
    (tmp_path / "moba.yaml").write_text("{block_size: 16, stages: [{until: 0.5}, {until: 1.0, kind: full}]}")
    monkeypatch.setenv("MOBA_STAGE", "2")
    imported(saved / "iter_0000003", tmp_path / "run", model=tmp_path / "model.yaml", attention=tmp_path / "moba.yaml")
    assert load_config(tmp_path / "run/config.yaml").attention.kind == "full"
    assert {layer.kind for layer in open_exported(tmp_path / "run").layers} == {"full"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_layers": 3}, r"4 layers of decoder\.layers\.\S+ are stored, the model has 3"),
        ({"num_attention_heads": 4}, r"linear_qkv\.weight is stored as \[192, 64\], the model has \[144, 64\]"),
        ({"qk_layernorm": False}, r"q_layernorm\.weight is not part of the model"),
        ({"add_qkv_bias": True}, r"linear_qkv\.bias is missing"),
        ({"vocab_size": 101}, r"word_embeddings\.weight is stored as \[100, 64\], the model has \[101, 64\]"),
        ({"vocab_size": None}, "model.vocab_size is not set"),
        ({"rotary_base": 1e6}, r"model.rotary_base = 1000000.0, but the checkpoint was trained with 10000"),
        ({"layernorm_epsilon": 1e-5}, r"model.layernorm_epsilon = 1e-05, but the checkpoint was trained with 1e-06"),
        ({"num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 24}, "model.num_attention_heads = 4, but"),
        ({"hiden_size": 64}, "model.hiden_size: unknown key; did you mean hidden_size"),
    ],
)
def test_another_model_is_refused_before_anything_is_written(models, saved, tmp_path, change, says):
    section = model_section(read_huggingface_config(models[NAME].folder)) | change
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({"model": section}))
    with pytest.raises((CheckpointError, ConfigError), match=says):
        import_megatron(saved, tmp_path / "run", model=tmp_path / "model.yaml", attention=ATTENTION, sequence_length=64)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.yaml"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"rotary_percent": 0.5}, ["model.rotary_percent = 1.0, but the checkpoint was trained with 0.5"]),
        ({"rotary_percent": 1.0, "no_rope_freq": None}, []),
        ({"no_rope_freq": 2}, ["model.no_rope_freq = [0, 0, 0, 0], but the checkpoint was trained with [0, 1, 0, 1]"]),
        ({"no_rope_freq": [0, 0, 0, 1]}, ["model.no_rope_freq = [0, 0, 0, 0], but the checkpoint was trained with"]),
    ],
)
def test_what_is_rotated_is_held_against_the_flags(flags, says):
    model = ModelConfig(num_layers=4, hidden_size=64, num_attention_heads=4)
    found = differences(flags, model)
    assert len(found) == len(says) and all(text in line for text, line in zip(says, found, strict=True))


def test_what_is_no_checkpoint_of_the_format_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="is not a checkpoint of format torch_dist"):
        find_iteration(tmp_path)
    (tmp_path / LATEST).write_text("12\n")
    (tmp_path / "iter_0000012/mp_rank_00").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="older format"):
        find_iteration(tmp_path)
    (tmp_path / "iter_0000012/.metadata").write_bytes(b"")
    assert find_iteration(tmp_path).name == "iter_0000012"


class Runs:
    """Pickled, it would run a command where it is read."""

    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call, ("touch was_run",)


def test_flags_are_read_without_running_anything(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for call in (subprocess.getoutput, os.system):
        stream = io.BytesIO()
        torch.save({"args": Namespace(num_layers=4, evil=Runs(call))}, stream)
        try:
            assert read_flags(stream.getvalue())["num_layers"] == 4
        except pickle.UnpicklingError as error:
            assert "blocked" in str(error)
        assert list(tmp_path.iterdir()) == []


def test_the_tokenizer_of_a_run_folder_is_looked_at(models, saved, tmp_path):
    imported(saved, tmp_path / "run", model=models[NAME].folder)
    shutil.copytree(TOKENS / "tokenizer", tmp_path / "run/tokenizer", dirs_exist_ok=True)
    with pytest.raises(AssertionError, match="run/tokenizer: the tokenizer has ids up to 127, but vocab_size = 99"):
        imported(saved, tmp_path / "again", model=tmp_path / "run")
    assert not (tmp_path / "again").exists()


def test_a_section_that_states_every_layer_gives_the_same_schedule():
    given = AttentionConfig(
        block_size=8,
        selector="threshold",
        threshold=0.9,
        layers={1: {"selector": "recent", "top_k": 5}},
        full_every_n=3,
    )
    layers = AttentionSchedule.from_config(given, 6).stages[0]
    section = AttentionConfig.model_validate(as_section(layers, given))
    assert AttentionSchedule.from_config(section, 6).stages[0] == layers


def test_a_stage_takes_over_nothing_of_another_stage():
    stages = [
        {"until": 0.5, "selector": "threshold"},
        {"until": 0.9, "selector": "recent"},
        {"until": 1.0, "kind": "full"},
    ]
    given = AttentionConfig(block_size=8, threshold=0.9, summary="min_max", stages=stages)
    for layers in AttentionSchedule.from_config(given, 3).stages:
        section = AttentionConfig.model_validate(as_section(layers, given))
        assert not [text for wrong, text in attention_checks(section, 3) if wrong]
        assert AttentionSchedule.from_config(section, 3).stages[0] == layers

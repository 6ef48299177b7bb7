"""Our models in Transformer Engine's layers: names, shapes and checkpoints are those of local layers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from distributed import run_ranks
from model_examples import VOCABULARY, tiny

CONFIG = tiny(model={"qk_layernorm": True, "num_layers": 3}, attention={"block_size": 8, "top_k": 2, "last_n_full": 1})
INDEXED = CONFIG.model_copy(
    update={"attention": CONFIG.attention.model_copy(update={"router": "index", "router_dim": 6})}
)


def build(implementation: str, config=CONFIG):
    """The model chunk of a one-rank run, on the CPU."""
    from moba_megatron import platform
    from moba_megatron.model import builder, specs
    from moba_megatron.model.schedule import AttentionSchedule

    if not torch.distributed.is_initialized() or not platform_started():
        platform.start_model_parallel(config.parallel)
    original = builder.transformer_config

    def settings(config, device_type=None):
        if implementation == "local":
            return original(config, device_type="cpu")
        return dataclasses.replace(original(config, device_type="cuda"), use_cpu_initialization=True)

    choose, device = specs.choose_implementation, builder.current_device
    builder.current_device = lambda: torch.device("cpu")
    builder.transformer_config = settings
    specs.choose_implementation = builder.choose_implementation = lambda device_type: implementation
    torch.cuda.is_available = lambda: implementation != "local"
    try:
        schedule = AttentionSchedule.from_config(config.attention, config.model.num_layers)
        return builder.build_model(config, VOCABULARY, schedule)
    finally:
        builder.transformer_config, builder.current_device = original, device
        specs.choose_implementation = builder.choose_implementation = choose
        torch.cuda.is_available = lambda: False


def platform_started() -> bool:
    from megatron.core import parallel_state

    return parallel_state.is_initialized()


def parameters(chunks) -> dict[str, torch.Tensor]:
    """By the names of local layers."""
    from moba_megatron.convert.mapping import canonical_name

    return {canonical_name(name, 0): parameter for name, parameter in chunks[0].named_parameters()}


def test_names_and_shapes_are_the_converters():
    def action():
        from moba_megatron.convert.mapping import parameter_shapes

        chunks = build("transformer_engine")
        kinds = {type(module).__module__.partition(".")[0] for module in chunks[0].modules()}
        found = {name: tuple(parameter.shape) for name, parameter in parameters(chunks).items()}
        return found == {name: tuple(shape) for name, shape in parameter_shapes(CONFIG.model).items()}, kinds

    equal, kinds = run_ranks(1, action)[0]
    assert equal and "transformer_engine" in kinds


def test_a_hybrid_has_our_core_attention_where_it_is_needed():
    def action(precision):
        training = CONFIG.training.model_copy(update={"precision": precision})
        (model,) = build("transformer_engine", CONFIG.model_copy(update={"training": training}))
        return [type(layer.self_attention.core_attention).__name__ for layer in model.decoder.layers]

    ours = ["MoBACoreAttention"]
    assert run_ranks(1, action, "bf16") == [[*ours, *ours, "TEDotProductAttention"]]
    # Transformer Engine's would hold the matrix of all scores in fp32.
    assert run_ranks(1, action, "fp32") == [3 * ours]


def test_weight_gradients_are_fused_in_all_layers_but_the_last():
    """The output layer is megatron-core's own, which would ask for apex's kernel."""

    def action():
        (model,) = build("transformer_engine")
        fused = {
            type(module).__name__: module.fuse_wgrad_accumulation
            for module in model.modules()
            if hasattr(module, "fuse_wgrad_accumulation")
        }
        return fused, model.output_layer.gradient_accumulation_fusion, model.config.gradient_accumulation_fusion

    fused, output, config = run_ranks(1, action)[0]
    assert len(fused) >= 2 and all(fused.values())
    assert not output and config


@pytest.mark.parametrize("config", [CONFIG, INDEXED], ids=["plain", "index"])
def test_checkpoints_interchange_with_local_layers(tmp_path, config):
    """Each way, with the strictness of loading weights and of resuming."""

    def action():
        from megatron.core import dist_checkpointing

        from moba_megatron.checkpoint import reader
        from moba_megatron.checkpoint.state import load_weights, sharded_model
        from moba_megatron.convert.stored import StoredWeights

        chunks = {name: build(name, config) for name in ("local", "transformer_engine")}
        for name, model in chunks.items():
            (tmp_path / name).mkdir()
            with torch.no_grad():
                for parameter in model[0].parameters():
                    parameter.normal_()
            dist_checkpointing.save(sharded_model(model), str(tmp_path / name))
        wrong = []
        for source, saved in chunks.items():
            expected = {name: parameter.detach().clone() for name, parameter in parameters(saved).items()}
            stored = StoredWeights(tmp_path / source)
            if set(stored.names(config.model)) != set(expected):
                wrong.append(f"stored names of {source}")
            for target in chunks:
                for require_all in (False, True):
                    fresh = build(target, config)
                    loaded = reader._load(tmp_path / source, sharded_model(fresh), require_all=require_all)
                    load_weights(fresh, loaded)
                    got = parameters(fresh)
                    if not all(torch.equal(got[name], value) for name, value in expected.items()):
                        wrong.append(f"{source} into {target}")
        return wrong

    assert run_ranks(1, action) == [[]]


def test_an_index_reads_what_it_reads_in_local_layers():
    """Transformer Engine has the norm in its projection. Where the index alone learns, all else is cut off from the
    hidden states."""

    def action():
        from moba_megatron.model.frozen import train_only

        weights, found = {}, {}
        for name in ("local", "transformer_engine"):
            model = build(name, INDEXED)
            with torch.no_grad():
                for key, parameter in parameters(model).items():
                    parameter.copy_(weights.setdefault(key, torch.randn(parameter.shape)))
            train_only(model, ["router"])
            hidden = torch.randn(5, 1, INDEXED.model.hidden_size, generator=torch.Generator().manual_seed(0))
            layer = model[0].decoder.layers[0]
            attention, normed = layer.self_attention, layer.input_layernorm(hidden.requires_grad_())
            found[name] = attention.block_router(attention._normed(normed), None, None)
            cut = not (normed.requires_grad or layer.pre_mlp_layernorm(hidden).requires_grad)
            learning = {key for key, parameter in parameters(model).items() if parameter.requires_grad}
            assert cut and learning and all("block_router" in key for key in learning)
        return [float((one - two).detach().abs().max()) for one, two in zip(*found.values(), strict=True)]

    assert max(run_ranks(1, action)[0]) < 1e-5


def test_every_shipped_configuration_has_settings_for_cuda():
    def action():
        from pathlib import Path

        from moba_megatron.config import load_config
        from moba_megatron.model import builder

        torch.cuda.is_available = lambda: True
        found = set()
        for path in sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml")):
            if "base" not in path.stem and "\naxes:" not in path.read_text():
                made = builder.transformer_config(load_config(path), device_type="cuda")
                found.add((made.transformer_impl, made.apply_rope_fusion, made.gradient_accumulation_fusion))
        return found

    assert run_ranks(1, action) == [{("transformer_engine", True, True)}]

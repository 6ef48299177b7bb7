"""One spec for layers that differ: by their number, wherever megatron-core builds them."""

import doctest
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from callers import LENGTH, VOCABULARY, GPTModelConfig, PlainAttention, builder_of_016, transformer_config
from distributed import run_ranks
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from model_examples import tiny, tokens, train

from moba_megatron.megatron import hybrid_stack_spec, layer_spec
from moba_megatron.model import schedule as schedule_module
from moba_megatron.model import specs
from moba_megatron.model.core_attention import MoBACoreAttention
from moba_megatron.model.norm import RMSNorm
from moba_megatron.model.schedule import AttentionSchedule, LayerAttention

ARGUMENTS = {"attn_mask_type": AttnMaskType.causal, "attention_type": "self"}
MIXED = {"block_size": 8, "top_k": 2, "full_layers": [1, 4, 6], "last_n_full": 1}


def train_mixed(layout, steps, weights=None):
    """`train` with 8 layers whose stock layer has `PlainAttention`, and the class of each layer's core attention."""
    stock, build, made = specs._stock_layer, specs.scheduled_core_attention, {}

    def record(**arguments):
        core = build(**arguments)
        made[arguments["layer_number"]] = type(core).__name__
        return core

    specs.scheduled_core_attention = record
    specs._stock_layer = lambda *args, **how: specs.with_core_attention(stock(*args, **how), PlainAttention)
    training = {"steps": 3, "global_batch_size": 4, "precision": "fp32", "loss_chunk_size": 24}
    config = tiny(model={"num_layers": 8}, attention=MIXED, parallel=layout, training=training)
    return *train(config, VOCABULARY, steps, weights), made


def test_interleaved_pipelines_find_their_layers_and_keep_stock_attention_in_full_ones():
    _, _, weights, _ = run_ranks(1, train_mixed, {}, 0)[0]
    losses, norms, _, made = run_ranks(1, train_mixed, {}, 3, weights)[0]
    assert made == {n: "PlainAttention" if n in {1, 4, 6, 8} else "MoBACoreAttention" for n in range(1, 9)}
    ranks = run_ranks(2, train_mixed, {"pipeline": 2, "virtual_pipeline": 2}, 3, weights)
    assert [sorted(rank[3]) for rank in ranks] == [[1, 2, 5, 6], [3, 4, 7, 8]]
    assert ranks[0][3] | ranks[1][3] == made
    for rank_losses, rank_norms, _, _ in ranks:
        torch.testing.assert_close(rank_losses, losses, rtol=3e-4, atol=0)
        torch.testing.assert_close(rank_norms, norms, rtol=3e-4, atol=0)


def layers_of_chunks(attention):
    """(number, how it attends, which spec its submodules are from) of every layer of this rank, under `spec`."""
    from megatron.core import parallel_state

    from moba_megatron import platform
    from moba_megatron.config import ParallelConfig
    from moba_megatron.megatron import specs as callers_specs

    platform.start_model_parallel(ParallelConfig(pipeline=2, virtual_pipeline=2))
    platform.seed_all(5)
    marks = []
    whole = callers_specs.layer_specs

    def numbered(config, schedule, **settings):
        found = [specs.with_core_attention(layer, specs.core_attention_of(layer)) for layer in whole(config, schedule)]
        marks.extend((id(layer.submodules), number, found) for number, layer in enumerate(found, start=1))
        return found

    callers_specs.layer_specs = numbered
    config = transformer_config(
        num_layers=8, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2,
        pipeline_dtype=torch.float32, overlap_p2p_comm=True, batch_p2p_comm=False,
    )  # fmt: skip
    result = []
    for chunk in range(2):
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk)
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk)
        model = builder_of_016(config, vp_stage=chunk, pre_process=first, post_process=last)
        for layer in model.decoder.layers:
            number = next(number for mark, number, _ in marks if mark == id(layer.submodules_config))
            result.append((layer.layer_number, str(layer.self_attention.core_attention.attention), number))
    return result


def test_a_finished_spec_finds_its_layers_over_an_interleaved_pipeline(tmp_path, monkeypatch):
    (tmp_path / "moba.yaml").write_text(yaml.safe_dump(MIXED))
    monkeypatch.setenv("MOBA_CONFIG", str(tmp_path / "moba.yaml"))
    ranks = run_ranks(2, layers_of_chunks, MIXED)
    assert [[number for number, _, _ in rank] for rank in ranks] == [[1, 2, 5, 6], [3, 4, 7, 8]]
    for number, attends, submodules in ranks[0] + ranks[1]:
        assert submodules == number
        assert attends == ("full" if number in {1, 4, 6, 8} else "moba B=8 K=2")


def hybrid_and_gpt(pattern, attention):
    """Of a `HybridModel` of attention and MLP layers in turn, and of a `GPTModel` with the same weights: losses and
    gradients of the embeddings; and how the attention layers of the first one attend, with their numbers."""
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.ssm.mlp_layer import MLPLayer

    from moba_megatron import platform
    from moba_megatron.config import ParallelConfig

    platform.start_model_parallel(ParallelConfig())
    platform.seed_all(5)
    hybrid_block.TENorm = RMSNorm  # the stack's final norm stands there, and not in the spec
    count = pattern.count("*")
    gpt = GPTModelConfig(transformer_config(num_layers=count), partial(layer_spec, attention=attention)).build()
    layer = specs.with_core_attention(layer_spec(gpt.config, attention=attention), PlainAttention)
    parts = layer.submodules
    stack = ModuleSpec(
        module=hybrid_block.HybridStack,
        submodules=hybrid_block.HybridStackSubmodules(
            attention_layer=ModuleSpec(
                module=layer.module,
                submodules=TransformerLayerSubmodules(
                    input_layernorm=parts.input_layernorm,
                    self_attention=parts.self_attention,
                    self_attn_bda=parts.self_attn_bda,
                ),
            ),
            mlp_layer=ModuleSpec(
                module=MLPLayer,
                submodules=TransformerLayerSubmodules(
                    pre_mlp_layernorm=parts.pre_mlp_layernorm, mlp=parts.mlp, mlp_bda=parts.mlp_bda
                ),
            ),
        ),
    )
    hybrid = HybridModel(
        config=transformer_config(num_layers=len(pattern)),
        hybrid_stack_spec=hybrid_stack_spec(pattern, attention=attention, stack_spec=stack),
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        hybrid_layer_pattern=pattern,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    weights = {name.replace("final_norm.", "final_layernorm."): p for name, p in hybrid.named_parameters()}
    for name, parameter in gpt.named_parameters():
        if layer_name := re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name):
            number, rest = layer_name.groups()
            name = f"decoder.layers.{2 * int(number) + ('mlp' in rest)}.{rest}"
        weights.pop(name).data.copy_(parameter)
    assert not weights
    ids, positions, labels = tokens(2, LENGTH)
    found = []
    for model in (hybrid, gpt):
        loss = model(ids, positions, None, labels=labels).mean()
        loss.backward()
        found.append((loss.detach(), model.embedding.word_embeddings.weight.grad))
    cores = [layer.self_attention.core_attention for layer in hybrid.decoder.layers[::2]]
    return found, [str(core.attention) for core in cores], [core.layer_number for core in cores]


def test_a_hybrid_model_of_attention_and_mlp_layers_is_the_gpt_model():
    pytest.importorskip("megatron.core.models.hybrid.hybrid_model", reason="this megatron-core has no HybridModel")
    attention = {"block_size": 8, "top_k": 2, "layers": {2: {"top_k": 3}}}
    (hybrid, gpt), attends, numbers = run_ranks(1, hybrid_and_gpt, "*-*-*-", attention)[0]
    assert attends == ["moba B=8 K=2", "moba B=8 K=3", "moba B=8 K=2"]
    assert numbers == [1, 3, 5]
    for ours, theirs in zip(hybrid, gpt, strict=True):
        assert torch.equal(ours, theirs)


def test_the_example_of_the_page_on_plugging_in_builds():
    pytest.importorskip("megatron.core.models.hybrid.hybrid_model", reason="this megatron-core has no HybridModel")
    page = (Path(__file__).parents[2] / "docs/plug_in.md").read_text()
    names = {}
    exec(re.search(r"```python hybrid\n(.*?)```", page, flags=re.DOTALL).group(1), names)
    build = specs.core_attention_of(names["stack"].submodules.attention_layer)
    given = {**ARGUMENTS, "config": transformer_config(num_layers=10)}
    assert str(build(layer_number=4, **given).attention) == "moba B=16 K=3"
    assert build.keywords["core"].keywords["schedule"].always_full(9)


def test_always_full_layers_of_a_hybrid_model_keep_the_core_attention_of_the_stack():
    layer = specs.with_core_attention(layer_spec(transformer_config(), attention={"block_size": 8}), PlainAttention)
    stack = ModuleSpec(module=object, submodules=SimpleNamespace(attention_layer=layer))
    ours = hybrid_stack_spec("M*M*", attention={"block_size": 8, "last_n_full": 1}, stack_spec=stack)
    build = specs.core_attention_of(ours.submodules.attention_layer)
    given = {**ARGUMENTS, "config": transformer_config(num_layers=4)}
    assert type(build(layer_number=2, **given)) is MoBACoreAttention
    assert type(build(layer_number=4, **given)) is PlainAttention
    assert stack.submodules.attention_layer is layer
    for number, config in ((1, given["config"]), (2, transformer_config(num_layers=5))):
        with pytest.raises(ValueError, match=rf"layer {number} of {config.num_layers} is an attention layer of the mo"):
            build(layer_number=number, **{**given, "config": config})
    given["config"].mtp_num_layers = 1
    with pytest.raises(ValueError, match="multi-token prediction"):
        build(layer_number=2, **given)


def test_a_pattern_that_does_not_fit_is_refused():
    schedule = AttentionSchedule.uniform(2, LayerAttention("moba", 8, 2))
    with pytest.raises(ValueError, match=r"pattern 'M\*M' has 1 attention layers \(\*\), but the schedule has 2"):
        schedule.over_pattern("M*M")
    with pytest.raises(ValueError, match="multi-token prediction"):
        schedule.over_pattern("M*M*/MM")
    with pytest.raises(ValueError, match="pattern 'M-M-' has no attention layer"):
        hybrid_stack_spec("M-M-", attention=MIXED, stack_spec=ModuleSpec(module=object))
    assert [layer.kind for layer in schedule.over_pattern("M*|*-").stages[0]] == ["full", "moba", "moba", "full"]
    assert doctest.testmod(schedule_module).failed == 0

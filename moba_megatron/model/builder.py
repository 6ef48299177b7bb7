"""From a configuration to megatron-core models: the model chunks of one pipeline rank, or a model on the meta device.

megatron-core has defaults that are wrong here or depend on the machine; all of them are set in `transformer_config`,
with the reason beside each. The returned chunks are bare modules in the training dtype (fp32 or bf16): the caller wraps
them for data parallelism.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import get_args

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from moba_megatron.config import Config, ParallelConfig, TrainingConfig
from moba_megatron.config.schema import RecomputedModule
from moba_megatron.model.block_router import RouterSettings
from moba_megatron.model.exchange_choice import resolve_exchange
from moba_megatron.model.experts import expert_settings, mark_experts, with_routers
from moba_megatron.model.feed_forward import chunk_feed_forward
from moba_megatron.model.first_weights import Place, replay_draws
from moba_megatron.model.gpt import ChunkedLossGPTModel
from moba_megatron.model.index_inputs import learn_blocks
from moba_megatron.model.index_weights import first_indexes
from moba_megatron.model.rotary import (
    cosine_factor,
    document_rotary,
    rotary_frequencies,
    set_cosine_factor,
    softmax_scale,
)
from moba_megatron.model.schedule import AttentionSchedule
from moba_megatron.model.specs import block_spec, choose_implementation
from moba_megatron.platform import current_device, optional_libraries, seed_all

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def padded_vocab_size(vocab_size: int, tensor_parallel: int) -> int:
    """Rows of the embedding: the vocabulary rounded up to a multiple of the tensor-parallel size.

    >>> padded_vocab_size(50257, 2)
    50258
    """
    return tensor_parallel * -(-vocab_size // tensor_parallel)


def transformer_config(config: Config, *, device_type: str | None = None) -> TransformerConfig:
    """megatron-core's configuration of this model.

    Args:
        device_type: "cpu" or "cuda"; default: this process's device. On the CPU no fused kernel is asked for.

    Raises:
        ValueError: if megatron-core refuses a combination (its assertions come through as they are).
    """
    model = config.model
    device_type = device_type or current_device().type
    dtype = DTYPES[config.training.precision]
    transformer = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.head_size,
        ffn_hidden_size=model.ffn_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.layernorm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=model.add_qkv_bias,
        qk_layernorm=model.qk_layernorm,
        rotary_interleaved=False,
        no_rope_freq=model.no_rope_freq,
        softmax_scale=softmax_scale(model),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_method_std,
        # Drawing weights that are then read takes longer than reading them.
        perform_initialization=model.init_from is None,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # The loss is a sum over tokens, divided by their number over all micro-batches and ranks once, in the end;
        # otherwise it is a mean of means, which weighs tokens unequally when masks differ.
        calculate_per_token_loss=True,
        **expert_settings(model, config.parallel, grouped=choose_implementation(device_type) == "transformer_engine"),
        **_parallel_settings(config, dtype),
        **_recompute_settings(config.training),
        **_machine_settings(device_type, fused_rotary=cosine_factor(model) == 1.0),
    )
    set_cosine_factor(transformer, cosine_factor(model))
    if config.attention.router == "index" and config.attention.router_loss != "none":
        learn_blocks(transformer)
    if config.training.train_only is not None:
        # The biases of balanced experts are no parameters, and stay all the same.
        transformer.moe_router_bias_update_rate = 0.0
    return transformer


def _parallel_settings(config: Config, dtype: torch.dtype) -> dict:
    parallel = config.parallel
    interleaved = parallel.virtual_pipeline is not None
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "sequence_parallel": parallel.sequence,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline,
        "pipeline_model_parallel_layout": _pipeline_layout(config) if parallel.pipeline_layers else None,
        "context_parallel_size": parallel.context,
        # For attention of Transformer Engine; ours has the exchange from its spec. One word: a list with one for each
        # layer is off by one in megatron-core 0.16. Its other exchanges are not sure to take packs.
        "cp_comm_type": "p2p" if config.packed else resolve_exchange(config).full or "p2p",
        # Documents are padded for context parallelism, so packs differ in length.
        "variable_seq_lengths": parallel.context > 1 and parallel.pipeline > 1 and config.packed,
        "pipeline_dtype": dtype,
        "autocast_dtype": dtype,
        # The interleaved schedule of two stages computes wrong gradients with any other pair.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        # A wait of the whole device after every exchange, for PyTorch before 1.13.
        "batch_p2p_sync": False,
        # An overlapped send may still read the output after it is called done (seen with gloo: wrong losses, no error).
        "deallocate_pipeline_outputs": not interleaved,
    }


def _pipeline_layout(config: Config) -> list[list[str]]:
    """The contents of each model chunk, in the order of the model and with megatron-core's terms."""
    layout = [["decoder"] * count for count in config.chunk_layers]
    return [["embedding", *layout[0]], *layout[1:-1], [*layout[-1], "loss"]]


def _recompute_settings(training: TrainingConfig) -> dict:
    if training.recompute == "full":
        method, layers = ("block", training.recompute_layers) if training.recompute_layers else ("uniform", 1)
        return {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": layers}
    modules = [module for module in get_args(RecomputedModule) if training.repeats(module)]
    return {"recompute_granularity": "selective", "recompute_modules": modules} if modules else {}


def _machine_settings(device_type: str, *, fused_rotary: bool = True) -> dict:
    """Fused kernels: none on the CPU; on a GPU those whose library is there."""
    libraries = optional_libraries()
    cuda = device_type == "cuda"
    implementation = choose_implementation(device_type)
    return {
        "transformer_impl": implementation,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": cuda,
        "apply_rope_fusion": fused_rotary and implementation == "transformer_engine",
        # megatron-core's own linear layers need apex's kernel for it; the output layer, which is always one of them,
        # does without (`ChunkedLossGPTModel`).
        "gradient_accumulation_fusion": implementation == "transformer_engine"
        or (cuda and libraries["apex"].available),
        "cross_entropy_loss_fusion": False,
    }


def build_model(
    config: Config, vocab_size: int, schedule: AttentionSchedule, *, stage: int = 0
) -> list[ChunkedLossGPTModel]:
    """The model chunks of this pipeline rank, on this process's device, in training mode.

    Weights depend on `config.run.seed` and the kind of device only, not on the parallel sizes (`first_weights`); this
    seeds all random streams (`seed_all`). With `model.init_from` they are whatever was in memory, for the caller to
    fill; indexes that choose blocks are drawn.
    The process groups must have been started (`platform.start_model_parallel`), and `platform.apply` called.

    Args:
        vocab_size: entries of the vocabulary, without padding.
        schedule: what each layer attends to.
        stage: training stage (from 0) that the layers start with; `set_attention_stage` changes it later.

    Raises:
        ValueError: if the schedule does not fit the model.
    """
    transformer = transformer_config(config)
    seed_all(config.run.seed)
    chunks = []
    for chunk in range(config.parallel.virtual_pipeline or 1):
        vp_stage = chunk if config.parallel.virtual_pipeline else None
        chunks.append(
            _build_chunk(
                config,
                transformer,
                vocab_size,
                schedule,
                stage,
                pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
                vp_stage=vp_stage,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
                pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
            )
        )
    mark_experts(chunks, config.parallel)
    # megatron-core draws experts from a stream of their own, which depends on the rank, also where there is one.
    has_experts = config.model.num_moe_experts is not None
    if transformer.perform_initialization and (has_experts or config.parallel.tensor * config.parallel.pipeline > 1):
        replay_draws(
            chunks,
            config.model,
            transformer,
            vocab_size=vocab_size,
            seed=config.run.seed,
            place=Place(
                tensor=parallel_state.get_tensor_model_parallel_rank(),
                tensors=config.parallel.tensor,
                expert=parallel_state.get_expert_model_parallel_rank(),
                experts=config.parallel.expert,
                expert_tensor=parallel_state.get_expert_tensor_parallel_rank(),
                expert_tensors=config.parallel.expert_tensor,
            ),
        )
    # Weights to copy are there if they were drawn.
    first_indexes(
        chunks, config.attention.router_init if transformer.perform_initialization else "drawn", config.run.seed
    )
    return chunks


def _build_chunk(
    config: Config,
    transformer: TransformerConfig,
    vocab_size: int,
    schedule: AttentionSchedule,
    stage: int,
    *,
    pp_rank: int,
    vp_stage: int | None,
    pre_process: bool,
    post_process: bool,
    pg_collection: ProcessGroupCollection,
) -> ChunkedLossGPTModel:
    model = config.model
    exchange = resolve_exchange(config)
    layers = block_spec(
        transformer,
        schedule,
        stage=stage,
        backend=config.attention.backend,
        full_backend=config.attention.full_backend,
        exchange={"moba": exchange.moba or "auto", "full": exchange.full or "auto"},
        workspace_bytes=config.attention.workspace_bytes,
        key_convolution=config.attention.key_convolution,
        router=_router_settings(config, transformer, pg_collection),
        pp_rank=pp_rank,
        vp_stage=vp_stage,
    )
    built = ChunkedLossGPTModel(
        config=transformer,
        transformer_layer_spec=with_routers(layers),
        vocab_size=padded_vocab_size(vocab_size, config.parallel.tensor),
        unpadded_vocab_size=vocab_size,
        loss_chunk_size=config.training.tokens_of_loss_chunk(current_device().type),
        max_sequence_length=config.data.sequence_length,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_frequencies=rotary_frequencies(model),
        pg_collection=pg_collection,
        vp_stage=vp_stage,
    )
    if config.training.mlp_chunk_size is not None:
        chunk_feed_forward(built, config.training.mlp_chunk_size)
    return built


def _router_settings(
    config: Config, transformer: TransformerConfig, pg_collection: ProcessGroupCollection
) -> RouterSettings | None:
    """The indexes of the layers of a chunk; None where layers choose by their own queries and keys."""
    attention, model = config.attention, config.model
    if attention.router == "own":
        return None
    assert attention.router_dim is not None, "checked with the configuration"
    rotary = None
    if attention.router_dim != model.head_size:
        frequencies = rotary_frequencies(model.model_copy(update={"kv_channels": attention.router_dim}))
        length, channels = config.data.sequence_length, attention.router_dim
        rotary = document_rotary(
            transformer, frequencies, length, channels=channels, cp_group=pg_collection.cp
        ).for_tokens
    return RouterSettings(
        dim=attention.router_dim,
        heads=attention.router_heads,
        keys=attention.router_keys,
        norm=attention.router_norm,
        loss=attention.router_loss,
        loss_coeff=attention.router_loss_coeff,
        rotary=rotary,
    )


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a whole model, over all ranks, without padding of the vocabulary."""

    layers: int
    """Decoder layers and final norm: what scaling laws count."""
    embedding: int
    """The embedding, which is the output layer as well if they are tied."""
    output: int
    """The output layer; 0 if it is tied to the embedding."""

    @property
    def total(self) -> int:
        return self.layers + self.embedding + self.output


def build_meta_model(config: Config, vocab_size: int) -> ChunkedLossGPTModel:
    """The whole model, unsharded, on the meta device: shapes without memory. Needs no process group and no platform."""
    whole = config.model_copy(update={"parallel": ParallelConfig()})
    transformer = dataclasses.replace(
        transformer_config(whole, device_type="cpu"),
        use_cpu_initialization=True,
        perform_initialization=False,
        # Routers and their dispatcher would ask for a device. None of it is parameters.
        moe_token_dispatcher_type="allgather",
        moe_router_enable_expert_bias=False,
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
    )
    schedule = AttentionSchedule.from_config(config.attention, config.model.num_layers)
    with torch.device("meta"):
        return _build_chunk(
            whole, transformer, vocab_size, schedule, 0, pp_rank=0, vp_stage=None, pre_process=True, post_process=True,
            pg_collection=_groups_of_one(),
        )  # fmt: skip


def count_parameters(config: Config, vocab_size: int | None = None) -> ParameterCount:
    """Count the parameters by building the model on the meta device.

    Args:
        vocab_size: default: `model.vocab_size`.

    Raises:
        ValueError: if neither gives a vocabulary size.
    """
    vocab_size = vocab_size or config.model.vocab_size
    if vocab_size is None:
        raise ValueError("no vocabulary size: set model.vocab_size or pass the tokenizer's size")
    model = build_meta_model(config, vocab_size)
    counts = {"embedding.": 0, "output_layer.": 0, "decoder.": 0}
    for name, parameter in model.named_parameters():
        counts[next(prefix for prefix in counts if name.startswith(prefix))] += parameter.numel()
    return ParameterCount(layers=counts["decoder."], embedding=counts["embedding."], output=counts["output_layer."])


def _groups_of_one() -> ProcessGroupCollection:
    """Process groups of a model that is only looked at: megatron-core takes None as a group of one rank."""
    groups = [field.name for field in dataclasses.fields(ProcessGroupCollection)]
    return ProcessGroupCollection(**dict.fromkeys(groups))

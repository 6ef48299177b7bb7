"""The one configuration: a strict, typed schema, loaded from YAML files and command-line overrides."""

from moba_megatron.config.attention import AttentionConfig, AttentionKind, AttentionStage, LayerAttentionOverride
from moba_megatron.config.attention_file import AttentionFile, load_attention
from moba_megatron.config.checks import ConfigError, attention_checks, check_world
from moba_megatron.config.load import config_from_dict
from moba_megatron.config.model import ModelConfig
from moba_megatron.config.named import load_config
from moba_megatron.config.parallel import Exchange, ExchangeConfig, ParallelConfig
from moba_megatron.config.schema import (
    BlendEntry,
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
)
from moba_megatron.config.section import Section

__all__ = [
    "AttentionConfig",
    "AttentionFile",
    "AttentionKind",
    "AttentionStage",
    "BlendEntry",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "Exchange",
    "ExchangeConfig",
    "LayerAttentionOverride",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RunConfig",
    "Section",
    "TrainingConfig",
    "attention_checks",
    "check_world",
    "config_from_dict",
    "load_attention",
    "load_config",
]

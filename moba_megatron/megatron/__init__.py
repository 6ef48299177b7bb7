"""MoBA in training scripts that are not ours: what Megatron-LM's `--spec` and Megatron-Bridge's
`transformer_layer_spec` name.

| caller | says |
|---|---|
| Megatron-LM from 0.19 on | `--spec moba_megatron.megatron layer_spec` |
| Megatron-LM 0.16 to 0.18 | `--spec moba_megatron.megatron spec` |
| Megatron-Bridge | `provider.transformer_layer_spec = layer_spec` |
| a `HybridModel` | `hybrid_stack_spec(pattern)` |

How layers attend comes from the file that `MOBA_CONFIG` names, or from the keyword `attention`. What does not go
together with MoBA in the caller's own settings is refused here, before a layer is built (`callers`).
"""

from moba_megatron.megatron.specs import MoBATransformerLayer, hybrid_stack_spec, layer_spec, spec

__all__ = ["MoBATransformerLayer", "hybrid_stack_spec", "layer_spec", "spec"]

"""The model of this folder with an index of blocks, which `modeling_moba_router.py` computes."""

from __future__ import annotations

from moba_megatron.convert.portable_modeling import MoBALlamaForCausalLM
from moba_megatron.hf.block_router import add_block_routers


class IndexedMoBALlamaForCausalLM(MoBALlamaForCausalLM):
    """The model of this folder, whose MoBA layers choose blocks by an index with weights of its own."""

    def post_init(self) -> None:
        """As transformers', with the indexes in place."""
        add_block_routers(self)
        super().post_init()

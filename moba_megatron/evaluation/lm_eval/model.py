"""A model of transformers as EleutherAI's harness sees it, with two differences: texts that do not fit the model are
refused instead of cut, and decoding goes through a cache with block summaries.

Imported only where `lm_eval` is installed.
"""

from __future__ import annotations

import logging
from typing import Any

from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from moba_megatron.hf import MoBACache


class HarnessModel(HFLM):
    """Args:
        model: in evaluation mode, on its device, with its attention set.
        tokenizer: with a token that ends texts.
        batch_size: texts at a time.

    Attributes:
        longest: tokens of the longest text so far, with what is generated.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int = 1):
        logger = logging.getLogger("lm_eval")
        level = logger.level
        # It warns that a model which is loaded already cannot be loaded otherwise.
        logger.setLevel(logging.ERROR)
        try:
            super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        finally:
            logger.setLevel(level)
        self.longest = 0

    def _loglikelihood_tokens(self, requests: list, *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        for _, context, continuation in requests:
            # The last token is predicted, never read.
            self._check_fits(len(context) + len(continuation) - 1, f"context and {len(continuation)} tokens to predict")
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def generate_until(self, requests: list, *args: Any, **kwargs: Any) -> list[str]:
        for context, settings in (request.args for request in requests):
            new = normalize_gen_kwargs(settings, self.max_gen_toks)["max_gen_toks"]
            self._check_fits(len(self.tok_encode(context)) + new, f"prompt and {new} tokens to generate")
        return super().generate_until(requests, *args, **kwargs)

    def _check_fits(self, tokens: int, what: str) -> None:
        """The harness would cut the beginning of a text that is too long, and score what is left."""
        if tokens > self.max_length:
            raise ValueError(
                f"a text of the task has {tokens} tokens ({what}), the model's window is {self.max_length} "
                "(max_position_embeddings): texts are never cut; choose shorter tasks"
            )
        self.longest = max(self.longest, tokens)

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **settings: Any) -> Any:
        return super()._model_generate(context, max_length, stop, past_key_values=MoBACache(max_length), **settings)

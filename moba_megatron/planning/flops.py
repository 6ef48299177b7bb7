"""Floating-point operations of training, with attention counted by the pairs that are attended.

Each pair of a query and a key that it attends costs 4 D operations a head forward (two products of size D, two
operations each) and twice that backward. A matrix of P parameters costs 2 P a token forward and 4 P backward; of the
experts of a layer those count that a token is sent to. An index that chooses blocks counts as in `index_shape`. Where
it alone learns (`training.train_only`) there is no backward pass but its own. Recomputed activations do not count, so
*MFU* (model FLOPs utilisation, arXiv 2204.02311) is useful work over the machine's peak.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moba_megatron.config.sizes import matrix_parameters
from moba_megatron.ops.pairs import attended_pairs
from moba_megatron.planning.index_shape import IndexShape

if TYPE_CHECKING:
    from moba_megatron.config import Config

Sizes = tuple[int, int | tuple[int, ...]]
# Dense bf16 operations per second, from the makers' data sheets; matched as a part of the device's name.
PEAK_BF16 = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}


def training_flops_per_token(config: Config, vocab_size: int, layers: Sequence[Sizes | None]) -> float:
    """Forward and backward operations for one token of a full-length document.

    Args:
        layers: block size and top-k of each layer (or one for each key head), None for a full one.
    """
    length = config.data.sequence_length
    pairs = float(sum(attended_pairs(length, *(layer or ())) for layer in layers) / length)
    passes = 3 if config.training.train_only is None else 1
    attention = 4 * passes * config.model.head_size * config.model.num_attention_heads * pairs
    index = IndexShape.of(config.attention, config.model)
    if index is not None:
        attention += sum(index.training_flops(config.model, length, *layer) for layer in layers if layer) / length
    return 2 * passes * matrix_parameters(config.model, vocab_size) + attention


def peak_flops(device_name: str) -> float | None:
    """The machine's dense bf16 peak in operations per second, None if its name is not in the table."""
    return next((peak for name, peak in PEAK_BF16.items() if name in device_name), None)

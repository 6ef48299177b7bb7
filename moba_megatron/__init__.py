"""MoBA (Mixture of Block Attention, arXiv 2502.13189) for stock megatron-core."""

__version__ = "0.1.0"

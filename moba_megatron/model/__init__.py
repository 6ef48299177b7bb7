"""The seam to megatron-core: core attention, layer specs, attention schedule, model builder, chunked loss."""

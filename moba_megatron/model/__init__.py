"""The seam to megatron-core: core attention, layer specs, attention schedule, model builder, chunked loss.

`core_attention` is what layers call, `context_parallel` and `exchange_choice` what it does where the sequence lies on
several ranks; `schedule` says how each layer attends in each stage, `specs` and `builder` make the model, `gpt`,
`rotary`, `norm` and `key_convolution` are what we add to megatron-core's; `forward` takes a microbatch through it.
"""

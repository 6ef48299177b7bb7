"""From text to indexed files.

`prepare` turns sources of text (files, JSONL, Parquet, Arrow, Hugging Face datasets) into megatron-core's indexed
format by a recipe; `mix` makes blends of the results by weight and document length, `inspect` looks at them. `indexed`,
`manifest`, `tokenizer`, `loss_mask` and `blend` are what readers of the results need. Preparing needs no torch; the
modules are imported where they are used, nothing happens here.
"""

"""From text to tokens to batches.

`prepare` turns sources of text (files, JSONL, Parquet, Arrow, Hugging Face datasets) into megatron-core's indexed
format by a recipe; `mix` makes blends of the results by weight and document length, `inspect` looks at them. `datasets`
builds megatron-core's GPT datasets from them for a training configuration; `batches` cuts these into microbatches with
document boundaries. Preparing needs no torch; the modules are imported where they are used, nothing happens here.
"""

"""From text to tokens to batches.

`prepare` turns sources of text (files, JSONL, Parquet, Hugging Face datasets) into megatron-core's indexed format by a
recipe; `datasets` builds megatron-core's GPT datasets from it for a training configuration; `batches` cuts them into
microbatches with document boundaries. Preparing needs no torch; the modules are imported where they are used, nothing
happens here.
"""

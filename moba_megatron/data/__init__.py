"""From indexed files to batches.

`datasets` builds megatron-core's GPT datasets for a training configuration, `packing` fills rows with whole documents;
`batches` cuts samples into microbatches with document boundaries, `feed` gives a rank its own.
"""

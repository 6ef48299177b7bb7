"""Context parallelism: one sequence over several ranks, the same attention.

`layout` says who holds which token, `plan` what follows from it for blocks, `summaries` lets every rank know all block
summaries, `heads` trades tokens for heads, `ring`, `gather` and `dispatch` bring keys to queries or queries to keys,
`attention` is the one autograd function over them, `traffic` counts and predicts bytes. Takes process groups as
arguments and knows no configuration.
"""

"""Context parallelism: one sequence over several ranks, the same attention.

`layout` says who holds which token, `context_plan` what follows from it for blocks, `summaries` lets every rank know
all block summaries. Each exchange is a module: `ring`, `gather` and `dispatch` bring keys to queries or queries to
keys, `heads` trades tokens for heads, `two_levels` does both; it carries itself out (`exchange`) and says what it takes
(`exchange_kind`), and `exchanges` is the table of all. `attention` is the one autograd function over them, `wire`
sends. Takes process groups as arguments and knows no configuration.
"""

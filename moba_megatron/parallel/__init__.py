"""Context parallelism: one sequence over several ranks, the same attention.

`layout` says who holds which token, `context_plan` what follows from it for blocks, `summaries` lets every rank know
all block summaries. Each exchange is a module of its own name: `p2p`, `all_gather` and `dispatch` bring keys to queries
or queries to keys (`exchange`; `copies` of the blocks that everybody wants), `a2a` trades tokens for heads, `a2a_p2p`
does both. Each says what it takes (`exchange_kind`), and `exchanges` is the table of all. `between_shards` is the one
autograd function over them, `attention` the call, and `router` lets another choose and learn; `halo` brings the tokens
before a chunk, `wire` has the collectives. Takes process groups as arguments and knows no configuration.
"""

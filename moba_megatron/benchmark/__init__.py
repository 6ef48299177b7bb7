"""What is timed: the operator against full attention, the exchanges of context parallelism, decoding, tiles of kernels.

`bench_command` is the command; `operator`, `exchanges`, `decoding` and `tune` measure, `expected` prints what a model
foretells instead; `agreement` keeps wrong results from having a speed.
"""

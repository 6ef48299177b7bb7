"""Benchmarks: the operator and full attention, the exchanges of context parallelism, decoding, tiles of kernels.

`bench_command` is the command; `operator`, `exchanges`, `decoding` and `tune` measure, and `expected` prints estimates
of a model instead. `agreement` refuses a speed for wrong results.
"""

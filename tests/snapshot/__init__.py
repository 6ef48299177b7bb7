"""A snapshot of every number that the project makes, to show that a change of names and places moves none of them.

    PYTHONPATH=tests:. python -m snapshot take OUT      # at the old commit, then at the new one
    PYTHONPATH=tests:. python -m snapshot compare A B

`take` writes a folder of text files for each section; nothing in them depends on the names of modules, functions,
kernels or arguments, on the place of the checkout, or on the time. `compare` prints what differs. Both snapshots must
be of one machine and one set of libraries: sums are rounded differently elsewhere.
"""

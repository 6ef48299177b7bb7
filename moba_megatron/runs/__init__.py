"""The files of a run, for code that writes them and code that reads them.

`folder` has the paths and the status, `claim` keeps a second process out; `files` writes files whole, line by line, or
under a lock; `metrics` writes the lines of training, `records` the results of evaluations, `trackers` sends both to
TensorBoard and Weights & Biases; `environment` says on what the run ran.
"""

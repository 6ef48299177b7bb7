"""Sweeps over training runs: the plan, the runs, and the resulting laws and pictures.

A sweep is one YAML file (`sweep`). Its runs are ordinary runs of `train.py` in ordinary run folders (`runner`), so all
that is known of them is read back from disk (`results`), fitted (`fit`) and shown (`plots`, `tables`).
"""

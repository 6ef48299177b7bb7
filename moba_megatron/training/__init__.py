"""Pretraining: `preflight` checks everything before a process group exists, `run` builds everything, `trainer` is the
step and the loop around it, `faults` ends it well; `resume` says from which checkpoint a run goes on.
"""

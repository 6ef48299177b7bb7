"""Losses of a model by position: the numbers, the power law that they follow, curves over the tokens of training."""

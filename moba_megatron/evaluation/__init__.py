"""How good a model is: loss by position, trailing loss, and baselines to hold them against."""

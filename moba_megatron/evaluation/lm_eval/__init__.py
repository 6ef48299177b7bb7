"""Tasks of the package lm-eval, on exported models that attend as they were trained."""

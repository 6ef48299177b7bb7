"""Hugging Face folders in and out: configurations, weights, and the gate that holds both against transformers."""

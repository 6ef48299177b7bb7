"""Hugging Face folders in and out: configurations, weights, and the check that compares both with transformers."""

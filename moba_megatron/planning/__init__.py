"""Estimates before a run: FLOPs, bytes and memory; and measurements of the operator."""

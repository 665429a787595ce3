"""Benchmarks: one command each; their figures are in docs/benchmarks.md."""

"""Benchmarks, each with a command of its own; docs/benchmarks.md has their figures."""

"""Scores of image sets, and semantic probes of latents."""

from .evaluate_job import evaluate as evaluate
from .probe_job import probe as probe
from .probe_job import probe_problem as probe_problem
from .probe_job import summary as summary

__all__ = ["evaluate", "probe", "probe_problem", "summary"]

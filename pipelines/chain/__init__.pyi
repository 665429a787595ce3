"""The whole chain as one resumable command: stages, their results, the report."""

from . import stages as stages
from .chain_job import print_plan as print_plan
from .chain_job import run_chain as run_chain
from .chain_job import run_stage as run_stage
from .chain_job import training_resources as training_resources
from .report import samples_grid as samples_grid
from .report import stage_pictures as stage_pictures

__all__ = [
    "print_plan",
    "run_chain",
    "run_stage",
    "samples_grid",
    "stage_pictures",
    "stages",
    "training_resources",
]

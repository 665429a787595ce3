"""Training under Ray Train: one loop, one file a trainer, checkpoints, feeds, logs."""

from . import metrics_log as metrics_log
from . import run_folder as run_folder
from . import tracking as tracking
from .autoencoder import autoencoder_loss as autoencoder_loss
from .autoencoder import train_autoencoder as train_autoencoder
from .batches import PREFETCH_BATCHES as PREFETCH_BATCHES
from .batches import Batch as Batch
from .generator import generator_loss as generator_loss
from .generator import train_generator as train_generator
from .job import Adversary as Adversary
from .job import Job as Job
from .launch import TrainResult as TrainResult
from .memory_plan import MEBI as MEBI
from .memory_plan import memory_plan_of as memory_plan_of
from .pixel_decoder import MAX_VALIDATION_IMAGES as MAX_VALIDATION_IMAGES
from .pixel_decoder import Objective as Objective
from .pixel_decoder import make_adversary as make_adversary
from .pixel_decoder import train_pixel_decoder as train_pixel_decoder

__all__ = [
    "MAX_VALIDATION_IMAGES",
    "MEBI",
    "PREFETCH_BATCHES",
    "Adversary",
    "Batch",
    "Job",
    "Objective",
    "TrainResult",
    "autoencoder_loss",
    "generator_loss",
    "make_adversary",
    "memory_plan_of",
    "metrics_log",
    "run_folder",
    "tracking",
    "train_autoencoder",
    "train_generator",
    "train_pixel_decoder",
]

"""Training under Ray Train: one loop, one file a trainer, checkpoints, feeds, logs."""

from . import checkpoint_files as checkpoint_files
from . import metrics_log as metrics_log
from . import requirements as requirements
from . import run_folder as run_folder
from . import tracking as tracking
from .autoencoder import train_autoencoder as train_autoencoder
from .generator import train_generator as train_generator
from .pixel_decoder import train_pixel_decoder as train_pixel_decoder

__all__ = [
    "checkpoint_files",
    "metrics_log",
    "requirements",
    "run_folder",
    "tracking",
    "train_autoencoder",
    "train_generator",
    "train_pixel_decoder",
]

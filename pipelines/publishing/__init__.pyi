"""Trained networks as a folder that others load, and others' networks as checkpoints."""

from .findings import PublishError as PublishError
from .import_job import import_generator as import_generator
from .import_job import import_rae as import_rae
from .publish_job import publish as publish
from .shipped import describe_shipped as describe_shipped
from .upload import push as push

__all__ = [
    "PublishError",
    "describe_shipped",
    "import_generator",
    "import_rae",
    "publish",
    "push",
]

"""Trained networks as a folder that others load: weights, their account, a model card, the Hub."""

from .findings import PublishError as PublishError
from .publish_job import publish as publish
from .upload import push as push

__all__ = ["PublishError", "publish", "push"]

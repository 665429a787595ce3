"""What can be known before a job starts: cluster, bucket, tracking server, memory."""

from .diagnosis import doctor as doctor
from .memory import memory_of as memory_of
from .memory import text as text

__all__ = ["doctor", "memory_of", "text"]

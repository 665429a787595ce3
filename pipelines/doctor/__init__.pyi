"""What can be known before a job starts: cluster, bucket, tracking server, memory."""

from .checkpoint_room import checkpoint_text as checkpoint_text
from .diagnosis import doctor as doctor
from .memory import memory_of as memory_of
from .memory import text as text
from .speed import speed_of as speed_of
from .speed import speed_text as speed_text
from .text_size import expected_text as expected_text

__all__ = [
    "checkpoint_text",
    "doctor",
    "expected_text",
    "memory_of",
    "speed_of",
    "speed_text",
    "text",
]

"""How far a job is, read from its folder alone. Imports no torch and starts no Ray."""

from . import account as account
from .display import print_status as print_status
from .folders import status_of as status_of

__all__ = ["account", "print_status", "status_of"]

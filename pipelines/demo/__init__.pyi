"""`fae demo`: the shipped networks at work in some minutes, and one page that shows it."""

from .demo_job import run_demo as run_demo
from .full import run_full_demo as run_full_demo
from .full import write_photographs as write_photographs

__all__ = ["run_demo", "run_full_demo", "write_photographs"]

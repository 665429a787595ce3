"""What Ray Train is given to call: it imports a trainer in its workers, not in the controller.

The controller unpickles the function, and with it would import torch, timm and the networks, which
takes seconds before the first worker starts.
"""

from __future__ import annotations

import importlib
from typing import Any


def run_worker(module: str, function: str, config: dict[str, Any]) -> None:
    """Call `function` of `module` with `config`."""
    getattr(importlib.import_module(module), function)(config)

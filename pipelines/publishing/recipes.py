"""The recipe of a run as strangers may read it: without passwords and without private places."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from ..config.facts import walk_keys
from ..storage import redact

LOCAL_SECTIONS = ("tracking", "storage", "run", "output")
WEIGHTS = "backbone.weights"


def published_recipe(text: str) -> str:
    """The recipe `text` with the last part of each local path and s3:// address alone.

    Where the backbone's weights are a file, `hub` takes its place: their SHA-256 is in the
    checkpoint, so other weights are refused. Secrets of this environment become ***.
    """
    values: Any = OmegaConf.create(redact(text))
    for key in walk_keys():
        if key.place is None or "*" in key.name:
            continue
        value = OmegaConf.select(values, key.name)
        if isinstance(value, str) and value not in key.place.words:
            shown = "hub" if key.name == WEIGHTS else last_part(value)
            OmegaConf.update(values, key.name, shown)
    for section in LOCAL_SECTIONS:
        values.pop(section, None)
    return OmegaConf.to_yaml(values)


def last_part(address: str) -> str:
    """The last part of a path or address; an address on the Hub stays whole."""
    return address if address.startswith("hf://") else address.rstrip("/").rpartition("/")[2]

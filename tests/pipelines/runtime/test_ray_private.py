"""Ray's private names stand in one file."""

import re

from tests.tiny import ROOT

PRIVATE = re.compile(r"\bray(\.\w+)*\._(?!_)\w+")


def test_private_names_of_ray_stand_in_one_file_alone():
    folders = ("fae_core", "pipelines", "tune", "cluster", "tests", "benchmarks", "examples")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    using = {str(p.relative_to(ROOT)) for p in files if PRIVATE.search(p.read_text())}
    assert using == {"pipelines/runtime/ray_private.py"}

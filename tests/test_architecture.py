"""The house as docs/architecture.md describes it: every module is listed, and rooms keep to their
doors."""

import ast
import functools
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("fae", "fae_core", "pipelines", "tune", "cluster")


def modules(*folders: str) -> list[str]:
    """Paths of the Python files below folders of the checkout; `fae`'s links are not followed."""
    found = []
    for folder in folders:
        for path in (ROOT / folder).rglob("*.py"):
            below = path.relative_to(ROOT)
            if not any((ROOT / parent).is_symlink() for parent in below.parents):
                found.append(below.as_posix())
    return sorted(found)


@functools.cache
def rooms() -> list[str]:
    """Names of the pipeline's rooms, each of which may import only those before it."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = settings["tool"]["importlinter"]["contracts"]
    (layers,) = [c["layers"] for c in contracts if c.get("containers") == ["fae.pipelines"]]
    return list(reversed(layers))


def listing() -> dict[str, list[tuple[str, str]]]:
    """Folder -> (module, sentence) of the section "Every module", in the page's order."""
    page = (ROOT / "docs/architecture.md").read_text()
    section = page.split("\n## Every module\n")[1].split("\n## ")[0]
    folders: dict[str, list[tuple[str, str]]] = {}
    for block in re.findall(r"^```\n(.*?)^```$", section, re.M | re.S):
        for line in filter(None, block.splitlines()):
            if folder := re.fullmatch(r"(\S+)/", line):
                entries = folders.setdefault(folder[1], [])
            else:
                name, sentence = line.split(maxsplit=1)
                entries.append((name, sentence))
    return folders


@functools.cache
def stub(room: str) -> ast.Module:
    return ast.parse((ROOT / f"pipelines/{room}/__init__.pyi").read_text())


@functools.cache
def exports(room: str) -> list[str]:
    """The public names of a room, as its stub states them."""
    for node in stub(room).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise AssertionError(f"pipelines/{room}/__init__.pyi has no __all__")


def is_module(room: str, name: str) -> bool:
    folder = ROOT / "pipelines" / room
    return (folder / f"{name}.py").is_file() or (folder / name / "__init__.py").is_file()


def imports(module: str) -> list[tuple[int, list[str]]]:
    """Line and absolute dotted name, in parts, of everything that a file imports."""
    path = Path(module)
    package = list(path.parent.parts)
    if package[0] in ("pipelines", "tune", "cluster"):
        package = ["fae", *package]
    found = []
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            found += [(node.lineno, [*base, alias.name]) for alias in node.names]
    return found


def test_every_module_is_described_and_nothing_else():
    described = [f"{folder}/{name}" for folder, entries in listing().items() for name, _ in entries]
    existing = [path for path in modules(*FOLDERS) if not path.endswith("__init__.py")]
    assert sorted(described) == existing
    assert len(set(described)) == len(described)


def test_descriptions_are_sentences():
    for folder, entries in listing().items():
        for name, sentence in entries:
            assert sentence[0].isupper() and sentence.endswith("."), f"{folder}/{name}: {sentence}"


def test_rooms_are_described_in_the_order_of_their_imports():
    described = [
        folder.split("/")[1] for folder in listing() if re.match("pipelines/[^/]+$", folder)
    ]
    assert described == rooms()


@pytest.mark.parametrize("room", rooms())
def test_a_room_has_few_public_names_and_imports_all_of_them(room):
    names = exports(room)
    imported = [
        alias.asname
        for node in stub(room).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    assert sorted(names) == sorted(imported)
    assert 3 <= len(names) <= 8


@pytest.mark.parametrize("room", rooms())
def test_no_module_has_the_name_of_an_exported_function(room):
    for node in stub(room).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            assert not [alias.name for alias in node.names if is_module(room, alias.name)]


@pytest.mark.parametrize("module", modules("pipelines", "tune", "cluster", "fae"))
def test_another_room_is_entered_by_its_public_names_alone(module):
    own_room = module.split("/")[1] if module.startswith("pipelines/") else None
    for line, (*start, name) in imports(module):
        where = f"{module}:{line} imports {'.'.join([*start, name])}"
        if start[:2] != ["fae", "pipelines"]:
            continue
        inner = [*start[2:], name]
        room = inner[0]
        if room == own_room or len(inner) == 1:
            continue
        assert inner[1] in exports(room), f"{where}, which {room} does not export"
        if len(inner) > 2:
            assert is_module(room, inner[1]), f"{where}, but {inner[1]} is not a module"

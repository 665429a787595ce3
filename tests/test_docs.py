"""The pages for users: every command in them is one that this version understands."""

import importlib
import importlib.util
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup
from typer.testing import CliRunner

from fae.cli import app
from fae.pipelines.config import Recipe, load_recipe
from fae_core.backbone_presets import preset_rows

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACEHOLDERS = {"R": "photos-dinov2s", "RECIPE": "photos-dinov2s", "COMMAND": "precompute"}


def commands(program: str) -> list:
    """Pytest parameters (words,) of the code blocks' commands of `program`, one for each."""
    found = []
    for page in PAGES:
        blocks = re.findall(r"^ *```\w*\n(.*?)^ *```$", page.read_text(), re.M | re.S)
        for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
            for part in re.split(r" && | & |  +# ", line.strip()):
                if part.startswith(f"{program} "):
                    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(part)[1:]]
                    shown = [word for word in words if "…" not in word and word[0] not in "[&"]
                    found.append(pytest.param(shown, id=f"{page.stem}: {' '.join(words)[:60]}"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_lines_have_100_columns(page):
    """But for tables, pictures, addresses and the keys of the generated reference."""
    free = ("|", "![", "- `")
    long = [
        line
        for line in page.read_text().splitlines()
        if len(line) > 100 and not line.startswith(free) and "://" not in line
    ]
    assert not long


@pytest.mark.parametrize("words", commands("fae"))
def test_a_command_of_the_pages_is_understood(words):
    words = list(words)
    if words[0] == "submit":
        assert parsed(["submit", *words[1:]]).params["words"]
        cut = next((at for at, word in enumerate(words) if word.startswith("--")), len(words))
        words = words[1:cut]
    context = parsed(words)
    values = [*(context.params.get("overrides") or [])]
    recipe = context.params.get("recipe")
    if recipe == "report":
        recipe = values.pop(0)
    if recipe:
        load_recipe(recipe, values)


def parsed(words):
    """The context of the command that `words` name, with its arguments; an unknown one raises."""
    command = typer.main.get_command(app)
    words = list(words)
    while isinstance(command, TyperGroup):
        name = words.pop(0)
        assert name in command.commands, f"no command {name!r}"
        command = command.commands[name]
    return command.make_context("fae", words)


@pytest.mark.parametrize("words", commands("python"))
def test_a_program_of_the_pages_is_there(words):
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1])
    else:
        assert (ROOT / words[0]).is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_command_in_the_text_exists(page):
    named = set(re.findall(r"`fae ([a-z][a-z-]*)", page.read_text()))
    assert named <= set(typer.main.get_command(app).commands)


def test_every_test_that_the_pages_name_exists():
    files: dict[str, str] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        files[path.name] = files.get(path.name, "") + path.read_text()
    page = (ROOT / "docs/reliability.md").read_text()
    named = re.findall(r"`(test_\w+\.py)(?:::(\w*)…?(?:\[(\w+)\])?)?`", page)
    assert len(named) > 20
    for file, test, case in named:
        assert f"def {test}" in files[file] and case in files[file], (file, test, case)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_between_pages_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        assert "://" in link or (page.parent / link).exists(), link


@pytest.mark.parametrize(
    "name", re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(), re.M)
)
def test_a_name_of_the_api_page_can_be_imported(name):
    module, _, attribute = name.rpartition(".")
    assert getattr(importlib.import_module(module), attribute).__doc__


def test_image_tags_repeat_the_version_of_the_package():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    files = [path for path in (ROOT / "cluster").rglob("*") if path.suffix in (".md", ".yaml")]
    text = "".join(path.read_text() for path in [*files, *PAGES])
    assert set(re.findall(r"fae-ray:([\d.]+\d)", text)) == {version}


def test_the_table_beside_others_says_what_the_page_of_the_field_says():
    readme = (ROOT / "README.md").read_text()
    head, _, *table = cells(readme.partition("## What it has, beside others")[2])
    projects = [re.sub(r"\[(.*)\]\(.*\)", r"\1", name) for name in head[1:]]
    sections = (ROOT / "docs/field.md").read_text().split("\n## ")[-len(table) :]
    assert 10 <= len(table) <= 14
    for (row, *values), section in zip(table, sections, strict=True):
        _, _, *listed = cells(section)
        assert section.partition("\n")[0].lower() == row.lower()
        assert [line[:2] for line in listed] == [
            list(pair) for pair in zip(projects, values, strict=True)
        ]
        paths = re.findall(r"`([\w./-]+)`", listed[0][2])
        for path in paths:
            assert "/" not in path or (ROOT / path).exists(), path


def cells(text: str) -> list[list[str]]:
    """The cells of each line of the first table in `text`."""
    table = re.search(r"(?:^\|.*\n)+", text, re.M)
    assert table
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in table[0].splitlines()]


def test_the_page_of_backbones_lists_the_presets():
    page = (ROOT / "docs/backbones.md").read_text()
    listed = [line.strip("| ").split(" | ") for line in re.findall(r"^\| `\w+` \|.*$", page, re.M)]
    presets = preset_rows(Recipe().autoencoder.latent_dim)
    assert listed == [[f"`{name}`", *values] for name, *values in presets]
    printed = CliRunner().invoke(app, ["recipes", "--backbones"]).output.splitlines()
    assert [line.split() for line in printed[1:]] == presets

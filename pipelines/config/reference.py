"""docs/reference.md, made of the recipe's fields and their docstrings.

python -m fae.pipelines.config.reference > docs/reference.md
"""

from __future__ import annotations

import sys
import textwrap

from .explain import default_text, describe_recipes, effect_text, type_text
from .facts import walk_keys
from .sections.keys import RecipeKey

WIDTH = 100
INTRODUCTION = """\
# Every recipe key

<!-- Made by `python -m fae.pipelines.config.reference > docs/reference.md`; a test compares. -->

A recipe is a YAML file of these keys. On the command line `KEY=VALUE` changes one:
`autoencoder.latent_dim=48`. `fae explain KEY` prints what stands here, and `--print-config` prints
the whole recipe of a command. A `*` stands for the members of a list or mapping. "Not in the paper"
means that arXiv 2512.07829 gives no value.

Another value of a key leads to another result, and so to another stage of a chain and a refusal of
outputs that exist, unless a sentence in italics says otherwise.
"""


def reference_page() -> str:
    """The page in Markdown, in lines of at most 100 columns."""
    parts = [INTRODUCTION, "## Shipped recipes\n"]
    parts += [_item(f"`{r.name}`", f"{r.about}. Needs: {r.needs}.") for r in describe_recipes()]
    sections: dict[str, list[RecipeKey]] = {}
    for key in walk_keys():
        sections.setdefault(key.name.rpartition(".")[0], []).append(key)
    for section, members in sections.items():
        if section:
            parts.append(f"\n## {section}\n")
            parts.append("\n".join(textwrap.wrap(_about(members[0]), WIDTH)) + "\n")
        else:
            parts.append("\n## At the top\n")
        parts += [_item(f"`{key.name}`", _text(key)) for key in members]
    return "\n".join(parts) + "\n"


def _about(key: RecipeKey) -> str:
    return " ".join((key.section.__doc__ or "").split())


def _text(key: RecipeKey) -> str:
    default = default_text(key)
    given = f"default `{default}`" if default else "has to be given"
    effect = "" if key.decides else f" *{effect_text(key)}*"
    return f"{type_text(key)}; {given}. {key.doc}{effect}"


def _item(name: str, text: str) -> str:
    return "\n".join(
        textwrap.wrap(f"- {name}: {text}", WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    )


if __name__ == "__main__":
    sys.stdout.write(reference_page())

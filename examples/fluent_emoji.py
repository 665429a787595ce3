"""Turn the npm package of Fluent emoji into captioned images, some combinations held out.

    pip install emoji==2.16.0
    python examples/fluent_emoji.py emoji [--package lobehub-fluent-emoji-3d-1.1.0.tgz] [--size 256]

Writes OUTPUT/train and OUTPUT/heldout: pictures on white, PNG or lossless WebP (`--format`), and a
metadata.jsonl with `file_name`, `text` and, for what is held out, `holdout`; the recipe
emoji-dinov2s reads them. The pictures are Microsoft's Fluent emoji in 3D as packed by LobeHub
(MIT), which `npm pack` downloads where no `--package` is given; the captions are the names in
PyPI's `emoji` (BSD).

Two kinds of combinations are held out whole, both chosen by the hash of their caption. `tone`: one
of the five skin tones of half of the people and hands (woman cook, dark skin tone). `activity`: one
gender of some activities in every tone (woman firefighter). Each gender, activity and tone of a
held-out picture is in the training set, their combination is not; a training picture that is equal
to a held-out one is held out too.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from PIL import Image

PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
VARIATION = "\ufe0f"
"""The code point that asks for an emoji's picture; names with and without it mean the same."""
TONE = re.compile(r"(?:medium-)?(?:light|dark) skin tone|medium skin tone")
PERSON = re.compile(r"(woman|man|person) (.+)")
HELD_OUT_ACTIVITIES = 10


def caption_names() -> dict[str, str]:
    """Emoji without variation selectors -> English name, from the package `emoji`.

    Raises ValueError where the package is missing.
    """
    try:
        from emoji import EMOJI_DATA
    except ImportError:
        raise ValueError("the captions need pip install emoji==2.16.0.") from None
    return {
        text.replace(VARIATION, ""): entry["en"].strip(":").replace("_", " ")
        for text, entry in EMOJI_DATA.items()
    }


def caption_of(name: str, captions: Mapping[str, str]) -> str | None:
    """The caption of a file's name, code points in hex joined by -; None for what has none."""
    try:
        text = "".join(chr(int(part, 16)) for part in name.split("-"))
    except (ValueError, OverflowError):
        return None
    return captions.get(text.replace(VARIATION, ""))


def held_out(captions: Iterable[str]) -> dict[str, str]:
    """The captions that no training sees -> `tone` or `activity`; see the module's docstring."""
    tones: dict[str, set[str]] = defaultdict(set)
    people: dict[str, set[str]] = defaultdict(set)
    known = set(captions)
    for caption in known:
        found = TONE.findall(caption)
        if len(found) == 1:
            tones[TONE.sub("#", caption)].add(caption)
            person = PERSON.fullmatch(_without_tone(caption))
            if person:
                people[person[2]].add(person[1])
    half = [base for base, family in tones.items() if len(family) == 5]
    half = sorted(half, key=_rank)[: len(half) // 2]
    chosen = {min(tones[base], key=_rank): "tone" for base in half}
    activities = [activity for activity, genders in people.items() if {"woman", "man"} <= genders]
    for activity in sorted(activities, key=_rank)[:HELD_OUT_ACTIVITIES]:
        base = f"{min(('woman', 'man'), key=lambda g: _rank(g + activity))} {activity}"
        family = [c for c in known if _without_tone(c) == base]
        chosen |= dict.fromkeys(family, "activity")
    return chosen


def convert(
    package: Path,
    output: Path,
    captions: Mapping[str, str],
    size: int,
    suffix: str = "png",
    limit: int | None = None,
) -> dict[str, int]:
    """Write the two folders from the package's .tgz; returns the number of images of each.

    `suffix` is png or webp. `limit` keeps so many training images, chosen by the hash of their
    caption. Pictures without a caption are left out and counted as `skipped`. Raises ValueError for
    another kind of file.
    """
    pictures = {}
    skipped = 0
    for name, content in _assets(package):
        caption = caption_of(name, captions)
        if caption is None:
            skipped += 1
        else:
            pictures[name] = (caption, content)
    if not pictures:
        raise ValueError(f"{package} holds no picture with a caption.")
    chosen = held_out(caption for caption, _ in pictures.values())
    kinds = {content: chosen[c] for c, content in pictures.values() if c in chosen}
    rows: dict[str, list[dict[str, str]]] = {"train": [], "heldout": []}
    held = {
        name: kind
        for name, (caption, content) in pictures.items()
        if (kind := chosen.get(caption) or kinds.get(content))
    }
    kept = sorted(pictures.keys() - held.keys(), key=lambda name: _rank(pictures[name][0]))[:limit]
    for name in sorted({*held, *kept}):
        caption, content = pictures[name]
        kind = held.get(name)
        split = "heldout" if kind else "train"
        path = output / split / f"{name}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        _on_white(content, size).save(path, lossless=True)
        row = {"file_name": path.name, "text": caption}
        rows[split].append({**row, "holdout": kind} if kind else row)
    for split, entries in rows.items():
        if entries:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in entries)
            (output / split / "metadata.jsonl").write_text(lines, encoding="utf-8")
    return {**{split: len(entries) for split, entries in rows.items()}, "skipped": skipped}


def _without_tone(caption: str) -> str:
    return " ".join(TONE.sub(" ", caption).split())


def _rank(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _assets(package: Path) -> Iterator[tuple[str, bytes]]:
    """Names without suffix and contents of the package's WebP files, sorted by name."""
    try:
        with tarfile.open(package) as archive:
            members = [m for m in archive if m.isfile() and m.name.endswith(".webp")]
            for member in sorted(members, key=lambda m: m.name):
                file = archive.extractfile(member)
                assert file is not None
                yield Path(member.name).stem, file.read()
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{package} is not a complete npm package: {error}.") from None


def _on_white(content: bytes, size: int) -> Image.Image:
    image = Image.open(io.BytesIO(content)).convert("RGBA")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _download(folder: str) -> Path:
    try:
        command = ["npm", "pack", "--silent", PACKAGE]
        done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise ValueError(f"npm is not installed; give --package, the file of {PACKAGE}.") from None
    except subprocess.CalledProcessError as error:
        raise ValueError(f"npm pack {PACKAGE} failed: {error.stderr.strip()}") from None
    return Path(folder) / done.stdout.split()[-1]


def main() -> None:
    """Run the command that the module's docstring describes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="folder for train/ and heldout/")
    parser.add_argument("--package", type=Path, help="the npm package's .tgz")
    parser.add_argument("--size", type=int, default=256, help="side of the pictures [px]")
    parser.add_argument("--format", choices=("png", "webp"), default="png", help="of the files")
    parser.add_argument("--train", type=int, help="largest number of training images")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            package = arguments.package or _download(folder)
            counts = convert(
                package,
                arguments.output,
                caption_names(),
                arguments.size,
                arguments.format,
                arguments.train,
            )
    except (OSError, ValueError) as error:
        sys.exit(f"fluent_emoji: {error}")
    for split in ("train", "heldout"):
        print(f"{arguments.output}/{split}: {counts[split]} images")
    print(f"{counts['skipped']} pictures have no caption and are left out")


if __name__ == "__main__":
    main()

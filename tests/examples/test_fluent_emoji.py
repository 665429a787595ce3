"""The script that makes captioned emoji, run on a small package of the same format."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.fluent_emoji import caption_names, caption_of, held_out
from fae.pipelines.config.recipe import load_recipe
from fae.pipelines.data.sources import list_images
from tests.tiny import ROOT

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
PEOPLE = ("woman", "man", "person")


def webp(color: tuple[int, int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", (16, 16), color).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The five tones of two hands and one object that has no tone, and a name of no emoji."""
    names = [f"{hand}-1f3f{tone}" for hand in ("1f44d", "1f44e") for tone in "bcdef"]
    contents = {name: webp((10 * i, 0, 0, 255)) for i, name in enumerate(names)}
    contents |= {"1f36f": webp((0, 0, 0, 0)), "1f3f4-e0067_e0062": webp((0, 0, 0, 0))}
    path = tmp_path / "package.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"package/assets/{name}.webp")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def run(output: Path, package: Path, *options: str) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, str(ROOT / "examples/fluent_emoji.py"), str(output)]
    command = [*script, "--package", str(package), "--size", "8", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_script_writes_captioned_pictures_on_white(package: Path, tmp_path: Path) -> None:
    done = run(tmp_path / "emoji", package)
    assert done.returncode == 0, done.stderr
    assert "train: 10 images" in done.stdout and "heldout: 1 images" in done.stdout
    assert "1 pictures have no caption" in done.stdout
    captions: dict[str, str | None] = {}
    for split in ("train", "heldout"):
        path = tmp_path / "emoji" / split
        records = list_images(load_recipe("photos-dinov2s", [f"data.path={path}"]).data)
        captions |= {record.key: record.caption for record in records}
    assert len(captions) == 11
    assert captions["1f44d-1f3fb.png"] == "thumbs up light skin tone"
    honey = Image.open(tmp_path / "emoji/train/1f36f.png")
    assert honey.mode == "RGB" and np.array_equal(honey, np.full((8, 8, 3), 255))


def test_a_second_run_writes_the_same_bytes(package: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert run(tmp_path / name, package).returncode == 0
    files = [sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob("*.*")) for n in "ab"]
    assert files[0] == files[1] and len(files[0]) == 13
    for file in files[0]:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_few_training_images_in_webp_beside_all_that_are_held_out(
    package: Path, tmp_path: Path
) -> None:
    assert run(tmp_path / "all", package).returncode == 0
    assert run(tmp_path / "few", package, "--format", "webp", "--train", "3").returncode == 0
    assert len(list((tmp_path / "few/train").glob("*.webp"))) == 3
    for file in (tmp_path / "few").rglob("*.webp"):
        same = tmp_path / "all" / file.parent.name / f"{file.stem}.png"
        assert np.array_equal(Image.open(file), Image.open(same))
    assert len(list((tmp_path / "few/heldout").glob("*.webp"))) == 1


def test_a_held_out_combination_is_unseen_and_its_parts_are_seen() -> None:
    activities = [f"activity{i}" for i in range(30)]
    captions = [f"{p} {a} {t} skin tone" for p in PEOPLE for a in activities for t in TONES]
    captions += [f"{p} {a}" for p in PEOPLE for a in activities]
    chosen = held_out(captions)
    assert held_out(reversed(captions)) == chosen
    seen = set(captions) - chosen.keys()
    assert list(chosen.values()).count("activity") == 10 * 6
    assert 30 < list(chosen.values()).count("tone") <= 45
    for caption, kind in chosen.items():
        person, activity, *tone = caption.split(" ", 2)
        assert not tone or any(c.endswith(tone[0]) for c in seen)
        assert any(c.startswith(f"{person} ") for c in seen)
        assert any(f" {activity}" in c for c in seen)
        same = [c for c in seen if c.startswith(f"{person} {activity} ")]
        assert len(same) == (0 if kind == "activity" else 4)


def test_names_are_code_points_with_or_without_the_variation_selector() -> None:
    captions = caption_names()
    heart = "2764-fe0f", "2764"
    assert [caption_of(name, captions) for name in heart] == ["red heart"] * 2
    pilot = caption_of("1f469-1f3ff-200d-2708-fe0f", captions)
    assert pilot == "woman pilot dark skin tone"
    assert caption_of("1f3f4-e0067_e0062_e0065", captions) is None
    assert caption_of("nothing", captions) is None


def test_another_kind_of_file_is_refused_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "x.tgz").write_bytes(b"no archive")
    done = run(tmp_path / "emoji", tmp_path / "x.tgz")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "is not a complete npm package" in done.stderr

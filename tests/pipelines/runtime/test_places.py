"""What tells that a place is not the same on another host, and how it is said."""

from pathlib import Path

import pytest

from fae.pipelines.runtime.places import (
    SAMPLE_BYTES,
    SAMPLES,
    PlaceError,
    Unseen,
    _difference,
    _traces,
    refuse,
)


def test_a_large_file_of_equal_size_and_other_weights_is_another_file(tmp_path: Path) -> None:
    size = 4 * SAMPLES * SAMPLE_BYTES
    here = tmp_path / "weights.pth"
    here.write_bytes(bytes(size))
    seen = _traces(str(here))
    assert _difference(seen) == ""
    here.write_bytes(b"\1" * size)
    assert _difference(seen) == "is another file"
    here.unlink()
    assert _difference(seen) == "is not there"


def test_a_folder_is_told_by_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "0.jpg").write_bytes(b"one")
    seen = _traces(str(tmp_path))
    assert len(seen) == 3 and _difference(seen) == ""
    (tmp_path / "0.jpg").write_bytes(b"two")
    assert _difference(seen) == "holds other files"
    assert _traces(str(tmp_path / "nothing")) == {}


def test_places_and_nodes_stand_in_one_line() -> None:
    refuse([])
    found = [Unseen(key, f"/{key}", node, "is not there") for key in "ab" for node in ("n1", "n2")]
    with pytest.raises(PlaceError) as refused:
        refuse(found)
    text = str(refused.value)
    assert text.startswith("a=/a is not there on nodes n1, n2; b=/b is not there on nodes n1, n2. ")
    assert "s3://" in text and "\n" not in text

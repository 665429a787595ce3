"""The progress line: what it says, and how it counts."""

import sys

import pytest

from fae.pipelines.runtime.progress import Progress, duration


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0 s"), (119, "119 s"), (720, "12 min"), (11_520, "3.2 h"), (354_240, "4.1 d")],
)
def test_the_time_left_is_in_a_unit_for_a_glance(seconds, shown):
    assert duration(seconds) == shown


def test_the_line_says_done_of_total_rate_time_left_and_errors(capsys):
    progress = Progress(num_shards=4, num_images=32, enabled=True)
    progress.started -= 100  # two shards of 7 stored and 1 failed image each in 100 s
    for _ in range(2):
        progress.add(rows=7, errors=1, encoded_at=0.0)
    rates = progress.close()
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.split(" | ")[:2] == ["shards 2/4", "14 images"]
    assert "0.1 images/s" in line and "100 s left" in line and "2 errors" in line
    assert rates["images_per_second"] == pytest.approx(0.14, rel=0.01)


def test_a_bar_ends_with_work_that_fails(monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # rich then takes standard error for a terminal
    output = sys.stdout
    with (
        pytest.raises(OSError, match="away"),
        Progress(num_shards=4, num_images=32, enabled=True) as progress,
    ):
        assert not progress.bar.disable and progress.bar.live.is_started
        raise OSError("the store is away")
    assert not progress.bar.live.is_started and Progress.running is None
    assert sys.stdout is output


def test_the_steady_rate_leaves_out_start_up_and_the_end():
    progress = Progress(num_shards=12, num_images=120, enabled=False)
    for index in range(12):
        late = 50.0 if index == 0 else 100.0 + index * 2.0
        progress.add(10, 0, late)
    assert progress.close()["steady_images_per_second"] == pytest.approx(5.0)
    few = Progress(num_shards=2, num_images=20, enabled=False)
    few.add(10, 0, 1.0)
    assert "steady_images_per_second" not in few.close()

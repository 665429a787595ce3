"""A place refuses other work and says what differs."""

import pytest

from fae.pipelines.storage import StoreMismatch, differences, refuse_other_work


def test_each_difference_names_both_values_in_the_order_of_the_names():
    there = {"steps": 3, "name": "a", "gone": 1.5, "same": [1], "null": None}
    now = {"steps": 4, "name": "b", "new": True, "same": [1]}
    assert differences(there, now) == [
        "gone: 1.5 there, nothing now",
        "name: 'a' there, 'b' now",
        "new: nothing there, True now",
        "steps: 3 there, 4 now",
    ]
    assert differences({"name": "a"}, {"name": "b"}, show=str) == ["name: a there, b now"]


def test_the_same_work_is_let_in_and_other_work_is_refused():
    refuse_other_work("out holds other samples", [], "Choose another output=….")
    with pytest.raises(StoreMismatch) as refusal:
        refuse_other_work("out holds other samples", ["seed: 0 there, 1 now"], "Choose another.")
    assert str(refusal.value) == (
        "out holds other samples:\n  seed: 0 there, 1 now\nChoose another."
    )

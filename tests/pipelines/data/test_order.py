"""Epoch order: a permutation per epoch, one stream for any number of workers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fae.pipelines.data.order import EpochOrder


@given(items=st.integers(1, 200), seed=st.integers(0, 2**32), epochs=st.integers(1, 3))
def test_every_epoch_holds_every_item_exactly_once(items, seed, epochs):
    order = EpochOrder(items, seed)
    stream = order.index(np.arange(items * epochs))
    for epoch in range(epochs):
        assert sorted(stream[epoch * items : (epoch + 1) * items]) == list(range(items))


@given(items=st.integers(1, 100), cut=st.integers(0, 12), step=st.integers(0, 50))
def test_parts_of_a_batch_are_together_the_batch(items, cut, step):
    whole, epochs = EpochOrder(items, 5).batch(step, 12)
    slices = (range(cut), range(cut, 12))
    parts = [EpochOrder(items, 5).batch(step, 12, places) for places in slices]
    assert np.array_equal(np.concatenate([p[0] for p in parts]), whole)
    assert np.array_equal(np.concatenate([p[1] for p in parts]), epochs)


def test_epochs_and_seeds_differ_and_any_position_is_reached_directly():
    order = EpochOrder(1000, 1)
    assert not np.array_equal(order.permutation(0), order.permutation(1))
    assert not np.array_equal(order.permutation(0), EpochOrder(1000, 2).permutation(0))
    late = EpochOrder(1000, 1).index(np.array([5_003_217]))
    assert late == order.permutation(5003)[217]


def test_an_order_is_numpys_own_permutation_in_half_its_memory():
    order = EpochOrder(100_003, 7).permutation(2)
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([7, 2])))
    expected = generator.permutation(100_003)
    assert np.array_equal(order, expected) and 2 * order.nbytes == expected.nbytes


def test_an_order_of_nothing_is_refused():
    with pytest.raises(ValueError, match="empty"):
        EpochOrder(0, 1)

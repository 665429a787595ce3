"""Channel statistics are exact against numpy float64 and the same bits in every order."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fae_core.latent_stats import ChannelStats


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    offset=st.sampled_from([0.0, 1.0, -300.0, 1e4, -1e4]),
    cuts=st.lists(st.integers(0, 400), max_size=6),
)
def test_merging_is_exact_and_order_independent(seed, offset, cuts):
    rng = np.random.default_rng(seed)
    values = (rng.normal(size=(400, 3)) + offset).astype(np.float32)
    parts = []
    for part in np.split(values, sorted(cuts)):
        stats = ChannelStats.empty(3)
        stats.update(part)
        parts.append(stats)
    totals = []
    for order in (range(len(parts)), rng.permutation(len(parts))):
        total = ChannelStats.empty(3)
        for i in order:
            total.merge(parts[i])
        totals.append(total.to_dict())
    assert totals[0] == totals[1]
    total = ChannelStats.from_dict(json.loads(json.dumps(totals[0])))
    reference = values.astype(np.float64)
    assert total.count == 400
    np.testing.assert_allclose(total.mean, reference.mean(0), rtol=1e-12, atol=2**-25)
    np.testing.assert_allclose(total.variance, reference.var(0), rtol=1e-6)


def test_float16_is_counted_without_any_rounding():
    values = np.array([[6.1e-5], [65504.0], [-65504.0], [2**-24]], dtype=np.float16)
    stats = ChannelStats.empty(1)
    stats.update(values)
    exact = [int(float(v) * 2**24) for v in values[:, 0]]
    assert stats.to_dict()["sums"] == [str(sum(exact))]
    assert stats.to_dict()["squares"] == [str(sum(v * v for v in exact))]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e6])
def test_values_that_cannot_be_counted_are_refused(bad):
    with pytest.raises(ValueError, match="finite"):
        ChannelStats.empty(1).update(np.array([[bad]], dtype=np.float32))

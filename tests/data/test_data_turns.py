"""Sample numbers dealt out to sources: shares kept at every moment, by a rule that needs no history."""

import numpy as np
import pytest

from ssmtrain.data.turns import LIMIT, MIXED, Turns, whole_shares

WEIGHTS = [
    [1.0],
    [0.7, 0.3],
    [1, 1],
    [0.5, 0.3, 0.2],
    [0.001, 0.999],
    [3, 1, 4, 1, 5, 9, 2, 6],
    [0.9, *[0.01] * 10],
    [0.0, 0.25, 0.75, 0.0],
    [1 / 3, 1 / 7, 2**-0.5],
]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_prefix_is_within_one_of_the_shares(weights: list[float]) -> None:
    turns = Turns(weights, key=5)
    which, before = turns.at(np.arange(2 * len(turns.table) + 100))
    share = np.array(whole_shares(weights)) / sum(whole_shares(weights))
    had = np.cumsum(which[:, None] == np.arange(len(weights)), axis=0)  # (n, sources)
    even = np.arange(1, len(which) + 1)[:, None] * share
    assert np.abs(had - even).max() < 1 - 1e-9
    # Each source counts on without a hole, and `had` is what the turns add up to.
    for source in range(len(weights)):
        assert np.array_equal(before[which == source], np.arange(had[-1, source]))
    for n in (0, 1, 17, len(turns.table), len(which)):
        assert turns.had(n).tolist() == (had[n - 1].tolist() if n else [0] * len(weights))


def test_far_numbers_need_no_replay() -> None:
    turns, far = Turns([0.6, 0.4], key=0), 10**15
    which, before = turns.at(np.array([far]))
    assert before[0] == turns.had(far)[which[0]]
    assert turns.had(far).sum() == far and abs(turns.had(far)[0] - 0.6 * far) < 1


def test_the_order_is_mixed_and_keyed() -> None:
    one, other, same = (Turns([1, 1], key).table for key in (1, 2, 1))
    assert len(one) >= MIXED and np.array_equal(one, same)
    assert not np.array_equal(one, other)
    assert 0.4 < (one[::2] == 0).mean() < 0.6, "who is first in each pair is left to chance"


def test_golden_turns() -> None:
    """Pinned: a change of these reorders every mixture."""
    assert Turns([0.5, 0.3, 0.2], key=7).table[:20].tolist() == [
        *[0, 1, 0, 2, 0, 1, 0, 1, 0, 2],
        *[0, 1, 0, 2, 0, 1, 0, 1, 2, 0],
    ]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([0.7, 0.3], [7, 3]),
        ([0.35, 0.15, 0.5], [7, 3, 10]),
        ([2, 0, 4.0], [1, 0, 2]),
        ([1e-9, 1.0], [1, LIMIT - 1]),
    ],
)
def test_whole_shares(weights: list[float], expected: list[int]) -> None:
    assert whole_shares(weights) == expected


def test_rounded_shares_add_up() -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        weights = draw.random(draw.integers(1, 30)).tolist()
        shares = whole_shares(weights)
        assert sum(shares) <= LIMIT and min(shares) > 0
        assert np.abs(np.array(shares) / sum(shares) - np.array(weights) / sum(weights)).max() < 2 / LIMIT
    with pytest.raises(ValueError, match="above 0"):
        whole_shares([0.0, 0])

"""The keyed permutation of rows."""

import numpy as np
import pytest

from ssmtrain.data.order import BLOCK, KEPT, Order, permute, walk

SIZES = [1, 2, 3, 4, 5, 7, 11, 13, 97, 101, 1009, 6949]
SIZES += [2**k + d for k in (3, 4, 5, 8, 10, 13) for d in (-1, 0, 1)]


@pytest.mark.parametrize("n", SIZES)
def test_every_row_once_an_epoch(n: int) -> None:
    for seed, epoch in [(0, 0), (0, 1), (7, 0), (2**63 - 1, 1000)]:
        out = permute(np.arange(n), n, seed, epoch)
        assert np.array_equal(np.sort(out), np.arange(n))


def test_golden_values() -> None:
    """Pinned: a change of these reorders everyone's training."""
    assert permute(np.arange(8), 8, 0, 0).tolist() == [4, 3, 2, 1, 0, 6, 7, 5]
    assert permute(np.arange(6), 1000, 1234, 5).tolist() == [476, 231, 704, 769, 972, 643]
    large = permute(np.array([0, 1, 2**40]), 2**40 + 1, 3, 0)
    assert large.tolist() == [1087085511274, 664627613865, 134699734191]


def test_pure_and_vectorised() -> None:
    n = 1009
    whole = permute(np.arange(n), n, 5, 2)
    assert [int(permute(i, n, 5, 2)) for i in range(0, n, 97)] == whole[::97].tolist()
    assert np.array_equal(permute(np.arange(n).reshape(1, n), n, 5, 2), whole.reshape(1, n))


def test_seeds_and_epochs_differ_and_mix() -> None:
    n = 4096
    orders = [permute(np.arange(n), n, s, e) for s, e in [(0, 0), (0, 1), (1, 0), (10, 0), (1, 1)]]
    for i, a in enumerate(orders):
        # A random permutation has one fixed point, one neighbour kept and a correlation of about 1/64.
        assert (a == np.arange(n)).sum() < 8
        assert (np.diff(a) == 1).sum() < 8
        assert abs(np.corrcoef(a, np.arange(n))[0, 1]) < 0.08
        for b in orders[:i]:
            assert (a == b).sum() < 8


def test_small_orders_are_spread() -> None:
    """All 6 orders of 3 rows occur, none far too often."""
    seen = [tuple(permute(np.arange(3), 3, 0, e).tolist()) for e in range(600)]
    counts = [seen.count(order) for order in set(seen)]
    assert len(counts) == 6 and max(counts) < 150 and min(counts) > 60


@pytest.mark.parametrize(("position", "n"), [(5, 5), (-1, 5), (0, 0)])
def test_outside(position: int, n: int) -> None:
    with pytest.raises(ValueError, match="range"):
        permute(position, n, 0, 0)


@pytest.mark.parametrize(("n", "slots"), [(1, 1), (7, 7), (23, 5), (24, 5), (64, 4), (1009, 32)])
def test_slots_walk_stretches_that_do_not_overlap(n: int, slots: int) -> None:
    """Each row once an epoch but for fewer than there are slots; rows of a slot follow each other."""
    length, left_out = n // slots, []
    for epoch in range(4):
        numbers = np.arange(epoch * length * slots, (epoch + 1) * length * slots)
        rows, first = walk(numbers, n, slots, 7)
        by_slot = rows.reshape(length, slots)
        assert len(set(rows.tolist())) == len(rows) and rows.min() >= 0 and rows.max() < n
        assert ((by_slot[1:] - by_slot[:-1]) % n == (1 % n)).all()
        assert first.reshape(length, slots).sum(1).tolist() == [slots] + [0] * (length - 1)
        left_out.append(frozenset(range(n)) - set(rows.tolist()))
        assert len(left_out[-1]) == n % slots
        # Any part of a step, in any order, as a rank or a micro-batch asks for it.
        some = numbers[::-3]
        assert np.array_equal(walk(some, n, slots, 7)[0], rows[::-3])
    assert n % slots == 0 or len(set(left_out)) > 1, "not the same text is left out again and again"


def test_stretches_are_dealt_anew_each_epoch() -> None:
    """Pinned too: 27 rows, four slots of six, by seed and epoch."""
    at = [(0, 0), (0, 1), (1, 0)]
    rows = [walk(np.arange(4) + 24 * epoch, 27, 4, seed)[0].tolist() for seed, epoch in at]
    assert rows == [[12, 6, 18, 0], [25, 4, 16, 10], [11, 17, 2, 23]]
    with pytest.raises(ValueError, match="too few"):
        walk(np.arange(1), 3, 4, 0)


@pytest.mark.parametrize("n", [1, 5, BLOCK, 2 * BLOCK + 77])
def test_an_order_is_the_permutation_of_each_epoch(n: int) -> None:
    """In any company, and asked for again after others."""
    order, draws = Order(n, 7), np.random.default_rng(n)
    for count in (1, 16, 16, 300):
        numbers = draws.integers(0, 6 * n, count)
        expected = [int(permute(number % n, n, 7, number // n)) for number in numbers.tolist()]
        assert order(numbers).tolist() == expected
        assert len(order._known) <= KEPT
    assert Order(n, None)(np.array([0, n - 1, n, 2 * n - 1])).tolist() == [0, n - 1, 0, n - 1]

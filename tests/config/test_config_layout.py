"""Layout formulas: the published layouts, what compress makes of them, and what is refused."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmtrain.config.layout import LayoutError, check_name, compress, expand, ratio, spread, strip


def places(names: list[str], name: str) -> list[int]:
    return [i for i, one in enumerate(names) if one == name]


ZAMBA2 = [6, 12, 18, 24, 30, 36, 42, 47, 51]
NEMOTRON_H_8B = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
NEMOTRON_H_47B = (
    "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-"
)
NANO_9B = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"

# formula, n_layers, depth, the block that is not the common one, where it stands
GOLDEN = [
    ("M", 24, 24, "A", []),
    ("M5AM4", 40, 40, "A", [5, 15, 25, 35]),
    ("M5 A M4", 40, 40, "A", [5, 15, 25, 35]),
    ("M4AM3", 120, 120, "A", list(range(4, 120, 8))),
    ("M2AM", 40, 40, "A", list(range(2, 40, 4))),
    ("M10A M2A M3A M9A M4", None, 32, "A", [10, 13, 17, 27]),
    ("MEMEAEME", 32, 32, "A", [4, 12, 20, 28]),
    ("MW", 12, 12, "W", [1, 3, 5, 7, 9, 11]),
    ("M (M5H)7 M4H M3H M2", None, 54, "H", ZAMBA2),
    ("ME", 30, 30, "E", list(range(1, 30, 2))),
    ("H", 36, 36, "H", list(range(36))),
    ("Sw2Ga", 6, 6, "Ga", [2, 5]),
    ("((M2A)2H)2", None, 14, "H", [6, 13]),
    ("ratio(40, 4)", None, 40, "A", [5, 15, 25, 35]),
    ("ratio(32,3)", None, 32, "A", [5, 16, 26]),
    ("ratio(10, 8)", None, 10, "A", list(range(1, 9))),
    ("ratio(24, 3, Sw, G)", 48, 48, "G", [4, 12, 20, 28, 36, 44]),
]


@pytest.mark.parametrize(("formula", "n_layers", "depth", "name", "where"), GOLDEN)
def test_published_layouts(
    formula: str, n_layers: int | None, depth: int, name: str, where: list[int]
) -> None:
    names = expand(formula, n_layers)
    assert len(names) == depth
    assert places(names, name) == where


@pytest.mark.parametrize(
    ("symbols", "counts"),
    [(NEMOTRON_H_8B, (24, 4, 24)), (NEMOTRON_H_47B, (45, 5, 48)), (NANO_9B, (27, 4, 25))],
)
def test_long_patterns_are_compressed(symbols: str, counts: tuple[int, int, int]) -> None:
    names = list(symbols.replace("*", "A").replace("-", "F"))
    formula = compress(names)
    assert expand(formula) == names
    assert tuple(names.count(name) for name in "MAF") == counts
    assert len(formula) <= len(symbols) / 2


def test_compress_writes_what_a_person_would() -> None:
    for formula in ("M9", "M5AM4", "M(M5H)7M4HM3HM2", "M10AM2AM3AM9AM4", "MEMEAEME", "(MW)6", "SwM2"):
        assert compress(expand(formula)) == formula
    assert compress(expand("M5AM4", 40)) == "(M5AM4)4"


names = st.lists(st.sampled_from(["M", "A", "Sw", "E"]), min_size=1, max_size=40)


@settings(max_examples=150, deadline=None)
@given(st.one_of(names, st.builds(lambda unit, n, rest: unit * n + rest, names, st.integers(2, 6), names)))
def test_expand_undoes_compress(layers: list[str]) -> None:
    formula = compress(layers)
    assert expand(formula) == layers
    assert len(formula) <= len("".join(layers))


def test_compress_of_a_very_deep_model_is_quick() -> None:
    deep = expand("M5AM4", 4000)
    assert expand(compress(deep)) == deep
    crooked = [*expand("M5AM4", 1000), "A", *expand("M7E")]
    assert expand(compress(crooked)) == crooked


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 100), st.integers(0, 60))
def test_ratio_spaces_evenly_and_never_first_or_last(n_layers: int, k: int) -> None:
    if k > max(0, n_layers - 2):
        with pytest.raises(LayoutError, match="at most"):
            ratio(n_layers, k)
        return
    layers = spread(n_layers, k)
    where = places(layers, "A")
    assert (len(layers), len(where)) == (n_layers, k)
    assert not where or (where[0] > 0 and where[-1] < n_layers - 1)
    gaps = [b - a for a, b in pairwise(where)]
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert expand(ratio(n_layers, k)) == layers == expand(f"ratio({n_layers}, {k})")


def test_ratio_is_even_wherever_it_is_possible() -> None:
    for n_layers in range(1, 31):
        for k in range(max(0, n_layers - 2) + 1):
            where = places(spread(n_layers, k), "A")
            assert len(where) == k
            assert not where or (where[0] > 0 and where[-1] < n_layers - 1), (n_layers, k)


def test_ratio_is_granites() -> None:
    assert expand(ratio(40, 4)) == expand("M5AM4", 40)
    assert ratio(10, 1, "G", "S") == "G5SG4"


def test_a_depth_that_does_not_divide_names_the_nearest() -> None:
    with pytest.raises(LayoutError, match=re.escape("nearest depths that work: 20 or 30")):
        expand("M5AM4", 25)
    with pytest.raises(LayoutError, match=re.escape("nearest depths that work: 10")):
        expand("M5AM4", 3)


@pytest.mark.parametrize(
    "formula",
    ["", "  ", "m", "5M", "M0", "M05", "M5A)", "(M", "()", "()3", "M-A", "M*", "Mab", "No", "On2", "M5x",
     "M²", "M٣", "(M)(3)", "3", "M2 3 )", "ratio(4)", "ratio(4,2,M)", "ratio(0,0)", "ratio(-1, 2)",
     "M99999999999999999999", "((((M99)99)99)99)", "ratio(999999999,1)"],
)  # fmt: skip
def test_bad_formulas_are_refused(formula: str) -> None:
    with pytest.raises(LayoutError):
        expand(formula)


def test_a_depth_beyond_any_model_is_refused_at_once() -> None:
    with pytest.raises(LayoutError, match="at most 4096"):
        expand("M", 1_000_000_000)


def test_names() -> None:
    assert check_name("M") is None and check_name("Sw") is None
    for name in ("No", "On", "m", "Mamba", "M1", "", "É"):
        assert check_name(name)


def test_strip_is_one_line() -> None:
    assert strip(expand("M5AM4", 20)) == "MMMMMAMMMM MMMMMAMMMM"
    assert strip(["Sw", "M"] * 2) == "SwMSwM"

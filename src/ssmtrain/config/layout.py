"""The layout formula: which block stands at each depth (pure functions, no torch)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from operator import add

MAX_LAYERS = 4096
"""More layers than any model has; a longer formula is a slip of the keyboard."""

_DEEP = 200
"""Layers up to which `compress` finds the shortest formula."""

REFUSED = {"No": "YAML reads it as false", "On": "YAML reads it as true"}
NAME = re.compile(r"[A-Z][a-z]?")
RATIO = re.compile(
    r"ratio\(\s*([0-9]{1,9})\s*,\s*([0-9]{1,9})\s*(?:,\s*([A-Z][a-z]?)\s*,\s*([A-Z][a-z]?)\s*)?\)"
)
_TOKEN = re.compile(r"([A-Z][a-z]?)|(\()|(\))|([0-9]+)")


class LayoutError(ValueError):
    """A formula that cannot be read or does not fit the depth; the message says what would."""


def check_name(name: str) -> str | None:
    """Say what is wrong with a block's name, or None."""
    if not NAME.fullmatch(name):
        return "a block's name is one capital letter, optionally followed by one small letter (M, A, Sw)"
    if name in REFUSED:
        return f"{name} is refused as a block's name, because {REFUSED[name]}"
    return None


def expand(formula: str, n_layers: int | None = None) -> list[str]:
    """Read a formula such as `M5AM4`, `(M5H)7` or `ratio(40, 4)` into one block name per layer.

    With n_layers the unit is tiled to that depth. Raises LayoutError: bad syntax, or a depth that the unit's
    length does not divide (the message names the nearest depths that work).
    """
    match = RATIO.fullmatch(formula.strip())
    if match:
        depth, count = int(match[1]), int(match[2])
        unit = spread(depth, count, match[3] or "M", match[4] or "A")
    else:
        unit = _read(formula)
    if n_layers is None:
        return unit
    _limit(n_layers)
    if n_layers % len(unit):
        below = n_layers - n_layers % len(unit)
        near = " or ".join(str(n) for n in (below, below + len(unit)) if n)
        raise LayoutError(
            f"{formula!r} is {len(unit)} layers, which does not divide n_layers = {n_layers}; "
            f"the nearest depths that work: {near}"
        )
    return unit * (n_layers // len(unit))


def _limit(n_layers: int) -> None:
    if n_layers > MAX_LAYERS:
        raise LayoutError(f"{n_layers} layers; at most {MAX_LAYERS} are allowed")


def _read(formula: str) -> list[str]:
    stack: list[list[str]] = [[]]
    unit: list[str] | None = None  # what a count would repeat
    at = 0
    text = formula.replace(" ", "").replace("\t", "")
    while at < len(text):
        token = _TOKEN.match(text, at)
        if token is None:
            raise LayoutError(f"{formula!r}: unexpected {text[at]!r} after {text[:at]!r}; write e.g. M5AM4")
        name, opening, closing, count = token.groups()
        if name:
            if name in REFUSED:
                raise LayoutError(f"{formula!r}: {check_name(name)}")
            unit = [name]
            stack[-1].append(name)
        elif opening:
            stack.append([])
            unit = None
        elif closing:
            if len(stack) == 1:
                raise LayoutError(f"{formula!r}: a ) without its (")
            unit = stack.pop()
            if not unit:
                raise LayoutError(f"{formula!r}: nothing between ( and )")
            stack[-1] += unit
        else:
            if unit is None:
                raise LayoutError(f"{formula!r}: the count {count} must follow a block's name or a )")
            if count.startswith("0"):
                raise LayoutError(f"{formula!r}: a count starts at 1, without leading zeros; found {count}")
            repeats = int(count[:9]) if len(count) < 9 else MAX_LAYERS + 1
            _limit(len(stack[-1]) + len(unit) * (repeats - 1))
            stack[-1] += unit * (repeats - 1)
            unit = None
        _limit(sum(map(len, stack)))
        at = token.end()
    if len(stack) > 1:
        raise LayoutError(f"{formula!r}: a ( without its )")
    if not stack[0]:
        raise LayoutError("the layout is empty; write something like M5AM4")
    return stack[0]


def spread(n_layers: int, k: int, most: str = "M", some: str = "A") -> list[str]:
    """Space k blocks of one name evenly among n_layers, never first or last; the others have the other name.

    With n_layers > 2k they stand in the middle of k equal stretches, as in Granite 4 (5, 15, 25, 35 of 40).
    """
    _limit(n_layers)
    if n_layers < 1:
        raise LayoutError("ratio(n_layers, k): n_layers must be at least 1")
    if k > max(0, n_layers - 2):
        raise LayoutError(
            f"ratio({n_layers}, {k}): at most {max(0, n_layers - 2)} of {n_layers} layers can be {some}, "
            "because the first and the last never are"
        )
    if n_layers > 2 * k:
        places = {(2 * i + 1) * n_layers // (2 * k) for i in range(k)}
    else:
        places = {1 + (2 * i + 1) * (n_layers - 2) // (2 * k) for i in range(k)}
    return [some if i in places else most for i in range(n_layers)]


def ratio(n_layers: int, k: int, most: str = "M", some: str = "A") -> str:
    """The formula of n_layers blocks of which k, evenly spaced and never first or last, are `some`."""
    return compress(spread(n_layers, k, most, some))


def compress(names: Sequence[str]) -> str:
    """The shortest formula that `expand` reads back as these names, as a person would write it."""
    if not names:
        raise LayoutError("no layers to compress")
    # One character per name, so that substrings can be compared as strings.
    alphabet = sorted(set(names))
    codes = "".join(chr(0x100 + alphabet.index(n)) for n in names)
    period = _period(codes)
    if len(codes) > _DEEP and period < len(codes):
        return f"({compress(names[:period])}){len(codes) // period}"
    if len(codes) > _DEEP:
        # Finding the shortest is cubic: in something deeper than any model only the runs are counted.
        return "".join(f"{name}{count if count > 1 else ''}" for name, count in _runs(names))
    return _Shortest(codes, alphabet).formula(0, len(codes))


def _period(text: str) -> int:
    """Length of the shortest unit whose repetition is the text."""
    return (text + text).find(text, 1)


def _runs(names: Sequence[str]) -> list[tuple[str, int]]:
    return [(name, len(list(run))) for name, run in groupby(names)]


class _Shortest:
    """The cheapest formula of every stretch of layers: one unit repeated, or two stretches side by side.

    A formula costs a thousand for each character and one for each letter: of equally long ones M2 beats MM.
    """

    def __init__(self, codes: str, alphabet: list[str]) -> None:
        self.codes, self.alphabet = codes, alphabet
        n = len(codes)
        self.from_start = [[0] * (n + 1) for _ in range(n + 1)]
        self.from_end = [[0] * (n + 1) for _ in range(n + 1)]
        self.choice: dict[tuple[int, int], tuple[str, int]] = {}
        for length in range(1, n + 1):
            for i in range(n - length + 1):
                self._solve(i, i + length)

    def _solve(self, i: int, j: int) -> None:
        if j - i == 1:
            cost = 1001 * len(self.alphabet[ord(self.codes[i]) - 0x100])
        else:
            sums = list(map(add, self.from_start[i][i + 1 : j], self.from_end[j][i + 1 : j]))
            cost = min(sums)
            self.choice[i, j] = ("cut", i + 1 + sums.index(cost))
            period = _period(self.codes[i:j])
            if period < j - i:
                signs = len(str((j - i) // period)) + (2 if period > 1 else 0)
                repeated = self.from_start[i][i + period] + 1000 * signs
                if repeated <= cost:
                    cost = repeated
                    self.choice[i, j] = ("repeat", period)
        self.from_start[i][j] = self.from_end[j][i] = cost

    def formula(self, i: int, j: int) -> str:
        """The cheapest formula of layers i to j - 1."""
        if j - i == 1:
            return self.alphabet[ord(self.codes[i]) - 0x100]
        how, at = self.choice[i, j]
        if how == "cut":
            return self.formula(i, at) + self.formula(at, j)
        unit = self.formula(i, i + at)
        return f"{unit if at == 1 else f'({unit})'}{(j - i) // at}"


def strip(names: Sequence[str], group: int = 10) -> str:
    """A one-line picture of the layers for `show` and reports: their names, a space after every ten."""
    return " ".join("".join(names[i : i + group]) for i in range(0, len(names), group))

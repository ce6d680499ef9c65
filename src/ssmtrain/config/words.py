"""The words of a command line: key=value in Hydra's override grammar, layouts quoted, sweeps set apart."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from hydra import version
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException

from ssmtrain.config import schema_file
from ssmtrain.config.errors import UserError
from ssmtrain.config.redact import redact

LAYOUT = "model.layout"
MAX_ARMS = 512
"""Combinations of one multirun; more is a slip of the keyboard."""
LONG = 200
"""Characters of a word that an error shows whole."""

_KEY = re.compile(r"[A-Za-z_][\w/-]*(@[\w.-]*)?(\.[A-Za-z0-9_][\w-]*)*")


@dataclass(frozen=True)
class Word:
    """One key=value (or ~key) as typed, and what it means."""

    text: str
    key: str
    value: Any = None
    delete: bool = False
    choices: tuple[tuple[str, Any], ...] = field(default=())
    """For a sweep: each value as typed and as meant; empty otherwise."""

    @property
    def path(self) -> tuple[str, ...]:
        """The key's parts."""
        return tuple(self.key.split("."))

    @property
    def chooses_kind(self) -> bool:
        """Whether this decides which keys may stand beside it, so that it must be applied first."""
        return self.path[-1] == "kind" or isinstance(self.value, dict)

    def tree(self) -> dict[str, Any]:
        """The value at its place, as nested mappings."""
        tree: Any = self.value
        for key in reversed(self.path):
            tree = {key: tree}
        return dict(tree)


def parse(texts: Sequence[str], sweep: bool = False) -> list[Word]:
    """Read words; UserError for bad grammar, a key given twice, or a sweep where `sweep` is false."""
    version.setbase("1.3")
    words = [_read(text, sweep) for text in texts]
    seen: dict[str, str] = {}
    for word in words:
        if word.key in seen:
            raise UserError(f"{word.key} is given twice: {seen[word.key]} and {word.text}")
        seen[word.key] = word.text
    return words


def _read(text: str, sweep: bool) -> Word:
    """A word; of one that is far too long, an error shows the beginning."""
    try:
        return _word(text, sweep)
    except UserError as error:
        shown = error.lines
        for long in (text, text.partition("=")[2]):
            if len(long) > LONG:
                shown = [line.replace(long, f"{redact(long)[:60]}…") for line in shown]
        raise UserError(*shown) from None


def _word(text: str, sweep: bool) -> Word:
    delete = text.startswith("~")
    bare = text.lstrip("+") if not delete else text[1:]
    key, equals, raw = bare.partition("=")
    key = key.strip()
    if not equals and not delete:
        raise UserError(f"{text!r} is not key=value" + _without_equals(text))
    if not _KEY.fullmatch(key):
        raise UserError(f"{text!r}: {key!r} is not a key; expected key=value such as optim.lr=3e-4")
    if delete:
        return Word(text, key, delete=True)
    if key == LAYOUT:
        return _layout(text, raw, sweep)
    override = _parse(text, key, raw)
    if not override.is_sweep_override():
        return Word(text, key, _as_text(key, raw, override.value()))
    if not sweep:
        raise UserError(
            f"{text}: several values make a sweep; add --multirun, "
            f"or quote the value if it is one text: {key}='\"{raw}\"'"
        )
    return Word(text, key, choices=tuple(_choices(override, key, text)))


def _without_equals(text: str) -> str:
    if text.startswith("-"):
        return "; it is not a flag of this verb either (ssmtrain help)"
    if "*" in text or "/" in text:
        return "; put quotes around values with *, as in data.train='texts/*.txt'"
    return f"; did you mean {text}=…?"


def _parse(text: str, key: str, raw: str) -> Override:
    parser = OverridesParser.create()
    try:
        return parser.parse_override(f"{key}={raw}")
    except HydraException as error:
        if not re.search(r"[\"'\[\]{}()]", raw):
            # Text that the grammar has no word for, such as ~/texts or a#1: take it as it stands.
            return parser.parse_override(f"{key}={_quoted(raw)}")
        reason = _reason(raw) or " ".join(str(error.__cause__ or error).split())
        raise UserError(f"{text}: cannot be read: {reason}") from None
    except ValueError:  # of its own making: a number of thousands of digits
        raise UserError(f"{text}: cannot be read: a number is too long") from None


def _reason(raw: str) -> str | None:
    for quote in ("'", '"'):
        if raw.count(quote) % 2:
            return f"a {quote} is not closed"
    for opening, closing in ("()", "[]", "{}"):
        if raw.count(opening) != raw.count(closing):
            return f"{opening} and {closing} do not match; put the value in quotes if it is text"
    return None


def _as_text(key: str, raw: str, value: Any) -> Any:
    """Keep a number as typed where the schema wants text, as in name=2026."""
    if isinstance(value, int | float) and key in schema_file.text_keys():
        return raw.strip()
    return value


def _choices(override: Override, key: str, text: str) -> Iterator[tuple[str, Any]]:
    sweep = override._value
    if isinstance(sweep, IntervalSweep):
        raise UserError(
            f"{text}: interval() has no list of values to run; write choice(…), a,b,c or range(…)"
        )
    if isinstance(sweep, RangeSweep) and _length(sweep) > MAX_ARMS:
        raise UserError(f"{text}: {_length(sweep)} values; at most {MAX_ARMS} combinations are run")
    try:
        texts = _steps(sweep) if isinstance(sweep, RangeSweep) else list(override.sweep_string_iterator())
    except (HydraException, AssertionError, ValueError):
        raise UserError(f"{text}: write the values out, as in {key}=a,b,c") from None
    if not texts:
        raise UserError(f"{text}: a sweep over no values")
    for one in texts:
        yield one, _as_text(key, one, _parse(text, key, one).value())


def _steps(sweep: RangeSweep) -> list[str]:
    """The values of a range, in decimal: Hydra's own are binary, 0.30000000000000004 and past the end."""
    if isinstance(sweep.start, int) and isinstance(sweep.stop, int) and isinstance(sweep.step, int):
        return [str(value) for value in range(sweep.start, sweep.stop, sweep.step)]
    start, stop, step = (Decimal(str(value)) for value in (sweep.start, sweep.stop, sweep.step))
    count = max(0, math.ceil((stop - start) / step)) if step else 0
    return [str(float(start + i * step)) for i in range(count)]


def _length(sweep: RangeSweep) -> int:
    start, stop, step = float(sweep.start or 0), float(sweep.stop or 0), float(sweep.step or 1)
    return max(0, int((stop - start) / step) + 1)


def _quoted(raw: str) -> str:
    return "'" + raw.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _layout(text: str, raw: str, sweep: bool) -> Word:
    """Formulas are taken as they stand; a comma outside parentheses separates the formulas of a sweep."""
    bare = raw.strip()
    if bare.startswith("choice(") and bare.endswith(")"):
        bare = bare[len("choice(") : -1]
    formulas = [_unquoted(part) for part in re.split(r",(?![^()]*\))", bare)]
    if len(formulas) == 1:
        return Word(text, LAYOUT, formulas[0])
    if not sweep:
        raise UserError(f"{text}: several layouts make a sweep; add --multirun")
    if not all(formulas):
        raise UserError(f"{text}: an empty layout between the commas")
    return Word(text, LAYOUT, choices=tuple((formula, formula) for formula in formulas))


def _unquoted(part: str) -> str:
    part = part.strip()
    return part[1:-1] if len(part) > 1 and part[0] == part[-1] and part[0] in "\"'" else part

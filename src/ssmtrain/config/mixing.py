"""The shares of a mixture's sources and when they change: read from the page, checked and compared."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from ssmtrain.config.growth import batches

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")
RESERVED = (
    "accuracy", "bpb", "kind", "labels", "lengths", "loss", "perplexity", "row_accuracy", "step", "tokens",
)  # fmt: skip
"""Keys that a validation record has beside its sets' names."""

Phases = list[tuple[int, dict[str, float]]]
"""(number of the first sample, weight by source), ascending from 0."""


def phases(config: Any) -> Phases:
    """The mixture over the run: a phase counted in steps begins where that step does, one counted in tokens
    with the first row that begins at or after them."""
    data, steps = config.data, batches(config.trainer)
    found: Phases = [(0, {name: source.weight for name, source in data.sources.items()})]
    for phase in data.phases or ():
        tokens = steps.tokens_after(phase.from_step) if phase.from_tokens is None else phase.from_tokens
        begin = -(-tokens // data.seq_len)
        if begin == 0:
            found = []
        found.append((begin, dict(phase.weights)))
    return found


def past(plan: Sequence[Any], end: int) -> list[tuple[int, dict[str, Fraction]]]:
    """The phases of a plan that begin before sample number `end`, all that has decided anything so far, with
    their weights as exact shares."""
    found = []
    for begin, weights in plan:
        if begin < end:
            exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
            found.append((begin, {name: weight / sum(exact.values()) for name, weight in exact.items()}))
    return found


def problems(config: Any) -> Iterator[str]:
    """What is wrong with a mixture, or with the names of validation sets, a line each."""
    data = config.data
    if data.kind != "mix":
        val = getattr(data, "val", None)
        yield from _names("data.val", val) if isinstance(val, Mapping) else ()
        return
    yield from _names("data.sources", data.sources)
    for name, source in data.sources.items():
        val = getattr(source, "val", None)
        yield from _names(f"data.sources.{name}.val", val) if isinstance(val, Mapping) else ()
    wrong = list(_phases(data))
    yield from wrong
    if wrong or not data.sources:
        return
    plan = phases(config)
    for (before, _), (begin, _) in itertools.pairwise(plan):
        if begin <= before:
            yield f"data.phases: one from row {begin:,} on follows one from row {before:,}; put them in order"
    for begin, weights in plan:
        if not sum(weights.values()) > 0:
            yield f"data: from row {begin:,} on no source has a weight above 0"


def _names(key: str, names: Mapping[str, Any]) -> Iterator[str]:
    if not names:
        yield f"{key} is empty: expected at least one, by name"
    for name in names:
        if not NAME.fullmatch(name) or name in RESERVED:
            yield (
                f"{key}.{name}: not a name for figures; expected letters, digits, '.', '_' and '-' (at most "
                f"40), and none of {', '.join(RESERVED)}"
            )


def _phases(data: Any) -> Iterator[str]:
    known = ", ".join(data.sources)
    for number, phase in enumerate(data.phases or ()):
        key = f"data.phases[{number}]"
        if (phase.from_step is None) == (phase.from_tokens is None):
            yield f"{key}: give from_step or from_tokens, one of them"
        elif number == 0 and not (phase.from_step or phase.from_tokens):
            set_ = [name for name, source in data.sources.items() if source.weight != 1]
            for name in set_:
                yield (
                    f"data.sources.{name}.weight: no effect beside {key}, which begins at 0; leave one out"
                )
        for name in phase.weights:
            if name not in data.sources:
                yield f"{key}.weights.{name}: there is no such source; expected {known}"
        for name in data.sources:
            if name not in phase.weights:
                yield f"{key}.weights.{name} is missing: expected a weight, 0 to leave the source out"

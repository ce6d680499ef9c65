"""Several sources as one: a sample number is a row of one of them, by shares that may change over the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ssmtrain.data.batch import Batch, Samples, join
from ssmtrain.data.order import key_of
from ssmtrain.data.turns import Turns

ROW_BITS = 40
"""Of a sample id: the row in its source; the bits above are the source's place on the page."""


class Ordered(Protocol):
    """Rows that can be read in file order."""

    @property
    def seq_len(self) -> int:
        """Tokens in a row."""

    @property
    def per_epoch(self) -> int:
        """Rows of all its text."""

    def batch_rows(self, numbers: Sequence[int] | np.ndarray) -> Batch:
        """Some rows by their place in file order."""


class Mixture:
    """Sources by name, dealt out by `phases`: (first sample number, weight by source), ascending from 0.

    Which source a number goes to follows from the phases and the seed alone, which of its rows from how many
    it has had before; a source goes on where it was when the phase changes.
    """

    def __init__(
        self, sources: Mapping[str, Samples], phases: Sequence[tuple[int, Mapping[str, float]]], seed: int
    ) -> None:
        if not phases or phases[0][0] != 0:
            raise ValueError("the first phase must begin at sample 0")
        self.sources, self.phases = dict(sources), [(begin, dict(weights)) for begin, weights in phases]
        self.begins = np.array([begin for begin, _ in phases], np.int64)  # (phases,)
        self.turns = [
            Turns([weights[name] for name in self.sources], key_of("ssmtrain turns", seed, begin))
            for begin, weights in self.phases
        ]
        had = np.zeros(len(self.sources), np.int64)
        self.had = [had]
        """Rows that each source has given before a phase begins, (sources,) each."""
        for turns, begin, end in zip(self.turns, self.begins, self.begins[1:], strict=False):
            self.had.append(had := had + turns.had(int(end - begin)))

    @property
    def seq_len(self) -> int:
        """Tokens in a row."""
        return next(iter(self.sources.values())).seq_len

    @property
    def per_epoch(self) -> int:
        """Rows of all sources together; an epoch is a source's own."""
        return sum(source.per_epoch for source in self.sources.values())

    def at(self, numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Place of the source of each sample number, and the number among that source's own samples."""
        asked = np.asarray(numbers, np.int64)
        phase = np.searchsorted(self.begins, asked, side="right") - 1  # (B,)
        which, own = np.empty_like(asked), np.empty_like(asked)
        for p in np.unique(phase):
            here = phase == p
            which[here], turn = self.turns[p].at(asked[here] - self.begins[p])
            own[here] = self.had[p][which[here]] + turn
        return which, own

    def samples(self, numbers: Sequence[int]) -> np.ndarray:
        """Sample ids of some sample numbers, int64 (B,): the source's place above ROW_BITS, the row below."""
        ids = np.empty(len(numbers), np.int64)
        for i, (source, places, own) in enumerate(self.apart(numbers)):
            ids[places] = source.samples(own) + (i << ROW_BITS)
        return ids

    def apart(self, numbers: Sequence[int]) -> Iterator[tuple[Samples, np.ndarray, list[int]]]:
        """Yield each source, the places (B_i,) of its samples among the numbers, and their numbers in it."""
        which, own = self.at(numbers)
        for i, source in enumerate(self.sources.values()):
            places = np.flatnonzero(which == i)
            yield source, places, own[places].tolist()

    def batch(self, numbers: Sequence[int]) -> Batch:
        """The rows of some sample numbers; a row is the same tokens in any batch."""
        parts = []
        for i, (source, places, own) in enumerate(self.apart(numbers)):
            if len(places):
                batch = source.batch(own)
                batch.sample_ids[:] = [row + (i << ROW_BITS) for row in batch.sample_ids]
                parts.append((places, batch))
        return join(parts)

    def ahead(self, numbers: Sequence[int]) -> None:
        """Have the rows of some sample numbers fetched, without waiting, which are to be read next."""
        for source, _, own in self.apart(numbers):
            source.ahead(own)

    def names(self, ids: Sequence[int]) -> list[Any]:
        """Sample ids as "source:row"."""
        named, low = list(self.sources), (1 << ROW_BITS) - 1
        return [f"{named[one >> ROW_BITS]}:{one & low}" for one in ids]

    def given(self, number: int) -> dict[str, int]:
        """Rows that each source gives to the first `number` samples."""
        phase = int(np.searchsorted(self.begins, number, side="right")) - 1
        had = self.had[phase] + self.turns[phase].had(number - int(self.begins[phase]))
        return dict(zip(self.sources, had.tolist(), strict=True))

    def shares(self, number: int) -> dict[str, float]:
        """Share of each source where a sample number falls."""
        turns = self.turns[int(np.searchsorted(self.begins, number, side="right")) - 1]
        return dict(zip(self.sources, (turns.each / len(turns.table)).tolist(), strict=True))


class Joined:
    """Several sets of rows in file order, one after the other, as one."""

    def __init__(self, parts: Sequence[Ordered]) -> None:
        self.parts = list(parts)
        self.ends = np.cumsum([part.per_epoch for part in parts])  # (sets,)

    @property
    def seq_len(self) -> int:
        """Tokens in a row."""
        return self.parts[0].seq_len

    @property
    def per_epoch(self) -> int:
        """Rows of all sets."""
        return int(self.ends[-1])

    def batch_rows(self, numbers: Sequence[int] | np.ndarray) -> Batch:
        """Some rows by their place, 0 … per_epoch - 1."""
        rows = np.asarray(numbers, np.int64)
        which = np.searchsorted(self.ends, rows, side="right")
        found = []
        for i in np.unique(which):
            places, begin = np.flatnonzero(which == i), self.ends[i] - self.parts[i].per_epoch
            batch = self.parts[i].batch_rows(rows[places] - begin)
            batch.sample_ids[:] = rows[places].tolist()
            found.append((places, batch))
        return join(found)

"""A curve of any length in bounded memory: the lowest and the highest point of each of its buckets."""

from __future__ import annotations

from dataclasses import dataclass, field

Sample = tuple[float, float, float, float]
"""Step, tokens, seconds, value."""


@dataclass
class Thinned:
    """Takes points in order and keeps at most 2 * `buckets` of them, no peak among those that go."""

    buckets: int = 1000
    count: int = 0
    """Points taken."""
    width: int = 1
    """Points that fall into a bucket."""
    kept: list[tuple[Sample, Sample]] = field(default_factory=list)
    """Lowest and highest of each bucket."""
    first: Sample | None = None
    last: Sample | None = None

    def add(self, point: Sample) -> None:
        """Take the next point."""
        if self.first is None:
            self.first = point
        self.last = point
        if self.count % self.width == 0:
            if len(self.kept) == self.buckets:
                self._halve()
            if self.count % self.width == 0:
                self.kept.append((point, point))
                self.count += 1
                return
        low, high = self.kept[-1]
        self.kept[-1] = (point if point[3] < low[3] else low, point if point[3] > high[3] else high)
        self.count += 1

    def points(self) -> list[Sample]:
        """The points that are kept, in the order in which they came, the first and the last among them."""
        found = []
        for low, high in self.kept:
            # A step that is logged twice comes twice; points of a bucket go by step, as they came.
            found += [low] if low is high else sorted((low, high), key=lambda point: point[0])
        if self.first is not None and found and found[0] is not self.first:
            found.insert(0, self.first)
        if self.last is not None and found and found[-1] is not self.last:
            found.append(self.last)
        return found

    def _halve(self) -> None:
        """Make one bucket of every two."""
        pairs = [self.kept[i : i + 2] for i in range(0, len(self.kept), 2)]
        self.kept = [
            (min((low for low, _ in pair), key=_value), max((high for _, high in pair), key=_value))
            for pair in pairs
        ]
        self.width *= 2


def _value(point: Sample) -> float:
    return point[3]

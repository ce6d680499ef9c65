"""Find in compiled Triton (TTGIR) where a copy overwrites what a matrix product in flight still reads.

A loop that Triton pipelines copies the tiles of later turns into a ring of buffers in shared memory, while
Hopper's matrix products, which are asynchronous, read the tile of this turn. Triton allows for that with one
buffer more, but not where the tile is also an operand of a product of another kind (Triton 3.6 and 3.7): the
copy may then land before the product has read, and nothing but the numbers shows it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

VALUE = r"%[-\w#]+"
_RING = re.compile(rf"({VALUE}) = ttg\.local_alloc .*!ttg\.memdesc<(\d+)x.*mutable>")
_LOOP = re.compile(r"scf\.for .* iter_args\((.*?)\) -> ")
_ADVANCE = re.compile(rf"({VALUE}) = arith\.addi ({VALUE}), %c1_i32")
_WRAP = re.compile(rf"({VALUE}) = arith\.select {VALUE}, %c0_i32\w*, ({VALUE})")
_INDEX = re.compile(rf"({VALUE}) = ttg\.memdesc_index ({VALUE})\[({VALUE})\]")
_VIEW = re.compile(rf"({VALUE}) = ttg\.memdesc_\w+ ({VALUE})")
_PRODUCT = re.compile(r"ttng\.warp_group_dot (.*?) \{.*isAsync = true")
_WAIT = re.compile(r"ttng\.warp_group_dot_wait .*\{pendings = (\d+)")
_COPY = re.compile(rf"ttg\.async_copy_global_to_local {VALUE}, ({VALUE})")


@dataclass(frozen=True)
class Buffer:
    """A buffer of a ring, `turn` in a loop's first turn and one further in each one after."""

    ring: str
    size: int
    turn: int


@dataclass(frozen=True)
class Event:
    """A product or a copy on buffers, or a wait that leaves so many products in flight."""

    kind: str
    buffers: tuple[Buffer, ...] = ()
    pending: int = 0


def hazards(ttgir: str) -> Iterator[str]:
    """Describe each ring of buffers that is copied into under a product not yet waited for."""
    rings = {name: int(size) for name, size in _RING.findall(ttgir)}
    for loop in loops(ttgir.splitlines()):
        yield from overlaps(list(events(loop, rings)))


def loops(lines: list[str]) -> Iterator[list[str]]:
    """The lines of each loop that holds no other."""
    start = None
    for number, line in enumerate(lines):
        if "scf.for " in line:
            start = number
        elif start is not None and "scf.yield" in line and depth(line) == depth(lines[start]) + 2:
            yield lines[start:number]
            start = None


def depth(line: str) -> int:
    """Spaces before the text."""
    return len(line) - len(line.lstrip())


def events(loop: list[str], rings: dict[str, int]) -> Iterator[Event]:
    """Products, copies and waits of one turn of a loop, in order."""
    arguments = _LOOP.search(loop[0])
    pairs = re.findall(rf"({VALUE}) = ({VALUE})", arguments.group(1)) if arguments else []
    first = {name: int(n.group(1)) for name, value in pairs if (n := re.match(r"%c(-?\d+)_i32", value))}
    buffers: dict[str, Buffer] = {}
    for line in loop[1:]:
        if (advance := _ADVANCE.search(line)) and advance.group(2) in first:
            first[advance.group(1)] = first[advance.group(2)] + 1
        elif (wrap := _WRAP.search(line)) and wrap.group(2) in first:
            first[wrap.group(1)] = first[wrap.group(2)]
        elif index := _INDEX.search(line):
            name, ring, place = index.groups()
            if ring in rings and place in first:
                buffers[name] = Buffer(ring, rings[ring], first[place])
        elif (view := _VIEW.search(line)) and view.group(2) in buffers:
            buffers[view.group(1)] = buffers[view.group(2)]
        elif wait := _WAIT.search(line):
            yield Event("wait", pending=int(wait.group(1)))
        elif product := _PRODUCT.search(line):
            yield Event("product", tuple(buffers[v] for v in product.group(1).split(", ") if v in buffers))
        elif (copy := _COPY.search(line)) and copy.group(1) in buffers:
            yield Event("copy", (buffers[copy.group(1)],))


def overlaps(turn: list[Event]) -> Iterator[str]:
    """Go round the loop twice, with the products in flight."""
    flying: list[set[tuple[str, int]]] = []
    told = set()
    for number in range(2):
        for event in turn:
            places = {(b.ring, (b.turn + number) % b.size) for b in event.buffers}
            if event.kind == "product":
                flying.append(places)
            elif event.kind == "wait":
                flying = flying[max(0, len(flying) - event.pending) :]
            elif any(places & product for product in flying) and event.buffers[0].ring not in told:
                told.add(event.buffers[0].ring)
                size = event.buffers[0].size
                yield f"a copy overwrites {event.buffers[0].ring} ({size} buffers) under a product in flight"

"""AdamW in Triton: every parameter of a group in one launch, 30 bytes moved for each.

A step reads four fp32 numbers of a parameter and writes three, and the parameter in 16 bits for the products
that read it next: nothing is computed that could not wait for memory, so what counts is that each number
moves once. Clipping is a factor on the gradient in its register, and the rounding that autocast would do in
a pass of its own is two bytes more.

The tensors of a model are some hundred, of all sizes. Their addresses lie in a table on the device, and a
program finds there which SPAN numbers of which tensor are its own. The table is made again only where an
address has changed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmtrain.kernels.ahead import launch

if TYPE_CHECKING:
    from ssmtrain.kernels.adamw import Moved, Rates

SPAN = 2048
"""Numbers of a program."""
BLOCK = 512
"""Of them in registers at a time: four of a thread. With eight, four arrays of fp32 and one of 16 bits want
different lanes, and change them through shared memory: 13.1 ms in place of 9.8 for 1.3 billion parameters."""
WARPS = 4
COLUMNS = tl.constexpr(6)
"""Of the table: parameter, gradient, average, average of squares, copy (0: none), and how many numbers."""
KEPT = 16
"""Tables that are kept, of the last calls."""


@dataclass(frozen=True)
class Table:
    """Where tensors lie."""

    rows: Tensor
    """(n, COLUMNS) int64."""
    places: Tensor
    """(programs, 2) int32: a row, and which of its spans."""
    aligned: bool
    """Whether all begin at multiples of 16 bytes."""
    half: bool
    """Whether the copies are fp16, and not bf16."""


@functools.lru_cache(KEPT)
def table(rows: tuple[tuple[int, ...], ...], half: bool, device: torch.device) -> Table:
    """The table of such rows: kept, or made and on its way to the device."""
    aligned = all(address % 16 == 0 for row in rows for address in row[:-1])
    places = _spread(tuple(row[-1] for row in rows), device)
    return Table(_sent(torch.tensor(rows, dtype=torch.int64), device), places, aligned, half)


@functools.lru_cache(KEPT)
def _spread(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Which span of which tensor each program takes."""
    spans = torch.tensor([triton.cdiv(size, SPAN) for size in sizes])
    row = torch.repeat_interleave(torch.arange(len(sizes)), spans)
    span = torch.arange(len(row)) - (spans.cumsum(0) - spans)[row]
    return _sent(torch.stack([row, span], 1).to(torch.int32), device)


def _sent(made: Tensor, device: torch.device) -> Tensor:
    # From locked memory, whose allocator knows when the copy is done, nobody has to wait for it.
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made


def table_of(moved: Sequence[Moved]) -> Table:
    """The table of such tensors, which all have fp32 but the copies, all of one type."""
    rows = tuple(
        (
            *(t.data_ptr() for t in (one.parameter, one.grad, one.exp_avg, one.exp_avg_sq)),
            0 if one.copy is None else one.copy.data_ptr(),
            one.parameter.numel(),
        )
        for one in moved
    )
    half = any(one.copy is not None and one.copy.dtype == torch.float16 for one in moved)
    return table(rows, half, moved[0].parameter.device)


def adamw(found: Table, rates: Rates) -> None:
    """See ssmtrain.kernels.adamw."""
    beta1, beta2 = rates.betas
    if not found.places.shape[0]:
        return
    with torch.cuda.device_of(found.rows):
        launch(
            _step,
            (found.places.shape[0],),
            *(found.rows, found.places),
            *(float(rates.scale), 1.0 - rates.lr * rates.weight_decay),
            *(1.0 - beta1, beta2, 1.0 - beta2),
            *(rates.lr / (1.0 - beta1**rates.step), math.sqrt(1.0 - beta2**rates.step), rates.eps),
            ALIGNED=found.aligned,
            HALF=found.half,
            SPAN=SPAN,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )


def norm(found: Sequence[Table]) -> Tensor:
    """See ssmtrain.kernels.adamw."""
    sums = [squares(one).sum(dtype=torch.float64) for one in found]
    return torch.stack(sums).sum().sqrt().float() if sums else torch.zeros(())


def squares(found: Table) -> Tensor:
    """Sums (programs,) of the squares of the gradients of a table."""
    sums = torch.empty(found.places.shape[0], device=found.rows.device)
    if sums.numel():
        with torch.cuda.device_of(sums):
            launch(
                _squares,
                (found.places.shape[0],),
                *(found.rows, found.places, sums),
                ALIGNED=found.aligned,
                SPAN=SPAN,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
    return sums


@triton.jit
def _address(row, column: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """An address of the table as a pointer; where aligned, Triton may read 16 bytes at once."""
    at = tl.load(row + column).to(tl.pointer_type(TYPE))
    if ALIGNED:
        at = tl.multiple_of(at, 16)
    return at


@triton.jit
def _own(rows, places, SPAN: tl.constexpr):
    """The program's row of the table, its first number, and how many the tensor has."""
    place = places + tl.program_id(0) * 2
    row = rows + tl.load(place).to(tl.int64) * COLUMNS
    return row, tl.load(place + 1).to(tl.int64) * SPAN, tl.load(row + COLUMNS - 1)


@triton.jit
def _load(at, inside, WHOLE: tl.constexpr):
    """Read, zero outside; a WHOLE block is read without a mask, 16 bytes at once where aligned."""
    if WHOLE:
        return tl.load(at)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _store(at, value, inside, WHOLE: tl.constexpr):
    """Write inside."""
    if WHOLE:
        tl.store(at, value)
    else:
        tl.store(at, value, mask=inside)


@triton.jit
def _move(
    parameter, grad, average, square, copy, kept, at, count, scale, keep, new1, old2, new2, size, root, eps,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Move some numbers of a tensor that has `count`."""
    inside = at < count
    p, g = _load(parameter + at, inside, WHOLE), _load(grad + at, inside, WHOLE)
    m, v = _load(average + at, inside, WHOLE), _load(square + at, inside, WHOLE)
    g *= scale
    m += new1 * (g - m)
    v = old2 * v + new2 * (g * g)
    below = tl.div_rn(tl.sqrt_rn(v), root) + eps
    p = keep * p - size * tl.div_rn(m, below)
    _store(parameter + at, p, inside, WHOLE)
    _store(average + at, m, inside, WHOLE)
    _store(square + at, v, inside, WHOLE)
    if kept != 0:
        _store(copy + at, p.to(copy.dtype.element_ty), inside, WHOLE)


@triton.jit
def _step(
    rows,  # (n, COLUMNS)
    places,  # (programs, 2)
    scale,
    keep,
    new1,
    old2,
    new2,
    size,
    root,
    eps,
    ALIGNED: tl.constexpr,
    HALF: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Move the numbers of a span."""
    LOW: tl.constexpr = tl.float16 if HALF else tl.bfloat16
    row, first, count = _own(rows, places, SPAN)
    parameter = _address(row, 0, tl.float32, ALIGNED)
    grad = _address(row, 1, tl.float32, ALIGNED)
    average = _address(row, 2, tl.float32, ALIGNED)
    square = _address(row, 3, tl.float32, ALIGNED)
    kept = tl.load(row + 4)
    copy = _address(row, 4, LOW, ALIGNED)
    tensors = (parameter, grad, average, square, copy, kept)
    numbers = (scale, keep, new1, old2, new2, size, root, eps)
    if first + SPAN <= count:
        for base in tl.static_range(0, SPAN, BLOCK):
            _move(*tensors, first + base + tl.arange(0, BLOCK), count, *numbers, True)
    else:
        for base in tl.static_range(0, SPAN, BLOCK):
            _move(*tensors, first + base + tl.arange(0, BLOCK), count, *numbers, False)


@triton.jit
def _squares(
    rows,  # (n, COLUMNS)
    places,  # (programs, 2)
    sums,  # (programs,)
    ALIGNED: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up the squares of a span of the gradient."""
    row, first, count = _own(rows, places, SPAN)
    grad = _address(row, 1, tl.float32, ALIGNED)
    total = tl.zeros((BLOCK,), tl.float32)
    if first + SPAN <= count:
        for base in tl.static_range(0, SPAN, BLOCK):
            g = tl.load(grad + first + base + tl.arange(0, BLOCK))
            total += g * g
    else:
        for base in tl.static_range(0, SPAN, BLOCK):
            at = first + base + tl.arange(0, BLOCK)
            g = tl.load(grad + at, mask=at < count, other=0.0)
            total += g * g
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))

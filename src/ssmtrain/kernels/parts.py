"""A tensor in parts, whose gradients are written where the gradient of the whole will be.

A projection makes the inputs of several ops at once, side by side. Cut by `torch.split`, their gradients come
from different ops and are copied side by side again before the projection's backward pass: one more pass over
the widest tensors of a layer. Cut by `parts`, an op that can write with a row's pitch asks for the room that
its input came from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MARK = "_ssmtrain_place"

Shapes = Sequence[tuple[int, ...]]
"""Of a token in each part: the channels, or heads and the channels of each."""


@dataclass
class _Whole:
    """The gradient of a tensor in the making."""

    like: Tensor
    """Of its shape and type, without memory."""
    shapes: Shapes
    device: torch.device
    buffer: Tensor | None = None
    taken: set[int] = field(default_factory=set)

    def room(self, index: int) -> Tensor:
        """Memory for the gradient of a part; asked for twice, by another reader or pass, it is new memory."""
        if self.buffer is None or index in self.taken:
            self.buffer = torch.empty_like(self.like, device=self.device)
            self.taken = set()
        self.taken.add(index)
        return cut(self.buffer, self.shapes)[index]


@dataclass
class Place:
    """Where the gradient of one part goes."""

    whole: _Whole
    index: int

    def room(self) -> Tensor:
        """Memory for the gradient, not initialised: to be written whole, and returned."""
        return self.whole.room(self.index)


def cut(whole: Tensor, shapes: Shapes) -> tuple[Tensor, ...]:
    """Cut whole (.., E), along its last dimension, in views (.., *shape), of E values in all."""
    pieces = whole.split([math.prod(shape) for shape in shapes], dim=-1)
    return tuple(
        piece.unflatten(-1, shape) if len(shape) > 1 else piece
        for piece, shape in zip(pieces, shapes, strict=True)
    )


def parts(whole: Tensor, shapes: Shapes) -> tuple[Tensor, ...]:
    """Cut whole (.., E) as `cut` does."""
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and whole.requires_grad):
        return cut(whole, shapes)
    like = torch.empty_like(whole, device="meta", memory_format=torch.contiguous_format)
    made = _Whole(like, shapes, whole.device)
    pieces = _Parts.apply(whole, made)
    for index, part in enumerate(pieces):
        setattr(part, MARK, Place(made, index))
    return pieces


def place_of(part: Tensor) -> Place | None:
    """Return where the gradient of a part goes; None of a tensor that is no part of another."""
    return getattr(part, MARK, None)


class _Parts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, made: _Whole) -> tuple[Tensor, ...]:
        ctx.made = made
        ctx.set_materialize_grads(False)
        return cut(whole, made.shapes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        made: _Whole = ctx.made
        if all(grad is None for grad in grads):
            return None, None
        buffer, made.buffer, made.taken = made.buffer, None, set()
        if buffer is None:
            buffer = torch.empty_like(made.like, device=made.device)
        for room, grad in zip(cut(buffer, made.shapes), grads, strict=True):
            if grad is None:
                room.zero_()
            elif grad.data_ptr() != room.data_ptr() or grad.stride() != room.stride():
                room.copy_(grad)
        return buffer, None

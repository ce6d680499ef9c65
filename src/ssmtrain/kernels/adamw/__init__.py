"""AdamW (Loshchilov & Hutter 2019) over all parameters at once, clipping and rounding in the same pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssmtrain.kernels.adamw import reference
from ssmtrain.kernels.backend import chosen

if TYPE_CHECKING:
    from ssmtrain.kernels.adamw.triton import Table


@dataclass(frozen=True)
class Moved:
    """A parameter and what moves it: contiguous tensors of one shape and device."""

    parameter: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    copy: Tensor | None = None
    """The parameter in 16 bits, to be written with it."""


@dataclass(frozen=True)
class Rates:
    """The numbers of a step."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    step: int
    """Of the step that is being taken, from 1."""
    scale: float = 1.0
    """The gradient counts so much: what clips it."""


@dataclass(frozen=True)
class Prepared:
    """Tensors that move together, and where a kernel finds them."""

    moved: Sequence[Moved]
    table: Table | None
    """None: the reference moves them."""


def fits(parameter: Tensor) -> bool:
    """Whether the Triton body takes a parameter: fp32, contiguous, where it runs."""
    plain = parameter.is_contiguous() and parameter.dtype == torch.float32
    return plain and chosen("adamw", parameter.device.type) == "triton"


def prepare(moved: Sequence[Moved]) -> Prepared:
    """Look up where tensors of one device lie, which takes the host a while, before their gradient is known.

    They must stay where they are until they have moved.
    """
    wide = all(t.dtype == torch.float32 for one in moved for t in (one.grad, one.exp_avg, one.exp_avg_sq))
    if not moved or not wide or not all(fits(one.parameter) for one in moved):
        return Prepared(moved, None)
    from ssmtrain.kernels.adamw import triton

    return Prepared(moved, triton.table_of(moved))


def adamw(prepared: Prepared, rates: Rates) -> None:
    """Take one step of AdamW with decoupled decay, in place, all tensors alike.

    parameter *= 1 - lr weight_decay; exp_avg and exp_avg_sq average grad * scale and its square with betas;
    parameter -= lr / (1 - beta1^step) exp_avg / (sqrt(exp_avg_sq / (1 - beta2^step)) + eps). fp32 (float64 in
    the reference); the copies are rounded to their own type. Changes no version counter: narrow.written.
    """
    if prepared.table is None:
        return reference.adamw(prepared.moved, rates)
    from ssmtrain.kernels.adamw import triton

    return triton.adamw(prepared.table, rates)


def norm(prepared: Sequence[Prepared]) -> Tensor:
    """Norm () of all gradients as of one vector, fp32 where they are, on their device."""
    if any(one.table is None for one in prepared):
        return reference.norm([one.grad for some in prepared for one in some.moved])
    from ssmtrain.kernels.adamw import triton

    return triton.norm([one.table for one in prepared if one.table is not None])

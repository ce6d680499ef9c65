"""How parameters are drawn: each function returns a Draw, a map from (shape, generator) to an fp32 tensor."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from ssmtrain.layers.base import Draw


def normal(std: float) -> Draw:
    """Zero-mean normal with this standard deviation."""

    def draw(shape: tuple[int, ...], generator: Generator) -> Tensor:
        return torch.empty(shape).normal_(0.0, std, generator=generator)

    return draw


def uniform(low: float, high: float) -> Draw:
    """Uniform on [low, high)."""

    def draw(shape: tuple[int, ...], generator: Generator) -> Tensor:
        return torch.empty(shape).uniform_(low, high, generator=generator)

    return draw


def linear_default(fan_in: int) -> Draw:
    """torch's default for linear and convolution weights: kaiming uniform with a = sqrt(5)."""
    bound = 1.0 / math.sqrt(fan_in)
    return uniform(-bound, bound)


def constant(value: float) -> Draw:
    """The same value everywhere."""

    def draw(shape: tuple[int, ...], generator: Generator) -> Tensor:
        return torch.full(shape, float(value))

    return draw


def log_arange(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """log(1..N) along the last axis: S4D-Real's A, stored as A_log (Mamba, section 3.6)."""
    return torch.log(torch.arange(1, shape[-1] + 1, dtype=torch.float32)).expand(shape).clone()


def log_uniform(low: float, high: float) -> Draw:
    """The logarithm of a uniform draw on [low, high): Mamba-2's A_log."""

    def draw(shape: tuple[int, ...], generator: Generator) -> Tensor:
        return torch.empty(shape).uniform_(low, high, generator=generator).log_()

    return draw


def dt_bias(dt_min: float, dt_max: float, floor: float) -> Draw:
    """softplus^-1 of a step, log-uniform on [dt_min, dt_max], at least `floor` (Mamba, section 3.6)."""

    def draw(shape: tuple[int, ...], generator: Generator) -> Tensor:
        u = torch.empty(shape).uniform_(0.0, 1.0, generator=generator)
        dt = torch.exp(u * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)).clamp_min_(floor)
        # softplus^-1(y) = y + log(1 - exp(-y)), written with expm1 so that small steps keep their digits.
        return dt + torch.log(-torch.expm1(-dt))

    return draw

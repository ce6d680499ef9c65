"""Copies of fp32 weights in the 16 bits that matrix products read, kept by whoever changes the weights.

Autocast rounds a weight at each use, in a pass over all parameters. An optimiser's step has every weight in
registers as it is written, and can write the rounded one beside it (kernels/adamw). A product asks here for a
weight in 16 bits: the first time it is rounded, and the wish is noted on the weight; whoever steps then makes
room for a copy. A copy counts for as long as its weight is the one that it was made of: torch's count of
changes in place, and the address, say whether it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

MARK = "_ssmtrain_narrow"


@dataclass
class Copy:
    """What is known of a weight in another type."""

    dtype: torch.dtype
    values: Tensor | None = None
    """None: asked for, and not made."""
    version: int = -1
    address: int = 0

    def current(self, weight: Tensor) -> bool:
        """Whether it has the weight's values."""
        return self.version == weight._version and self.address == weight.data_ptr()

    def note(self, weight: Tensor) -> None:
        """Remember that it has the weight's values now."""
        self.version, self.address = weight._version, weight.data_ptr()


def narrow(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """weight.to(dtype), outside of autograd: its copy where there is a current one, to be read only."""
    if weight.dtype == dtype:
        return weight
    found: Copy | None = getattr(weight, MARK, None)
    if found is None or found.dtype != dtype:
        if weight.is_leaf and weight.requires_grad:
            setattr(weight, MARK, Copy(dtype))
        return weight.to(dtype)
    if found.values is None or not found.current(weight):
        return weight.to(dtype)
    return found.values


def asked(weight: Tensor) -> Tensor | None:
    """Memory for a weight's copy, where one was asked for: to be written with the weight; see `written`."""
    found: Copy | None = getattr(weight, MARK, None)
    if found is None:
        return None
    if found.values is None or found.values.device != weight.device or found.values.shape != weight.shape:
        found.values = torch.empty_like(weight, dtype=found.dtype, requires_grad=False)
        found.version = -1
    return found.values


def written(weights: Iterable[Tensor]) -> None:
    """Note that these weights, and the copies asked for, were written behind torch's back."""
    weights = list(weights)
    found = [(weight, getattr(weight, MARK, None)) for weight in weights]
    copies = [one.values for _, one in found if one is not None and one.values is not None]
    torch.autograd.graph.increment_version(weights + copies)
    for weight, one in found:
        if one is not None and one.values is not None:
            one.note(weight)


@torch.no_grad()
def renew(weights: Iterable[Tensor]) -> None:
    """Round anew what other hands have changed: for a recorded graph, which reads the copies unasked."""
    for weight in weights:
        found: Copy | None = getattr(weight, MARK, None)
        if found is not None and found.values is not None and not found.current(weight):
            found.values.copy_(weight)
            found.note(weight)

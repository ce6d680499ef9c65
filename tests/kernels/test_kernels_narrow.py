"""Copies of weights in 16 bits: when they count, and when they do not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ssmtrain.kernels import narrow

BF16 = torch.bfloat16


def weight() -> nn.Parameter:
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(5, 7))


def write(p: nn.Parameter, by: float) -> torch.Tensor:
    """Change a weight and its copy as an optimiser's kernel does."""
    copy = narrow.asked(p)
    assert copy is not None
    p.detach().numpy()[:] += by  # behind torch's back
    copy.view(torch.int16).numpy()[:] = p.detach().to(BF16).view(torch.int16).numpy()
    narrow.written([p])
    return copy


def test_a_copy_serves_from_the_first_step_on() -> None:
    p = weight()
    assert narrow.asked(p) is None
    assert torch.equal(narrow.narrow(p, BF16), p.to(BF16))
    copy = write(p, 1.0)
    assert narrow.narrow(p, BF16) is copy and torch.equal(copy, p.to(BF16))
    assert narrow.asked(p) is copy
    assert narrow.narrow(p, torch.float32) is p
    assert torch.equal(narrow.narrow(p, torch.float16), p.half())


@pytest.mark.parametrize("how", ["in place", "detached", "another address", "not yet written"])
def test_a_copy_of_what_has_changed_is_not_used(how: str) -> None:
    p = weight()
    narrow.narrow(p, BF16)
    if how == "not yet written":
        narrow.asked(p)
    else:
        write(p, 1.0)
    with torch.no_grad():
        if how == "in place":
            p.add_(1.0)
        elif how == "detached":
            p.detach().mul_(2.0)
        elif how == "another address":
            p.data = p.data * 3.0
    assert torch.equal(narrow.narrow(p, BF16), p.to(BF16))


def test_a_copy_is_renewed_where_it_lies() -> None:
    p = weight()
    narrow.narrow(p, BF16)
    copy = write(p, 1.0)
    at, before = copy.data_ptr(), copy._version
    narrow.renew([p])
    assert copy._version == before  # it was current
    with torch.no_grad():
        p.add_(1.0)
    narrow.renew([p, weight()])
    assert narrow.narrow(p, BF16) is copy and copy.data_ptr() == at and torch.equal(copy, p.to(BF16))


def test_autograd_sees_that_a_weight_was_written() -> None:
    p = weight()
    narrow.narrow(p, BF16)
    write(p, 1.0)
    held = narrow.narrow(p, BF16)
    x = torch.randn(3, 7, dtype=BF16, requires_grad=True)
    for kept in (held, p):
        y = x.to(kept.dtype) @ kept.t()
        write(p, 1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_only_leaves_are_asked_for() -> None:
    p = weight()
    made = p * 2
    assert torch.equal(narrow.narrow(made, BF16), made.to(BF16)) and narrow.asked(made) is None

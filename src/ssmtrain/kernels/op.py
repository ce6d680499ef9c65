"""An op for compilers, which eager calls enter by a shorter way.

A custom op's call crosses the dispatcher twice, fills in defaults and compares all outputs with all inputs:
60 to 100 us of a core that has to call thousands a second, so that small models would train no faster than
Python can call. An eager call with plain tensors therefore goes straight to the function, and to a
`torch.autograd.Function` of the same formulas where a gradient is wanted. Whoever looks on (a compiler, fake
tensors, a dispatch mode, torch.func, a subclass of Tensor) gets the op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssmtrain.kernels.parts import Place

PLAIN = frozenset({Tensor, torch.nn.Parameter, torch.nn.Buffer})


class Op:
    """A function on tensors that is the custom op `ssmtrain::<name>` as well."""

    def __init__(
        self, name: str, body: Callable[..., Any], mutates_args: Sequence[str], schema: str | None
    ) -> None:
        self.body = body
        self.custom = torch.library.custom_op(
            f"ssmtrain::{name}", body, mutates_args=mutates_args, schema=schema
        )
        self._overload = getattr(torch.ops.ssmtrain, name).default
        self._function: type[torch.autograd.Function] | None = None
        self.__name__, self.__doc__ = name, body.__doc__

    def register_fake(self, shapes: Callable[..., Any]) -> None:
        """Say what comes out of tensors without memory."""
        self.custom.register_fake(shapes)

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[[Any, tuple, Any], None]
    ) -> None:
        """Say how it is differentiated, once, as torch.library.register_autograd does."""
        self.custom.register_autograd(backward, setup_context=setup_context)
        body = self.body

        class Direct(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                output = body(*args)
                setup_context(ctx, args, output)
                return output

            @staticmethod
            @once_differentiable
            def backward(ctx: Any, *grads: Tensor | None) -> Any:
                return backward(ctx, *grads)

        self._function = Direct

    def into(self, *places: Place | None) -> Callable[..., Any]:
        """The op, or, where a gradient has a place, its function: the last parameters are where to write."""
        if all(place is None for place in places):
            return self
        rooms = [None if place is None else place.room() for place in places]
        return lambda *args: self.body(*args, *rooms)

    def __call__(self, *args: Any) -> Any:
        """Compute it; all arguments by position, and none but the schema's."""
        if torch.compiler.is_compiling() or not _plain(args):
            return self._overload(*args)
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return self._overload(*args) if self._function is None else self._function.apply(*args)
        return self.body(*args)


def op(
    name: str, *, mutates_args: Sequence[str] = (), schema: str | None = None
) -> Callable[[Callable[..., Any]], Op]:
    """Make a function an op; see torch.library.custom_op."""
    return lambda body: Op(name, body, mutates_args, schema)


def _plain(args: tuple[Any, ...]) -> bool:
    """Whether nobody looks on at a call."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and all(type(a) in PLAIN for a in args if isinstance(a, Tensor))
    )

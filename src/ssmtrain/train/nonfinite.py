"""Which layer was the first to produce a value that is not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ssmtrain.model.hybrid import Output


def is_finite(tensor: Tensor) -> bool:
    """Whether every element is finite."""
    return bool(torch.isfinite(tensor).all())


def locate(model: nn.Module, forward: Callable[[], Output], gradients: dict[str, Tensor]) -> str:
    """Name what was not finite first: a weight, a layer's output, or else a gradient in backward order.

    `forward` runs the offending batch again; `gradients` are those of the failed step by parameter name.
    """
    for name, parameter in model.named_parameters():
        if not is_finite(parameter):
            return f"the weight {name} is not finite"
    found = _first_output(model, forward)
    if found is not None:
        return f"the output of {found} is the first that is not finite"
    # Backward runs from the last layer to the first: the culprit is the last parameter in forward order.
    bad = [name for name, gradient in gradients.items() if not is_finite(gradient)]
    if bad:
        return f"the forward pass is finite; going back, the gradient of {bad[-1]} is the first that is not"
    return "the forward pass and the gradients of a second run are finite: the fault does not repeat"


def _first_output(model: nn.Module, forward: Callable[[], Output]) -> str | None:
    """The first module, innermost first, whose output is not finite; None when all are."""
    first: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not first and not all(is_finite(t) for t in _tensors(output)):
                first.append(f"{name} ({type(module).__name__})")

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            result = forward()
    finally:
        for handle in handles:
            handle.remove()
    if not first and result.loss_sum is not None and not is_finite(result.loss_sum):
        return "the loss (head)"
    return first[0] if first else None


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for inner in value for tensor in _tensors(inner)]
    return []

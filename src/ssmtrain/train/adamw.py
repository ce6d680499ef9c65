"""AdamW that clips, steps and rounds in one pass over memory (kernels/adamw); state and results as torch's.

What the host has to do, some hundred addresses to look up, it does in `prepare`, while the device is still
busy with the gradient: between the moment at which loss and norm are known and the launch nothing is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ssmtrain.kernels import narrow
from ssmtrain.kernels.adamw import Moved, Prepared, Rates, adamw, fits, norm, prepare


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW over parameters that `fits` takes; a parameter without a gradient is left alone."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        copies: bool,
    ) -> None:
        """With copies, weights that products read in 16 bits are written in those too (kernels/narrow)."""
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=False, foreach=False)
        self.copies = copies
        self._ready: list[tuple[dict[str, Any], int, Prepared]] | None = None

    @staticmethod
    def takes(parameters: Iterable[Tensor]) -> bool:
        """Whether all of these can be stepped here."""
        return all(type(p) is nn.Parameter and fits(p) for p in parameters)

    def prepare(self) -> None:
        """Look up what the next step moves, with the gradients as they lie now."""
        self._ready = [
            (group, step, prepare(moved))
            for group in self.param_groups
            for step, moved in self._moved(group).items()
        ]

    def norm(self) -> Tensor:
        """Norm () of all gradients, fp32."""
        return norm([prepared for _, _, prepared in self._prepared()])

    @torch.no_grad()
    def step(  # type: ignore[override]  # torch's returns what a closure returns
        self, closure: Callable[[], float] | None = None, scale: float = 1.0
    ) -> None:
        """Take a step in which the gradient counts `scale`; ValueError with a closure."""
        if closure is not None:
            raise ValueError("AdamW.step takes no closure: compute the gradients first")
        ready, self._ready = self._prepared(), None
        for group, step, prepared in ready:
            lr, betas, eps, decay = (group[key] for key in ("lr", "betas", "eps", "weight_decay"))
            adamw(prepared, Rates(lr, betas, eps, decay, step + 1, scale))
        parameters = [one.parameter for _, _, prepared in ready for one in prepared.moved]
        if not parameters:
            return
        narrow.written(parameters)
        torch._foreach_add_([self.state[p]["step"] for p in parameters], 1.0)

    def _prepared(self) -> list[tuple[dict[str, Any], int, Prepared]]:
        if self._ready is None:
            self.prepare()
        assert self._ready is not None
        return self._ready

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's."""
        self._ready = None
        super().zero_grad(set_to_none)

    def _moved(self, group: dict[str, Any]) -> dict[int, list[Moved]]:
        """The group's tensors, by the steps that were taken with them."""
        found: dict[int, list[Moved]] = {}
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            if state["step"].device.type != "cpu":
                state["step"] = state["step"].cpu()  # of a checkpoint: read by the host before each step
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = state[key].contiguous()
            copy = narrow.asked(p) if self.copies else None
            one = Moved(p, p.grad.contiguous(), state["exp_avg"], state["exp_avg_sq"], copy)
            found.setdefault(int(state["step"]), []).append(one)
        return found

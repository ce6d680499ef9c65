"""Who takes a step's passes and applies its gradients: torch here, DeepSpeed in parallel/zero.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from ssmtrain.layers.base import Context
from ssmtrain.model.hybrid import Output
from ssmtrain.parallel import ranks
from ssmtrain.parallel.shard import Scattered, average_whole, is_sharded
from ssmtrain.train import optim

if TYPE_CHECKING:
    from ssmtrain.train.module import LitLM


class Engine(Protocol):
    """What LitLM asks of it, in the order of a step."""

    @property
    def together(self) -> bool:
        """Whether no rank can look at its gradients without the others."""

    def forward(self, inputs: Tensor, labels: Tensor, ctx: Context) -> Output:
        """The model's sums."""

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Around the passes of a micro-batch; after the last the gradient is averaged over the ranks."""

    def backward(self, loss: Tensor) -> None:
        """Add to the gradient."""

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """The averaged gradient by parameter name, before it is clipped."""

    def norm(self, lr: float) -> Tensor:
        """Norm () of the whole gradient; an engine that clips, steps and skips by itself has done so."""

    def apply(self, lr: float, norm: Tensor, known: float) -> None:
        """Clip to a norm, which the host knows too, and step, unless `norm` has."""

    def clear(self) -> None:
        """Let go of the gradient."""

    def states(self) -> dict[str, Tensor | Scattered]:
        """The optimisers' state as `parameter/key` -> tensor."""

    def load(self, named: Mapping[str, nn.Parameter], saved: Mapping[str, Tensor]) -> None:
        """Put saved state back, bit for bit; ValueError when it does not fit."""


class TorchEngine:
    """Lightning's backward pass under any of torch's ways, and torch's optimisers."""

    def __init__(self, lit: LitLM) -> None:
        self.lit, self.model, self.optimizers = lit, lit.model, lit.opt

    @property
    def together(self) -> bool:
        """Where the model is cut."""
        return is_sharded(self.model)

    def forward(self, inputs: Tensor, labels: Tensor, ctx: Context) -> Output:
        """Call the model."""
        return self.model(inputs, labels, ctx)

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Keep gradients to this rank until the last micro-batch."""
        strategy = self.lit.trainer.strategy
        with nullcontext() if last or ranks.world() == 1 else strategy.block_backward_sync():  # type: ignore[attr-defined]  # DDP's
            yield
        if last:
            average_whole(self.model)

    def backward(self, loss: Tensor) -> None:
        """Add to the gradient."""
        self.lit.manual_backward(loss)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's, where it has one."""
        return ((n, p.grad) for n, p in self.model.named_parameters() if p.grad is not None)

    def norm(self, lr: float) -> Tensor:
        """Norm () of the whole gradient."""
        return optim.norm_of(self.optimizers, self.lit.device)

    def apply(self, lr: float, norm: Tensor, known: float) -> None:
        """Clip and step."""
        optim.set_lr(self.optimizers, lr)
        optim.take_step(self.optimizers, self.lit.config.optim.clip, norm, known)

    def clear(self) -> None:
        """Let go of the gradient."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def states(self) -> dict[str, Tensor | Scattered]:
        """The optimisers' state as `parameter/key` -> tensor."""
        named = dict(self.model.named_parameters())
        return dict(optim.state_tensors(self.optimizers, named))

    @torch.no_grad()
    def load(self, named: Mapping[str, nn.Parameter], saved: Mapping[str, Tensor]) -> None:
        """Put saved state back, bit for bit."""
        optim.load_state_tensors(self.optimizers, named, saved)

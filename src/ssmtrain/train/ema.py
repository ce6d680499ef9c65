"""The moving average of the weights: an fp32 shadow of every trained parameter, where the parameter lies."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ssmtrain.config.ema import EmaConfig
from ssmtrain.parallel.shard import Scattered, as_held, in_pieces, like, mine, shape_of


class Ema:
    """Averages by parameter name; of a model that is cut each rank averages the part that it holds."""

    def __init__(self, config: EmaConfig, named: Mapping[str, nn.Parameter]) -> None:
        self.config = config
        self.named = {name: p for name, p in named.items() if p.requires_grad}
        self.shadow: dict[str, Tensor] = {}
        """Empty before the average begins."""

    def begin(self, step: int) -> None:
        """Start as a copy of the weights, if `step` is at or past the start and it has not begun."""
        if not self.shadow and step >= self.config.start:
            held = {name: mine(p) if in_pieces(p) else p for name, p in self.named.items()}
            self.shadow = {name: p.detach().clone().float() for name, p in held.items()}

    @torch.no_grad()
    def update(self, step: int, skipped: bool) -> None:
        """Take in the weights after `step` finished steps, where one is due; a skipped step changed none."""
        if not self.shadow:
            self.begin(step)
        elif not skipped and step % self.config.every == 0:
            shadows = [mine(tensor) for tensor in self.shadow.values()]
            weights = [mine(self.named[name]) for name in self.shadow]
            # shadow += (1 - decay) (weight - shadow), as torch.optim.swa_utils averages.
            torch._foreach_lerp_(shadows, weights, 1.0 - self.config.decay)

    def tensors(self) -> dict[str, Tensor | Scattered]:
        """The averages, as they are saved."""
        return {name: as_held(tensor, self.named[name]) for name, tensor in self.shadow.items()}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Put saved averages back, bit for bit; ValueError when they are not those of the parameters."""
        wrong = sorted(saved.keys() ^ self.named.keys())
        wrong += [n for n in saved if n in self.named and saved[n].shape != shape_of(self.named[n])]
        if wrong:
            raise ValueError(f"the averages do not fit the model: {', '.join(wrong[:5])}")
        self.shadow = {name: like(saved[name].float(), p) for name, p in self.named.items()}

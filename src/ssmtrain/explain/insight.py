"""What a step's gradient is made of: by row, by block, by kind, and where activations are largest."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ssmtrain.data.batch import apart, cut
from ssmtrain.explain.reads import row_of
from ssmtrain.train.callbacks.health import gradient_norms, kind_of, parameter_kinds
from ssmtrain.train.module import LitLM


@dataclass(frozen=True)
class RowFigures:
    """One row of the step, taken alone with the step's weights."""

    index: int
    """Its place in the step."""
    source: str
    """Which of a mixture's; empty where there is one alone."""
    row: int
    """Its place in the split's file order; of a task its number."""
    begin: int
    """Which token of that row is its first."""
    labels: int
    loss: float
    """Nats per label of this row."""
    grad_norm: float
    """Norm of what it adds to the step's gradient, before clipping; router losses left out."""
    largest: float
    """Largest magnitude that a mixer or ffn gives for it."""
    largest_at: str
    """Which one."""


@dataclass
class Insight:
    """What `look` saw."""

    numbers: range = range(0)
    """The step's sample numbers."""
    length: int = 0
    """Tokens of its rows."""
    rows: list[RowFigures] = field(default_factory=list)
    kinds: dict[str, float] = field(default_factory=dict)
    """Norm of the step's gradient by kind of layer."""
    parts: dict[str, float] = field(default_factory=dict)
    """The same by part of the model: input, each block's mixer, ffn and norms, head."""
    activations: dict[str, tuple[float, int]] = field(default_factory=dict)
    """By mixer and ffn: the largest magnitude of what it gives, and the row of the step."""

    def look(self, lit: LitLM) -> None:
        """Called with the step's gradient in place; leaves it, the weights and the run's figures alone."""
        gradients = list(lit.engine.gradients())
        self.kinds = gradient_norms(gradients, parameter_kinds(lit), cut=False)
        names = part_names(lit)
        norms = gradient_norms(gradients, names, cut=False)
        self.parts = {part: norms[part] for part in dict.fromkeys(names.values()) if part in norms}
        parameters = [p for p in lit.model.parameters() if p.requires_grad]
        shares = lit.shares()  # all the rows, as there is one process
        self.numbers = range(lit.state.rows + shares[0].start, lit.state.rows + shares[-1].stop)
        train, self.length = lit.text.train, lit.lengths.at(lit.state.tokens)
        whole = [cut(train.batch([number]), self.length) for number in self.numbers]
        batches = [one for batch in whole for one in apart(batch)]
        total = max(1, sum(int((b.labels != -100).sum()) for b in batches))
        for index, batch in enumerate(batches):
            labels = int((batch.labels != -100).sum())
            with _largest(lit) as found:
                out = lit.run_model(batch)
            assert out.loss_sum is not None
            loss = float(out.loss_sum.detach())
            made = torch.autograd.grad(out.loss_sum, parameters, allow_unused=True)
            squares = [g.double().square().sum() for g in made if g is not None]
            norm = float(torch.stack(squares).sum().sqrt()) / total if squares else 0.0
            for name, value in found.items():
                self._keep(name, float(value), index)
            largest = {name: float(value) for name, value in found.items()}
            at = max(largest, key=lambda name: _rank(largest[name]))
            source, number = row_of(train, batch.sample_ids[0])
            begin, mean = index * self.length % train.seq_len, loss / max(labels, 1)
            row = RowFigures(index, source, number, begin, labels, mean, norm, largest[at], at)
            self.rows.append(row)

    def worst(self, count: int) -> list[RowFigures]:
        """The rows with the largest losses; what is not finite comes first."""
        return sorted(self.rows, key=lambda row: (-_rank(row.loss), row.index))[:count]

    def _keep(self, name: str, value: float, index: int) -> None:
        if name not in self.activations or _rank(value) > _rank(self.activations[name][0]):
            self.activations[name] = (value, index)


def part_names(lit: LitLM) -> dict[str, str]:
    """The part of the model that each parameter counts under: `3 M mixer mamba2`, `3 M norms`, `head`."""
    names: dict[str, str] = {}
    for name, _ in lit.model.named_parameters():
        words = name.split(".")
        names[name] = words[0]
        if words[0] == "blocks":
            block = lit.model.names[int(words[1])]
            layer = getattr(lit.config.model.blocks[block], words[2], None)
            part = f"{words[2]} {kind_of(layer)}" if layer is not None else "norms"
            names[name] = f"block {words[1]} ({block}) {part}"
    return names


def _rank(value: float) -> float:
    """For sorting: NaN above everything."""
    return value if math.isfinite(value) else math.inf


@contextmanager
def _largest(lit: LitLM) -> Iterator[dict[str, Tensor]]:
    """The largest magnitude that each mixer and ffn gives in the forward passes of the body."""
    found: dict[str, Tensor] = {}
    handles = []
    for i, block in enumerate(lit.model.blocks):
        for part in ("mixer", "ffn"):
            layer = getattr(block, part)
            if isinstance(layer, nn.Module):
                name = f"block {i} ({lit.model.names[i]}) {part}"

                def keep(
                    module: nn.Module, args: object, out: tuple[Tensor, object], name: str = name
                ) -> None:
                    found[name] = out[0].detach().abs().amax()

                handles.append(layer.register_forward_hook(keep))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()

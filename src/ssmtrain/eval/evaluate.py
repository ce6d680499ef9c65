"""The one loop that scores a model on rows: training's validation and `ssmtrain eval` both call it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from ssmtrain.data.mixture import Ordered
from ssmtrain.layers.base import Context


@dataclass(frozen=True)
class Score:
    """A model's loss over some labels."""

    loss_sum: float
    """Cross-entropy in nats, summed."""
    labels: int
    """Number of labels."""
    sets: dict[str, Score] = field(default_factory=dict)
    """Of the texts that were scored one by one, by name; empty for one text."""

    @classmethod
    def of(cls, sets: dict[str, Score]) -> Score:
        """The score of several texts together."""
        return cls(sum(one.loss_sum for one in sets.values()), sum(one.labels for one in sets.values()), sets)

    @property
    def loss(self) -> float:
        """Nats a label."""
        return self.loss_sum / max(self.labels, 1)

    @property
    def perplexity(self) -> float:
        """exp of the loss."""
        return math.exp(min(self.loss, 700.0))

    def bits_per_byte(self, tokens: int, n_bytes: int) -> float:
        """Bits a byte of the text, for a text of `tokens` tokens and `n_bytes` bytes."""
        return self.loss / math.log(2.0) * tokens / max(n_bytes, 1)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    rows: Ordered,
    device: torch.device,
    batch_rows: int = 8,
    bf16: bool = False,
    max_rows: int | None = None,
    rank: int = 0,
    world: int = 1,
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
    together: bool = False,
) -> Score:
    """Score rows in file order, each once; rank r of `world` takes every world-th batch.

    `reduce` sums a tensor over the ranks; `together` says that no rank can run the model without the others:
    one that has no batch left runs the last again, for nothing. The model is put in evaluation mode and left
    as it was found.
    """
    total = rows.per_epoch if max_rows is None else min(rows.per_epoch, max(1, max_rows))
    starts = range(0, total, batch_rows)
    sums = torch.zeros(2, dtype=torch.float64)
    was = model.training
    model.eval()
    rounds = -(-len(starts) // world) if together else -(-(len(starts) - rank) // world)
    for i in range(rank, rank + rounds * world, world):
        start = starts[min(i, len(starts) - 1)]
        batch = rows.batch_rows(range(start, min(start + batch_rows, total))).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            out = model(batch.inputs, batch.labels, Context(doc_ids=batch.doc_ids, n_docs=batch.n_docs))
        if i < len(starts):
            sums += torch.stack([out.loss_sum.double(), out.n_labels.double()]).cpu()
    model.train(was)
    loss, labels = reduce(sums.to(device) if world > 1 else sums).tolist()
    return Score(loss, int(labels))

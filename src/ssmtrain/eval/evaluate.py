"""The one loop that scores a model on rows: training's validation and `ssmtrain eval` both call it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ssmtrain.data.mixture import Ordered
from ssmtrain.layers.base import Context


@dataclass(frozen=True)
class Score:
    """A model's loss over some labels, and how many of them it would have said."""

    loss_sum: float
    """Cross-entropy in nats, summed."""
    labels: int
    """Number of labels."""
    right: int | None = None
    """Labels that were the likeliest id; None when not counted."""
    rows: int = 0
    """Rows that had a label, where right ones were counted."""
    rows_right: int = 0
    """Rows of which every label was right."""
    sets: dict[str, Score] = field(default_factory=dict)
    """Of the texts that were scored one by one, by name; empty for one text."""

    @classmethod
    def of(cls, sets: dict[str, Score]) -> Score:
        """The score of several texts together."""
        parts = list(sets.values())
        counted = [one.right for one in parts if one.right is not None]
        return cls(
            sum(one.loss_sum for one in parts),
            sum(one.labels for one in parts),
            sum(counted) if len(counted) == len(parts) else None,
            sum(one.rows for one in parts),
            sum(one.rows_right for one in parts),
            sets,
        )

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

    def accuracies(self) -> dict[str, float]:
        """Shares of the labels, and of the rows as a whole, that were right; empty when not counted."""
        if self.right is None:
            return {}
        rows = self.rows_right / max(self.rows, 1)
        return {"accuracy": self.right / max(self.labels, 1), "row_accuracy": rows}


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
    reduce: Callable[[Tensor], Tensor] = lambda x: x,
    together: bool = False,
    answers: bool = False,
) -> Score:
    """Score rows in file order, each once; rank r of `world` takes every world-th batch.

    `reduce` sums a tensor over the ranks; `together` says that no rank can run the model without the others:
    one that has no batch left runs the last again, for nothing. `answers` counts right ones. The model is put
    in evaluation mode and left as it was found.
    """
    total = rows.per_epoch if max_rows is None else min(rows.per_epoch, max(1, max_rows))
    starts = range(0, total, batch_rows)
    sums = torch.zeros(5, dtype=torch.float64)
    was = model.training
    model.eval()
    rounds = -(-len(starts) // world) if together else -(-(len(starts) - rank) // world)
    for i in range(rank, rank + rounds * world, world):
        start = starts[min(i, len(starts) - 1)]
        batch = rows.batch_rows(range(start, min(start + batch_rows, total))).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            ctx = Context(doc_ids=batch.doc_ids, n_docs=batch.n_docs)
            # Only then another call: what wraps the model's forward pass need not know of answers.
            out = model(batch.inputs, batch.labels, ctx, **({"answers": True} if answers else {}))
        if i < len(starts):
            counts = [out.loss_sum.double(), out.n_labels.double()]
            counts += right(out.answers, batch.labels) if answers else [torch.zeros(3, device=device)]
            sums += torch.cat([count.reshape(-1) for count in counts]).cpu()
    model.train(was)
    loss, labels, hits, counted, whole = reduce(sums.to(device) if world > 1 else sums).tolist()
    if not answers:
        return Score(loss, int(labels))
    return Score(loss, int(labels), int(hits), int(counted), int(whole))


def right(answers: Tensor, labels: Tensor) -> list[Tensor]:
    """Right answers (n,) to labels (B, L), rows with a label, and rows all right; float64 () each."""
    asked = labels != -100  # (B, L)
    hits = torch.zeros_like(asked)
    hits[asked] = answers == labels[asked]
    with_labels = asked.any(1)  # (B,)
    whole = with_labels & (hits == asked).all(1)  # (B,)
    return [hits.sum().double(), with_labels.sum().double(), whole.sum().double()]

"""Multi-query associative recall (Arora et al. 2023, "Zoology", arXiv 2312.04927, figure 2)."""

from __future__ import annotations

import numpy as np

from ssmtrain.config.tasks import Mqar
from ssmtrain.data.pack import IGNORE
from ssmtrain.data.tasks.draws import Draws


def mqar(task: Mqar, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """Rows and labels, int64 (B, L) each.

    A row is key value key value …, then slots of two tokens: in n_pairs of them stands one of the keys, whose
    label is its value. Keys of a row differ, and so do values; keys are ids 1 … V/2 - 1, values V/2 … V - 1.
    """
    n, L, half = task.n_pairs, task.seq_len, task.vocab_size // 2
    keys = 1 + draws.distinct(half - 1, n)  # (B, n)
    values = half + draws.distinct(task.vocab_size - half, n)  # (B, n)
    slots = (L - 2 * n) // 2
    at = 2 * n + 2 * draws.places(np.arange(1.0, slots + 1) ** (task.power - 1.0), n)  # (B, n)
    tokens = np.zeros((len(keys), L), np.int64)
    if task.filler == "random":
        tokens[:] = draws.below(task.vocab_size, L)
    tokens[:, 0 : 2 * n : 2], tokens[:, 1 : 2 * n : 2] = keys, values
    np.put_along_axis(tokens, at, keys, axis=1)
    labels = np.full_like(tokens, IGNORE)
    np.put_along_axis(labels, at, values, axis=1)
    return tokens, labels

"""Parity, and sums modulo other numbers (Grazzi et al. 2024, arXiv 2411.12537; Mamba-3, arXiv 2603.15569)."""

from __future__ import annotations

import numpy as np

from ssmtrain.config.tasks import Parity
from ssmtrain.data.pack import IGNORE
from ssmtrain.data.tasks.draws import Draws


def parity(task: Parity, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """Rows and labels, int64 (B, L) each.

    A row is n random numbers 0 … V - 1, n between min_len and L, and zeros to its end; the label of the n-th
    (or of each of them) is the sum so far modulo V.
    """
    L = task.seq_len
    n = task.min_len + draws.below(L - task.min_len + 1, 1)  # (B, 1)
    at = np.arange(L)  # (L,)
    tokens = np.where(at < n, draws.below(task.vocab_size, L), 0)  # (B, L)
    asked = at == n - 1 if task.asked == "last" else at < n  # (B, L)
    labels = np.where(asked, np.cumsum(tokens, axis=1) % task.vocab_size, IGNORE)
    return tokens, labels

"""Induction heads (Olsson et al. 2022; as a task for state space models: Dao et al. 2022, Gu & Dao 2023)."""

from __future__ import annotations

import numpy as np

from ssmtrain.config.tasks import Induction
from ssmtrain.data.pack import IGNORE
from ssmtrain.data.tasks.draws import Draws

MARKER = 0


def induction(task: Induction, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """Rows and labels, int64 (B, L) each.

    A row is random tokens 1 … V - 1; at one place before its last two tokens stands the marker, and at its
    end the marker again, whose label is the token after the first.
    """
    L = task.seq_len
    at = draws.below(L - 2, 1)  # (B, 1)
    tokens = 1 + draws.below(task.vocab_size - 1, L)  # (B, L)
    np.put_along_axis(tokens, at, MARKER, axis=1)
    tokens[:, -1] = MARKER
    labels = np.full_like(tokens, IGNORE)
    labels[:, -1:] = np.take_along_axis(tokens, at + 1, axis=1)
    return tokens, labels

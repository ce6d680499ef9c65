"""Selective copying (Gu & Dao 2023, section 4.1.1; Jing et al. 2019 for the copying that it hardens)."""

from __future__ import annotations

import numpy as np

from ssmtrain.config.tasks import SelectiveCopy
from ssmtrain.data.pack import IGNORE
from ssmtrain.data.tasks.draws import Draws


def selective_copy(task: SelectiveCopy, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """Rows and labels, int64 (B, L) each.

    The last n_tokens of a row are marks, V - 1; before them tokens 1 … V - 2 stand at n_tokens random places
    among blanks, and are the marks' labels in their order.
    """
    n, room = task.n_tokens, task.seq_len - task.n_tokens
    at = np.sort(draws.distinct(room, n), axis=1)  # (B, n)
    wanted = 1 + draws.below(task.vocab_size - 2, n)  # (B, n)
    tokens = np.zeros((len(at), task.seq_len), np.int64)
    np.put_along_axis(tokens, at, wanted, axis=1)
    tokens[:, room:] = task.vocab_size - 1
    labels = np.full_like(tokens, IGNORE)
    labels[:, room:] = wanted
    return tokens, labels

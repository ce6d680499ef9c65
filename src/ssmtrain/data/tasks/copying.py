"""Copying a string (Jelassi et al. 2024, "Repeat After Me", arXiv 2402.01032)."""

from __future__ import annotations

import numpy as np

from ssmtrain.config.tasks import Copy
from ssmtrain.data.pack import IGNORE
from ssmtrain.data.tasks.draws import Draws

END, BEGIN, AGAIN, LETTERS = range(4)


def copying(task: Copy, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """Rows and labels, int64 (B, L) each.

    A row is BEGIN, a string, AGAIN, the string, and END to its end. From AGAIN on the labels are the string's
    letters and END: what a model that writes has to write.
    """
    L, longest = task.seq_len, (task.seq_len - 2) // 2
    n = task.min_len + draws.below(longest - task.min_len + 1, 1)  # (B, 1)
    letters = LETTERS + draws.below(task.vocab_size - LETTERS, longest)  # (B, longest)
    at = np.arange(L)  # (L,)
    first = np.take_along_axis(letters, np.clip(at - 1, 0, longest - 1)[None], axis=1)  # (B, L)
    second = np.take_along_axis(letters, np.clip(at - n - 2, 0, longest - 1), axis=1)  # (B, L)
    tokens = np.select(
        [at == 0, at <= n, at == n + 1, at <= 2 * n + 1], [BEGIN, first, AGAIN, second], END
    ).astype(np.int64)
    labels = np.full_like(tokens, IGNORE)
    following = np.append(tokens[:, 1:], np.full((len(tokens), 1), END), axis=1)  # (B, L)
    asked = (at > n) & (at <= 2 * n + 1)  # (B, L)
    labels[asked] = following[asked]
    return tokens, labels

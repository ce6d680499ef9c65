"""Where the documents of a batch begin and end, looked up by block of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Places = tuple[Tensor, Tensor, Tensor]
"""Places in a block of tokens: token within the block, row, and the document found there."""


@dataclass(frozen=True)
class Documents:
    """Row, first token and last token of each document."""

    rows: list[int]
    first: list[int]
    last: list[int]

    @staticmethod
    def find(doc_ids: Tensor | None, n_docs: int | None, batch: int, length: int) -> Documents:
        """Read doc_ids (B, L), numbered row-major; None means one document per row.

        Raises ValueError when the number of documents is not n_docs.
        """
        if doc_ids is None:
            return Documents(list(range(batch)), [0] * batch, [length - 1] * batch)
        ids = doc_ids.cpu()
        new = torch.ones(batch, length, dtype=torch.bool)
        new[:, 1:] = ids[:, 1:] != ids[:, :-1]
        rows, first = (axis.tolist() for axis in new.nonzero(as_tuple=True))
        if n_docs != len(rows):
            raise ValueError(f"n_docs is {n_docs}, but doc_ids {(batch, length)} hold {len(rows)} documents")
        after = [*first[1:], 0]
        return Documents(rows, first, [(end or length) - 1 for end in after])

    def places(
        self, tokens: list[int], block: int, n_blocks: int, device: torch.device
    ) -> list[Places | None]:
        """Sort `tokens` (self.first or self.last) into blocks of `block` tokens: one entry per block."""
        found: list[list[tuple[int, int, int]]] = [[] for _ in range(n_blocks)]
        for doc, (row, token) in enumerate(zip(self.rows, tokens)):
            found[token // block].append((token % block, row, doc))
        return [_indices(entries, device) if entries else None for entries in found]


def _indices(entries: list[tuple[int, int, int]], device: torch.device) -> Places:
    token, row, doc = torch.tensor(entries, device=device).unbind(1)
    return token, row, doc

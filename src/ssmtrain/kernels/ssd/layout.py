"""Chunks that never hold two documents.

Each document is cut into chunks of its own and its last chunk is padded, so that the chunked scan never meets a
boundary inside a chunk: states restart only between chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Where tokens lie among the chunks of a row, and which document each chunk belongs to."""

    source: Tensor
    """(B * c * Q,) flat index of the token (over B * L) in each place; a place of padding repeats token 0."""
    target: Tensor
    """(B * L,) flat index of each token's place."""
    valid: Tensor
    """(B, c, Q) whether a place holds a token."""
    restart: Tensor
    """(B, c) whether a chunk is the first of its document."""
    document: Tensor
    """(B, c) the document of a chunk; padding chunks say 0."""
    last: Tensor
    """(n_docs,) flat index over B * c of each document's last chunk."""


def document_chunks(doc_ids: Tensor, n_docs: int, chunk_size: int) -> Layout:
    """Lay out rows of documents, doc_ids (B, L), in chunks of chunk_size tokens."""
    batch, length = doc_ids.shape
    device = doc_ids.device
    doc_ids = doc_ids.long()
    time = torch.arange(length, device=device).expand(batch, length)
    first = torch.ones_like(doc_ids, dtype=torch.bool)
    first[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
    offset = time - torch.where(first, time, 0).cummax(1).values  # (B, L) since the document's first token
    chunk = (offset % chunk_size == 0).cumsum(1) - 1  # (B, L)
    n_chunks = int(chunk.max()) + 1
    row = torch.arange(batch, device=device)[:, None]
    flat_chunk = row * n_chunks + chunk
    target = (flat_chunk * chunk_size + offset % chunk_size).flatten()
    places = batch * n_chunks * chunk_size
    source = torch.zeros(places, dtype=torch.long, device=device)
    source[target] = torch.arange(batch * length, device=device)
    valid = torch.zeros(places, dtype=torch.bool, device=device)
    valid[target] = True
    head = source.view(-1, chunk_size)[:, 0]  # the token that opens each chunk
    used = valid.view(-1, chunk_size)[:, 0]
    restart = first.flatten()[head] & used
    document = torch.where(used, doc_ids.flatten()[head], 0)
    last = torch.zeros(n_docs, dtype=torch.long, device=device)
    last.scatter_reduce_(0, doc_ids.flatten(), flat_chunk.flatten(), "amax")
    shape = (batch, n_chunks)
    return Layout(
        source, target, valid.view(*shape, chunk_size), restart.view(shape), document.view(shape), last
    )


class _Move(torch.autograd.Function):
    """Rows of a (T, F) tensor in another order; the way back is an index too, not a scatter."""

    @staticmethod
    def forward(rows: Tensor, index: Tensor, inverse: Tensor, keep: Tensor | None) -> Tensor:
        """Take rows[index]."""
        return rows.index_select(0, index)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        """Keep the way back."""
        _, _, inverse, keep = inputs
        ctx.save_for_backward(inverse, keep)

    @staticmethod
    def backward(ctx, grad):
        """Take grad[inverse]; places that hold no token of the input give zero."""
        inverse, keep = ctx.saved_tensors
        out = grad.index_select(0, inverse)
        return (out if keep is None else out * keep[:, None]), None, None, None


def to_chunks(tokens: Tensor, layout: Layout) -> Tensor:
    """Move tokens (B, L, ...) to their places (B, c * Q, ...); padding repeats a token and must be masked."""
    flat = tokens.reshape(tokens.shape[0] * tokens.shape[1], -1)
    moved = _Move.apply(flat, layout.source, layout.target, None)
    return moved.view(tokens.shape[0], -1, *tokens.shape[2:])


def to_tokens(places: Tensor, layout: Layout, length: int) -> Tensor:
    """Move places (B, c * Q, ...) back to tokens (B, L, ...)."""
    flat = places.reshape(places.shape[0] * places.shape[1], -1)
    moved = _Move.apply(flat, layout.target, layout.source, layout.valid.flatten())
    return moved.view(places.shape[0], length, *places.shape[2:])

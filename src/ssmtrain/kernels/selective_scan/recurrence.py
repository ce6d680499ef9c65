"""The recurrence h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = C_t h_t, forward and backward.

Time runs outermost: a block holds the decays and states of a few tokens as (T, B, N, E), channels innermost,
so that one step over all rows and channels is one fused multiply-add on contiguous memory, in place. Blocks
are small enough to stay in the cache. Only the state between blocks is kept for the backward pass, which
recomputes each block and sweeps it in reverse. Every exponent is dt_t A <= 0: no cumulative difference is ever formed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Index = tuple[Tensor, Tensor, Tensor]
"""Places in a block: token, row, and the document found there."""


@dataclass(frozen=True)
class Documents:
    """Where each document begins and ends: row, first and last token, each a list over documents."""

    rows: list[int]
    first: list[int]
    last: list[int]

    @staticmethod
    def find(doc_ids: Tensor | None, n_docs: int | None, batch: int, length: int) -> Documents:
        """Read doc_ids (B, L), numbered row-major; None means one document per row."""
        if doc_ids is None:
            return Documents(list(range(batch)), [0] * batch, [length - 1] * batch)
        new = torch.ones(batch, length, dtype=torch.bool)
        ids = doc_ids.cpu()
        new[:, 1:] = ids[:, 1:] != ids[:, :-1]
        rows, first = (axis.tolist() for axis in new.nonzero(as_tuple=True))
        if n_docs is not None and n_docs != len(rows):
            raise ValueError(f"n_docs is {n_docs}, but doc_ids {tuple(ids.shape)} hold {len(rows)} documents")
        after = [*first[1:], 0]
        return Documents(rows, first, [(end or length) - 1 for end in after])

    def places(self, tokens: list[int], t0: int, t1: int, device: torch.device) -> Index | None:
        """Return those of `tokens` (self.first or self.last) that lie in [t0, t1), or None."""
        found = [(t - t0, self.rows[k], k) for k, t in enumerate(tokens) if t0 <= t < t1]
        if not found:
            return None
        token, row, doc = torch.tensor(found, device=device).unbind(1)
        return token, row, doc


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    start: Tensor | None,
    docs: Documents,
    want_final: bool,
) -> tuple[Tensor, Tensor | None]:
    """Scan x, dt (B, L, E) with A (N, E), B, C (B, L, N), start (n_docs, N, E) -> y (B, L, E), final state.

    All tensors share one dtype, fp32 or float64; differentiable in every one of them.
    """
    y, final = _Scan.apply(x, dt, A, B, C, start, docs)
    return y, final if want_final else None


def block_tokens(batch: int, n: int, channels: int) -> int:
    """Tokens per block: as many as keep a (T, B, N, E) tensor at about 2^17 elements, between 8 and 64."""
    return max(8, min(64, 2**17 // (batch * n * channels)))


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        start: Tensor | None,
        docs: Documents,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            sweep = _Sweep(x, dt, A, B, C, start, docs)
            y, final, carried = sweep.forward()
        ctx.docs = docs
        ctx.save_for_backward(x, dt, A, B, C, start, carried)
        return y, final

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, start, carried = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            grads = _Sweep(x, dt, A, B, C, start, ctx.docs).backward(carried, dy, dfinal)
        return (*grads, None)


class _Sweep:
    """The inputs of one scan and the block buffers that its passes share."""

    def __init__(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, start: Tensor | None, docs: Documents
    ) -> None:
        self.x, self.dt, self.A, self.B, self.C, self.start, self.docs = (
            x,
            dt,
            A.contiguous(),
            B,
            C,
            start,
            docs,
        )
        batch, self.length, channels = x.shape
        n = A.shape[0]
        self.tokens = block_tokens(batch, n, channels)
        self.blocks = [(t, min(t + self.tokens, self.length)) for t in range(0, self.length, self.tokens)]
        self.decay = x.new_empty(self.tokens, batch, n, channels)
        self.state = torch.empty_like(self.decay)
        # Rows begin at zero by themselves; only later documents and given states need a reset.
        self.resets = start is not None or any(docs.first)

    def at(self, tensor: Tensor, t0: int, t1: int) -> Tensor:
        """Tokens [t0, t1) of a (B, L, ...) tensor with time first: (T, B, ...)."""
        return tensor[:, t0:t1].transpose(0, 1)

    def advance(self, t0: int, t1: int, before: Tensor) -> tuple[Tensor, Tensor, Index | None, Tensor | None]:
        """Compute decays and states (T, B, N, E) of a block from the state before it (B, N, E).

        Where documents start, the decay is replaced by 0, so that nothing crosses; their places and true
        decays (k, N, E) are returned beside.
        """
        dt = self.at(self.dt, t0, t1)  # (T, B, E)
        decay, state = self.decay[: t1 - t0], self.state[: t1 - t0]
        torch.mul(dt.unsqueeze(2), self.A, out=decay).exp_()
        torch.mul(
            (dt * self.at(self.x, t0, t1)).unsqueeze(2), self.at(self.B, t0, t1).unsqueeze(3), out=state
        )
        places = self.docs.places(self.docs.first, t0, t1, dt.device) if self.resets else None
        entry = None
        if places is not None:
            token, row, doc = places
            entry = decay[token, row]
            decay[token, row] = 0.0
            if self.start is not None:
                state[token, row] += entry * self.start[doc]
        for decay_t, state_t in zip(decay.unbind(0), state.unbind(0)):
            state_t.addcmul_(decay_t, before)
            before = state_t
        return decay, state, places, entry

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return y (B, L, E), final states (n_docs, N, E) and the state before each block (blocks, B, N, E)."""
        batch, _, channels = self.x.shape
        n = self.A.shape[0]
        y = torch.empty_like(self.x, memory_format=torch.contiguous_format)
        final = self.x.new_empty(len(self.docs.rows), n, channels)
        carried = self.x.new_zeros(len(self.blocks) + 1, batch, n, channels)
        for i, (t0, t1) in enumerate(self.blocks):
            _, state, _, _ = self.advance(t0, t1, carried[i])
            carried[i + 1] = state[-1]
            read = self.at(self.C, t0, t1).reshape(-1, 1, n) @ state.reshape(-1, n, channels)  # (TB, 1, E)
            self.at(y, t0, t1).copy_(read.view(t1 - t0, batch, channels))
            ends = self.docs.places(self.docs.last, t0, t1, y.device)
            if ends is not None:
                final[ends[2]] = state[ends[0], ends[1]]
        return y, final, carried[:-1]

    def backward(self, carried: Tensor, dy: Tensor, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, dt, A, B, C and start."""
        batch, _, channels = self.x.shape
        n = self.A.shape[0]
        dx, ddt = (torch.empty_like(self.x, memory_format=torch.contiguous_format) for _ in range(2))
        dA = torch.zeros_like(self.A)
        dB, dC = (torch.empty_like(self.B, memory_format=torch.contiguous_format) for _ in range(2))
        dstart = None if self.start is None else torch.empty_like(self.start)
        grad_buffer = torch.empty_like(self.decay)
        later = torch.zeros_like(self.decay[0])
        for i, (t0, t1) in reversed(list(enumerate(self.blocks))):
            decay, state, places, entry = self.advance(t0, t1, carried[i])
            dt, x, dy_t = (self.at(tensor, t0, t1) for tensor in (self.dt, self.x, dy))  # (T, B, E)
            grad = grad_buffer[: t1 - t0]  # gradient of the states (T, B, N, E)
            torch.mul(dy_t.unsqueeze(2), self.at(self.C, t0, t1).unsqueeze(3), out=grad)
            ends = None if dfinal is None else self.docs.places(self.docs.last, t0, t1, dy.device)
            if ends is not None and dfinal is not None:
                grad[ends[0], ends[1]] += dfinal[ends[2]]
            later = _reverse(decay, grad, later)
            flat = grad.view(-1, n, channels)
            through = self.at(self.B, t0, t1).reshape(-1, 1, n) @ flat  # (TB, 1, E), gradient of dt x
            through = through.view(t1 - t0, batch, channels)
            torch.mul(through, dt, out=self.at(dx, t0, t1))
            self.at(dB, t0, t1).copy_((flat @ (dt * x).reshape(-1, channels, 1)).view(t1 - t0, batch, n))
            self.at(dC, t0, t1).copy_(
                (state.view(-1, n, channels) @ dy_t.reshape(-1, channels, 1)).view(t1 - t0, batch, n)
            )
            if places is not None and entry is not None and dstart is not None:
                entry = entry * grad[places[0], places[1]]  # gradient of the starting states (k, N, E)
                dstart[places[2]] = entry
            # From the gradient of the states to that of the exponents dt A: times decay, times state before.
            grad.mul_(decay)
            grad[1:].mul_(state[:-1])
            grad[0].mul_(carried[i])
            if places is not None and entry is not None and self.start is not None:
                grad[places[0], places[1]] = entry * self.start[places[2]]
            dA += torch.mul(grad, dt.unsqueeze(2), out=decay).sum((0, 1))
            torch.mul(through, x, out=self.at(ddt, t0, t1)).add_(torch.mul(grad, self.A, out=decay).sum(2))
        return dx, ddt, dA, dB, dC, dstart


def _reverse(decay: Tensor, grad: Tensor, later: Tensor) -> Tensor:
    """Sweep a block backwards in place, grad_t += decay_{t+1} grad_{t+1}; returns what goes further back."""
    grad[-1] += later
    after = None
    for decay_t, grad_t in zip(reversed(decay.unbind(0)), reversed(grad.unbind(0))):
        if after is not None:
            grad_t.addcmul_(*after)
        after = (decay_t, grad_t)
    return decay[0] * grad[0]

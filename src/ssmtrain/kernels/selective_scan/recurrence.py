"""The recurrence h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = C_t h_t, forward and backward.

Time runs outermost: a block holds the decays and states of a few tokens as (T, B, N, E), channels innermost,
so that one token of all rows and channels is one fused multiply-add on contiguous memory, in place. Blocks
are small enough to stay in the cache. Only the states between blocks are kept for the backward pass, which
recomputes each block and sweeps it in reverse. Every exponent is dt_t A <= 0: no cumulative sum or
difference is ever formed, so nothing can overflow and nothing is lost over long documents.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssmtrain.kernels.selective_scan.documents import Documents, Places


def scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, start: Tensor | None, docs: Documents
) -> tuple[Tensor, Tensor]:
    """Scan x, dt (B, L, E) with A (N, E), B, C (B, L, N), start (n_docs, N, E) -> y (B, L, E), final states.

    All tensors share one dtype, fp32 or float64; differentiable, once, in every one of them.
    """
    return _Scan.apply(x, dt, A, B, C, start, docs)


def block_tokens(batch: int, n: int, channels: int, device: torch.device) -> int:
    """Tokens per block: on the CPU (T, B, N, E) tensors then have about 2^17 elements."""
    if device.type != "cpu":
        return 64
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
        y, final, carried = _Sweep(x, dt, A, B, C, start, docs).forward()
        ctx.docs = docs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, dt, A, B, C, start, carried)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, start, carried = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else dy
        with torch.autocast(x.device.type, enabled=False):
            grads = _Sweep(x, dt, A, B, C, start, ctx.docs).backward(carried, dy, dfinal)
        return (*grads, None)


class _Sweep:
    """The inputs of one scan, cut into blocks, and the buffers that all blocks use in turn."""

    def __init__(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, start: Tensor | None, docs: Documents
    ) -> None:
        self.x, self.dt, self.A, self.B, self.C, self.start = x, dt, A.contiguous(), B, C, start
        batch, length, channels = x.shape
        n = A.shape[0]
        tokens = block_tokens(batch, n, channels, x.device)
        self.blocks = [(t, min(t + tokens, length)) for t in range(0, length, tokens)]
        self.decay = x.new_empty(tokens, batch, n, channels)
        self.state = torch.empty_like(self.decay)
        self.n_docs = len(docs.rows)
        self.lasts = docs.places(docs.last, tokens, len(self.blocks), x.device)
        self.firsts: list[Places | None] = [None] * len(self.blocks)
        # Rows begin at zero by themselves: only given states and further documents need a reset.
        if start is not None or any(docs.first):
            self.firsts = docs.places(docs.first, tokens, len(self.blocks), x.device)

    def advance(self, i: int, before: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compute the decays and states (T, B, N, E) of block i from the state before it (B, N, E).

        Where documents start, the decay is set to 0, so that nothing crosses; the true ones (k, N, E), which
        apply to their starting states, are returned third.
        """
        t0, t1 = self.blocks[i]
        dt, x, B = (_time_first(tensor, t0, t1) for tensor in (self.dt, self.x, self.B))
        decay, state = self.decay[: t1 - t0], self.state[: t1 - t0]
        torch.mul(dt.unsqueeze(2), self.A, out=decay).exp_()
        torch.mul((dt * x).unsqueeze(2), B.unsqueeze(3), out=state)
        entry = None
        if (firsts := self.firsts[i]) is not None:
            token, row, doc = firsts
            entry = decay[token, row]
            decay[token, row] = 0.0
            if self.start is not None:
                state[token, row] += entry * self.start[doc]
        for decay_t, state_t in zip(decay.unbind(0), state.unbind(0)):
            state_t.addcmul_(decay_t, before)
            before = state_t
        return decay, state, entry

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return y (B, L, E), final states (n_docs, N, E) and the states before blocks (blocks, B, N, E)."""
        n, channels = self.A.shape
        y = torch.empty_like(self.x, memory_format=torch.contiguous_format)
        final = self.x.new_empty(self.n_docs, n, channels)
        carried = self.x.new_zeros(len(self.blocks) + 1, self.x.shape[0], n, channels)
        for i, (t0, t1) in enumerate(self.blocks):
            _, state, _ = self.advance(i, carried[i])
            carried[i + 1] = state[-1]
            C = _time_first(self.C, t0, t1)  # (T, B, N)
            _time_first(y, t0, t1).copy_((C.unsqueeze(2) @ state).squeeze(2))  # (T, B, E)
            if (lasts := self.lasts[i]) is not None:
                token, row, doc = lasts
                final[doc] = state[token, row]
        return y, final, carried[:-1]

    def backward(self, carried: Tensor, dy: Tensor, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, dt, A, B, C and start."""
        dx, ddt = (torch.empty_like(self.x, memory_format=torch.contiguous_format) for _ in range(2))
        dB, dC = (torch.empty_like(self.B, memory_format=torch.contiguous_format) for _ in range(2))
        dA = torch.zeros_like(self.A)
        dstart = None if self.start is None else torch.empty_like(self.start)
        buffer = torch.empty_like(self.decay)
        later = torch.zeros_like(self.decay[0])
        for i in reversed(range(len(self.blocks))):
            t0, t1 = self.blocks[i]
            decay, state, entry = self.advance(i, carried[i])
            inputs = (self.x, self.dt, self.B, self.C, dy)
            x, dt, B, C, dy_i = (_time_first(tensor, t0, t1) for tensor in inputs)
            grad = buffer[: t1 - t0]  # of the states (T, B, N, E)
            torch.mul(dy_i.unsqueeze(2), C.unsqueeze(3), out=grad)
            if dfinal is not None and (lasts := self.lasts[i]) is not None:
                grad[lasts[0], lasts[1]] += dfinal[lasts[2]]
            later = _reverse(decay, grad, later)
            _time_first(dC, t0, t1).copy_((state @ dy_i.unsqueeze(3)).squeeze(3))
            _time_first(dB, t0, t1).copy_((grad @ (dt * x).unsqueeze(3)).squeeze(3))
            through = (B.unsqueeze(2) @ grad).squeeze(2)  # of dt x (T, B, E)
            torch.mul(through, dt, out=_time_first(dx, t0, t1))
            self._to_exponents(i, grad, decay, state, carried[i], entry, dstart)
            dA += torch.mul(grad, dt.unsqueeze(2), out=decay).sum((0, 1))
            torch.mul(grad, self.A, out=decay)
            _time_first(ddt, t0, t1).copy_(decay.sum(2)).addcmul_(through, x)
        return dx, ddt, dA, dB, dC, dstart

    def _to_exponents(
        self,
        i: int,
        grad: Tensor,
        decay: Tensor,
        state: Tensor,
        before: Tensor,
        entry: Tensor | None,
        dstart: Tensor | None,
    ) -> None:
        """Turn grad, of block i's states, into that of its exponents dt A, and fill in dstart on the way."""
        firsts = self.firsts[i]
        entered = None
        if firsts is not None and entry is not None and dstart is not None:
            entered = entry * grad[firsts[0], firsts[1]]  # (k, N, E)
            dstart[firsts[2]] = entered
        # d exp(dt A) h / d (dt A) = exp(dt A) h, with h the state one token before.
        grad.mul_(decay)
        grad[1:].mul_(state[:-1])
        grad[0].mul_(before)
        if firsts is not None and entered is not None and self.start is not None:
            grad[firsts[0], firsts[1]] = entered * self.start[firsts[2]]


def _time_first(tensor: Tensor, t0: int, t1: int) -> Tensor:
    """View tokens [t0, t1) of (B, L, ...) as (T, B, ...)."""
    return tensor[:, t0:t1].transpose(0, 1)


def _reverse(decay: Tensor, grad: Tensor, later: Tensor) -> Tensor:
    """Sweep a block backwards in place, grad_t += decay_{t+1} grad_{t+1}; returns what goes further back."""
    grad[-1] += later
    decays, grads = decay.unbind(0), grad.unbind(0)
    for t in range(len(grads) - 2, -1, -1):
        grads[t].addcmul_(decays[t + 1], grads[t + 1])
    return decays[0] * grads[0]

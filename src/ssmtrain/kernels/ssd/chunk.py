"""One block of the chunked scan, forward and backward: a few rows, one chunk of each.

Layouts, R rows: per head (R, G, H/G, Q, .) for products inside the chunk, per group (R, G, Q, .) for
products with B ("keys") and C ("queries"), which are never repeated to heads. States are (R, G, H/G * P,
N).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssmtrain.kernels.scratch import Scratch
from ssmtrain.kernels.ssd.blocks import Block


class Tokens(NamedTuple):
    """What a scan reads of its tokens, or the gradients of that."""

    x: Tensor
    """(B, G, L, H/G, P)"""
    steps: Tensor
    """(B, G, H/G, L)"""
    logs: Tensor
    """(B, G, H/G, L) log decays, steps times A"""
    keys: Tensor
    """(B, G, L, N)"""
    queries: Tensor
    """(B, G, L, N)"""

    def at(self, block: Block) -> Tokens:
        """View a block's part."""
        rows, time = block.rows, block.time
        long, short = (rows, slice(None), time), (rows, slice(None), slice(None), time)
        return Tokens(self.x[long], self.steps[short], self.logs[short], self.keys[long], self.queries[long])


def floor(dtype: torch.dtype) -> float:
    """Return the log decay at which a decay is as good as 0.

    exp(-70) = 4e-31 vanishes beside any fp32 sum it enters, while smaller decays would soon be subnormal
    numbers, with which a processor is tens of times slower. Sums of log decays stay small, hence exact.
    """
    return -700.0 if dtype == torch.float64 else -70.0


class Chunk:
    """A block's tokens and what their steps say about decay."""

    def __init__(self, here: Tokens, D: Tensor | None, buffer: Scratch) -> None:
        self.here, self.D, self.buffer = here, D, buffer
        self.rows, self.groups, self.q, self.per_group, self.p = here.x.shape
        self.keys, self.queries = here.keys.flatten(0, 1), here.queries.flatten(0, 1)  # (R * G, Q, N)
        total = here.logs.cumsum(-1)  # (R, G, H/G, Q)
        self.total = total
        lowest = floor(total.dtype)
        self.since = total.clamp(min=lowest).exp_()  # decay from the chunk's start through each token
        self.rest = (total[..., -1:] - total).clamp_(min=lowest).exp_()  # from each token to the chunk's end
        self.weight = here.steps * self.rest
        self.through = self.since[..., -1:]  # (R, G, H/G, 1)

    def outputs(self, state: Tensor, out: Tensor) -> None:
        """Write y (R, G, Q, H/G, P): from the chunk's own inputs, D x, and the state that enters."""
        decay = self.decay()
        mix = self.mix(decay, decay)
        torch.bmm(mix, self.heads("sources", self.here.x), out=self.flat_heads("outputs"))
        torch.bmm(self.queries, state.flatten(0, 1).transpose(1, 2), out=self.flat_tokens("readers"))
        inside, seen = self.by_head("outputs").transpose(2, 3), self.by_token("readers")
        torch.addcmul(inside, seen, _per_token(self.since), out=out)

    def take_in(self, state: Tensor, after: Tensor) -> None:
        """Write the state that leaves, from the one that enters and the chunk's inputs."""
        split = (self.rows, self.groups, self.per_group, -1)
        torch.mul(state.view(split), self.through, out=after.view(split))
        after.flatten(0, 1).baddbmm_(self.fed().transpose(1, 2), self.keys)

    def back(
        self,
        state: Tensor,
        grad_state: Tensor,
        grad_out: Tensor,
        grads: Tokens,
        grad_D: Tensor | None,
        sums: Tensor,
    ) -> None:
        """Pull grad_out (R, G, Q, H/G, P) and grad_state back.

        grad_state, of the state that leaves, becomes that of `state`, which enters. The gradients of the
        block's tokens are written to grads, that of D (H,) is added to grad_D. sums: what `spans` returns.
        """
        grad_keys, grad_queries, from_start, to_end, over_chunk = self._back_states(
            state, grad_state, grad_out
        )
        own, later, reach = self._back_pairs(grad_out, grad_keys, grad_queries, grad_D)
        inside, grad_fed = self.by_head("outputs").transpose(2, 3), self.by_token("grad fed")
        torch.addcmul(inside, grad_fed, _per_token(self.weight), out=grads.x)
        grads.keys.copy_(grad_keys.view(grads.keys.shape))
        grads.queries.copy_(grad_queries.view(grads.queries.shape))
        grads.steps.copy_(own.add_(later).addcmul_(self.rest, to_end))
        # The decay at token k lies between every source before k and every reader from k on.
        readers, sources = sums[:, : self.q, : self.q]
        spans = reach.add_(from_start) @ readers
        grads.logs.copy_(spans.add_(to_end.mul_(self.weight) @ sources).add_(over_chunk))

    def _back_states(
        self, state: Tensor, grad_state: Tensor, grad_out: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Go back through the states.

        Returns, by that way, the gradients of keys and queries (R * G, Q, N), each reader's share in the
        gradient of the log decay since the chunk's start, the gradient of each token's weight (both (R, G,
        H/G, Q)), and that of the log decay of the whole chunk (R, G, H/G, 1). Leaves the gradient of `fed`
        in its buffer.
        """
        states, grads = state.flatten(0, 1), grad_state.flatten(0, 1)  # (R * G, H/G * P, N)
        split = (self.rows, self.groups, self.per_group, -1)
        heard, flat = self.by_token("readers"), self.flat_tokens("readers")
        torch.mul(grad_out, _per_token(self.since), out=heard)
        grad_queries = torch.bmm(flat, states)
        grad_keys = torch.bmm(self.fed(), grads)
        torch.bmm(self.keys, grads.transpose(1, 2), out=self.flat_tokens("grad fed"))
        product = torch.mul(grad_state, state, out=self.buffer("pairs", *state.shape))
        over_chunk = product.view(split).sum(-1, keepdim=True).mul_(self.through)
        grad_state.view(split).mul_(self.through)
        grads.baddbmm_(flat.transpose(1, 2), self.queries)
        seen = self.by_token("outputs")
        torch.bmm(self.queries, states.transpose(1, 2), out=self.flat_tokens("outputs"))
        from_start = heard.mul_(seen).sum(-1).transpose(2, 3)
        to_end = torch.mul(self.here.x, self.by_token("grad fed"), out=seen).sum(-1).transpose(2, 3)
        return grad_keys, grad_queries, from_start, to_end, over_chunk

    def _back_pairs(
        self, grad_out: Tensor, grad_keys: Tensor, grad_queries: Tensor, grad_D: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Go back through the pairs of tokens inside the chunk, adding to three gradients.

        Returns, each (R, G, H/G, Q): the gradient of each step by its token's own output and by later ones;
        pairs that a token reads less pairs that it feeds, its own in neither. Leaves the gradient of x in
        "outputs".
        """
        decay = self.decay()
        mix = self.mix(decay, self.square("mix"))
        heads, x = self.heads("readers", grad_out), self.heads("sources", self.here.x)
        torch.bmm(mix.transpose(1, 2), heads, out=self.flat_heads("outputs"))
        torch.bmm(heads, x.transpose(1, 2), out=self.flat_square("pairs"))
        pairs = self.square("pairs")
        if grad_D is not None:
            grad_D += pairs.diagonal(0, 3, 4).sum((0, 3)).flatten()
        shares = torch.mul(pairs.mul_(decay), self.scores, out=self.square("mix"))
        diagonal = shares.diagonal(0, 3, 4)
        own = diagonal.clone()
        diagonal.zero_()
        steps = self.here.steps
        later = shares.sum(3)
        earlier = torch.bmm(self.flat_square("mix"), steps.reshape(-1, self.q, 1)).view(steps.shape)
        grad_scores = pairs.mul_(steps.unsqueeze(3)).sum(2).tril_().flatten(0, 1)  # (R * G, Q, Q)
        grad_queries.baddbmm_(grad_scores, self.keys)
        grad_keys.baddbmm_(grad_scores.transpose(1, 2), self.queries)
        return own, later, earlier.addcmul_(steps, later, value=-1.0)

    def decay(self) -> Tensor:
        """Compute the scores, and the decay from token j to i, 1 above the diagonal (R, G, H/G, Q, Q)."""
        decay = self.square("decay")
        torch.sub(self.total.unsqueeze(-1), self.total.unsqueeze(-2), out=decay)
        # Differences are cut at 0 before the exponential, which would overflow above the diagonal.
        decay.clamp_(floor(decay.dtype), 0.0).exp_()
        scores = self.buffer("scores", self.rows * self.groups, self.q, self.q)
        torch.bmm(self.queries, self.keys.transpose(1, 2), out=scores).tril_()
        self.scores = self.buffer("scores", self.rows, self.groups, 1, self.q, self.q)
        return decay

    def mix(self, decay: Tensor, out: Tensor) -> Tensor:
        """Write to out what maps the chunk's x to its y, D included; returns it as (R * H, Q, Q)."""
        torch.mul(decay, self.scores, out=out).mul_(self.here.steps.unsqueeze(3))
        if self.D is not None:
            out.diagonal(0, 3, 4).add_(self.D.view(self.groups, -1, 1))
        return out.view(-1, self.q, self.q)

    def fed(self) -> Tensor:
        """Compute x times its weight in the leaving state (R * G, Q, H/G * P)."""
        torch.mul(self.here.x, _per_token(self.weight), out=self.by_token("sources"))
        return self.flat_tokens("sources")

    def heads(self, name: str, tokens: Tensor) -> Tensor:
        """Copy tokens (R, G, Q, H/G, P) into the buffer `name`, per head (R * H, Q, P)."""
        self.by_head(name).copy_(tokens.transpose(2, 3))
        return self.flat_heads(name)

    # Views of buffers, few enough for a cache to hold them all: what is done with is overwritten by what
    # comes next, within outputs() and take_in(), and within _back_states() and _back_pairs(). Flat views
    # are what batched matrix products take.
    def square(self, name: str) -> Tensor:
        return self.buffer(name, self.rows, self.groups, self.per_group, self.q, self.q)

    def flat_square(self, name: str) -> Tensor:
        return self.buffer(name, self.rows * self.groups * self.per_group, self.q, self.q)

    def by_head(self, name: str) -> Tensor:
        return self.buffer(name, self.rows, self.groups, self.per_group, self.q, self.p)

    def flat_heads(self, name: str) -> Tensor:
        return self.buffer(name, self.rows * self.groups * self.per_group, self.q, self.p)

    def by_token(self, name: str) -> Tensor:
        return self.buffer(name, self.rows, self.groups, self.q, self.per_group, self.p)

    def flat_tokens(self, name: str) -> Tensor:
        return self.buffer(name, self.rows * self.groups, self.q, self.per_group * self.p)


def _per_token(factors: Tensor) -> Tensor:
    """View (R, G, H/G, Q) as factors of tokens (R, G, Q, H/G, 1)."""
    return factors.transpose(2, 3).unsqueeze(-1)


def spans(q: int, like: Tensor) -> Tensor:
    """Return the matrices that sum, for each token k, the tokens from k on and those before k (2, Q, Q)."""
    from_here = torch.ones(q, q, dtype=like.dtype, device=like.device).tril_()
    return torch.stack([from_here, 1.0 - from_here])

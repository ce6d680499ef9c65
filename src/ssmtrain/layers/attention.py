"""Causal attention with grouped keys and values (GQA); optional rotary positions, window, query-key norm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ssmtrain.kernels.attention import Mask, attention, attention_mask
from ssmtrain.layers.base import Context, Mixer, MixerConfig, State, StateBytes
from ssmtrain.layers.linear import Linear
from ssmtrain.layers.norm import RMSNorm
from ssmtrain.layers.rope import rotate, tables

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]


class AttentionConfig(MixerConfig):
    """Causal softmax attention."""

    kind: Literal["attention"] = "attention"
    n_heads: Positive
    """Query heads."""
    n_kv_heads: Positive | None = None
    """Key and value heads, each shared by n_heads / n_kv_heads query heads; absent: n_heads."""
    head_dim: Positive | None = None
    """Features of a head; absent: d_model / n_heads."""
    position: Literal["none", "rope"] = "none"
    """Positions: none (Granite 4, Jamba), or rotary, restarting at 0 in each document."""
    rope_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of each head's features that are rotated."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary wavelengths."""
    window: Positive | None = None
    """Each token sees itself and the window - 1 tokens before it; absent: the whole document."""
    qk_norm: bool = False
    """RMSNorm on each head's query and key, before rotation."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of the query and key norms."""
    scale: PositiveFloat | None = None
    """Multiplies the scores (Granite's attention_multiplier); absent: 1 / sqrt(head_dim)."""
    bias: bool = False
    """Whether the projections have biases."""

    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.n_kv_heads or self.n_heads

    def dim(self, d_model: int) -> int:
        """Features of a head."""
        return self.head_dim or d_model // self.n_heads

    def rotary_dim(self, d_model: int) -> int:
        """Rotated features of a head."""
        return round(self.dim(d_model) * self.rope_fraction) if self.position == "rope" else 0

    def build(self, d_model: int) -> Attention:
        """Make the module; parameters are left unwritten."""
        return Attention(self, d_model)

    def check(self, d_model: int) -> Iterable[tuple[str, str]]:
        """Yield (field, what is wrong and what would be right)."""
        fields = type(self).model_fields
        if self.head_dim is None and d_model % self.n_heads:
            yield "n_heads", f"must divide d_model = {d_model}, or set head_dim"
        if self.n_heads % self.kv_heads():
            yield "n_kv_heads", f"must divide n_heads = {self.n_heads}"
        if self.position == "rope" and (self.rotary_dim(d_model) % 2 or not self.rotary_dim(d_model)):
            yield "rope_fraction", f"must rotate an even share of head_dim = {self.dim(d_model)}"
        for name in ("rope_fraction", "rope_theta"):
            if self.position == "none" and getattr(self, name) != fields[name].default:
                yield name, "has no effect without positions: set position to rope or leave it out"
        if not self.qk_norm and self.norm_eps != fields["norm_eps"].default:
            yield "norm_eps", "has no effect without query and key norms: set qk_norm to true or leave it out"

    def num_params(self, d_model: int) -> int:
        """Parameters of the module."""
        q, kv = self.n_heads * self.dim(d_model), self.kv_heads() * self.dim(d_model)
        biases = self.bias * (q + 2 * kv + d_model)
        return d_model * (2 * q + 2 * kv) + biases + self.qk_norm * 2 * self.dim(d_model)

    def flops(self, d_model: int, seq_len: int) -> int:
        """Forward FLOPs per token: projections, and scores and values over the average number of keys.

        A full causal document has L/2 keys per token on average; a window w < L has w - w^2 / (2 L).
        """
        q, kv = self.n_heads * self.dim(d_model), self.kv_heads() * self.dim(d_model)
        w = min(self.window or seq_len, seq_len)
        return 2 * d_model * (2 * q + 2 * kv) + 2 * q * (2 * w * seq_len - w * w) // seq_len

    def state_bytes(self, d_model: int, sessions: int, context: int) -> StateBytes:
        """Bytes of keys and values (bf16), of the window's tokens at most."""
        tokens = min(self.window or context, context)
        return StateBytes(kv=2 * sessions * tokens * self.kv_heads() * self.dim(d_model) * 2)


class Attention(Mixer):
    """out(softmax(scale * q k^T) v), causal within each document.

    The state holds keys (rotated) and values, (B, S, Hkv, hd) each. The token at position p of its document
    sits in slot p mod S: S is the window once that is full, so that its ring always holds the newest tokens.
    """

    def __init__(self, config: AttentionConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.dim(d_model)
        self.rotary_dim = config.rotary_dim(d_model)
        q, kv = config.n_heads * self.head_dim, config.kv_heads() * self.head_dim
        self.q_proj = Linear(d_model, q, bias=config.bias)
        self.k_proj = Linear(d_model, kv, bias=config.bias)
        self.v_proj = Linear(d_model, kv, bias=config.bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.norm_eps)
        self.out_proj = Linear(q, d_model, bias=config.bias, residual=True)

    def project(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, L, Hq, hd), keys and values (B, L, Hkv, hd) of x (B, L, D), normalised and rotated."""
        heads = (-1, self.head_dim)
        q = self.q_proj(x).unflatten(-1, heads)  # (B, L, Hq, hd)
        k = self.k_proj(x).unflatten(-1, heads)  # (B, L, Hkv, hd)
        v = self.v_proj(x).unflatten(-1, heads)  # (B, L, Hkv, hd)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary_dim:
            cos, sin = tables(ctx, x.shape[1], self.rotary_dim, self.config.rope_theta, x.device)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return q, k, v

    def mask(self, ctx: Context, length: int, keys: int, device: torch.device) -> Mask | None:
        """The mask of this batch, made once per context; None where plain causal attention is right."""
        window = self.config.window
        if window is not None and window >= keys:
            window = None
        key = ("attention_mask", window, length, keys)
        if key not in ctx.cache:
            ctx.cache[key] = attention_mask(ctx.doc_ids, window, length, keys, keys - length, device=device)
        return ctx.cache[key]

    def prepare(self, ctx: Context, length: int, device: torch.device) -> None:
        """Make mask and positions."""
        self.mask(ctx, length, length, device)
        if self.rotary_dim:
            tables(ctx, length, self.rotary_dim, self.config.rope_theta, device)

    def forward(self, x: Tensor, ctx: Context, state: State | None = None) -> tuple[Tensor, State | None]:
        """Mix x (B, L, D) within each document; returns y (B, L, D) and, when carrying, the new state.

        Raises ValueError for documents packed in rows together with a carried state.
        """
        if ctx.carry and ctx.doc_ids is not None:
            raise ValueError("attention carries a state over whole rows only: give it one document per row")
        q, k, v = self.project(x, ctx)
        new_state = None
        if ctx.carry:
            capacity = state["k"].shape[1] if state else 0
            if state and ctx.offset:
                k = torch.cat([in_order(state["k"], ctx.offset).to(k.dtype), k], dim=1)  # (B, S, Hkv, hd)
                v = torch.cat([in_order(state["v"], ctx.offset).to(v.dtype), v], dim=1)
            total = ctx.offset + x.shape[1]
            slots = max(capacity, total)
            slots = min(slots, self.config.window or slots)
            dtype = state["k"].dtype if state else k.dtype
            new_state = {"k": in_slots(k, total, slots).to(dtype), "v": in_slots(v, total, slots).to(dtype)}
        y = attention(
            q,
            k,
            v,
            scale=self.config.scale,
            window=self.config.window,
            mask=self.mask(ctx, x.shape[1], k.shape[1], x.device),
            doc_ids=ctx.doc_ids,
            q_offset=k.shape[1] - x.shape[1],
        )  # (B, L, Hq, hd)
        return self.out_proj(y.flatten(-2)), new_state

    def init_state(self, batch: int, max_len: int, dtype: torch.dtype, device: torch.device) -> State:
        """Empty slots (batch, min(window, max_len), Hkv, hd) for keys and values in `dtype`."""
        slots = min(self.config.window or max_len, max_len)
        shape = (batch, slots, self.config.kv_heads(), self.head_dim)
        return {name: torch.zeros(shape, dtype=dtype, device=device) for name in ("k", "v")}

    def step(self, x: Tensor, ctx: Context, state: State) -> Tensor:
        """Mix one token x (B, 1, D) at position ctx.offset, writing its slot; returns y (B, 1, D)."""
        q, k, v = self.project(x, ctx)
        slots = state["k"].shape[1]
        if ctx.offset >= slots and (self.config.window is None or slots < self.config.window):
            # A state that came from a forward pass has no room to spare: double it, up to the window.
            slots = min(self.config.window or 2 * ctx.offset + 1, 2 * ctx.offset + 1)
            for name in ("k", "v"):
                state[name] = in_slots(state[name], ctx.offset, slots)
        slot = ctx.offset % slots
        state["k"][:, slot], state["v"][:, slot] = k[:, 0], v[:, 0]
        # Softmax does not mind the order of the keys, and all slots in use are inside the window.
        used = min(ctx.offset + 1, slots)
        y = attention(
            q,
            state["k"][:, :used].to(q.dtype),
            state["v"][:, :used].to(q.dtype),
            scale=self.config.scale,
            causal=False,
        )  # (B, 1, Hq, hd)
        return self.out_proj(y.flatten(-2))


def in_order(slots: Tensor, total: int) -> Tensor:
    """The tokens that slots (B, S, …) hold after `total` tokens, oldest first: (B, min(S, total), …)."""
    S = slots.shape[1]
    return slots[:, :total] if total <= S else slots.roll(-(total % S), dims=1)


def in_slots(tokens: Tensor, total: int, slots: int) -> Tensor:
    """Put the newest of tokens (B, T, …), whose last is number total - 1, into slots: (B, slots, …)."""
    if total <= slots:
        room = slots - tokens.shape[1]
        return torch.cat([tokens, tokens.new_zeros(tokens.shape[0], room, *tokens.shape[2:])], dim=1)
    return tokens[:, -slots:].roll(total % slots, dims=1)

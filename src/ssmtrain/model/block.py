"""The one block: residual branches around a mixer, an ffn, or both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ssmtrain.config.model import BlockConfig
from ssmtrain.layers.base import Context, Ffn, Mixer, State, Stats
from ssmtrain.layers.norm import RMSNorm, Stream, StreamNorm


class Block(nn.Module):
    """x + m * post(mixer(pre(x))), then the same around the ffn; `norm` says which of pre and post exist."""

    mixer: Mixer | None
    ffn: Ffn | None

    def __init__(self, config: BlockConfig, d_model: int, eps: float, multiplier: float, fp32: bool) -> None:
        super().__init__()
        self.multiplier = multiplier
        self.residual_fp32 = fp32
        self.mixer = None
        self.ffn = None
        for name, layer in (("mixer", config.mixer), ("ffn", config.ffn)):
            if layer is not None:
                module = layer.build(d_model)
                setattr(self, name, module)
                if config.norm != "post":
                    norm = StreamNorm(d_model, eps, keep_fp32=module.reads_fp32, scale=multiplier)
                    setattr(self, f"{name}_norm", norm)
                if config.norm != "pre":
                    # What it gives is added to the stream, not read by a Linear.
                    setattr(self, f"{name}_post_norm", RMSNorm(d_model, eps, keep_fp32=True))
        self.has_pre = config.norm != "post"
        self.has_post = config.norm != "pre"

    def _enter(self, name: str, stream: Stream) -> tuple[Tensor, Tensor]:
        """The stream's sum, and what the branch reads of it."""
        if self.has_pre:
            return getattr(self, f"{name}_norm")(stream, getattr(self, name).entrance)
        x = stream.total(self.multiplier)
        return x, x

    def _leave(self, name: str, x: Tensor, y: Tensor) -> Stream:
        if self.has_post:
            y = getattr(self, f"{name}_post_norm")(y)
        # Under autocast y is bf16 and x fp32: the sum is fp32. Otherwise the stream takes y's dtype.
        return Stream(x if self.residual_fp32 else x.to(y.dtype), y)

    def forward(
        self, stream: Stream, ctx: Context, state: State | None = None
    ) -> tuple[Stream, State | None, Stats]:
        """Map the stream, of parts (B, L, D); returns it, the final state, the router's statistics."""
        stats: Stats = {}
        new_state: State | None = None
        if self.mixer is not None:
            x, h = self._enter("mixer", stream)
            y, new_state = self.mixer(h, ctx, state)  # (B, L, D)
            stream = self._leave("mixer", x, y)
        if self.ffn is not None:
            x, h = self._enter("ffn", stream)
            y, stats = self.ffn(h, ctx)  # (B, L, D)
            stream = self._leave("ffn", x, y)
        return stream, new_state, stats

    def prepare(self, stream: Stream, ctx: Context) -> None:
        """Fill ctx.cache with what a forward pass over this stream reads of it."""
        if self.mixer is not None:
            self.mixer.prepare(ctx, stream.x.shape[1], stream.x.device)

    def step(self, stream: Stream, ctx: Context, state: State | None) -> Stream:
        """Map one token, the stream's parts (B, 1, D), updating the mixer's state in place."""
        if self.mixer is not None:
            assert state is not None, "decoding needs a state: call HybridModel.init_states first"
            x, h = self._enter("mixer", stream)
            stream = self._leave("mixer", x, self.mixer.step(h, ctx, state))
        if self.ffn is not None:
            x, h = self._enter("ffn", stream)
            y, _ = self.ffn(h, ctx)
            stream = self._leave("ffn", x, y)
        return stream

    def init_state(self, batch: int, max_len: int, dtype: torch.dtype, device: Any) -> State | None:
        """Allocate the mixer's decoding state; None for a block without a mixer."""
        if self.mixer is None:
            return None
        return self.mixer.init_state(batch, max_len, dtype, torch.device(device))

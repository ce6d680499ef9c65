"""HybridModel: a token embedding, blocks in the order of the layout, a language-model head."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ssmtrain.config.layout import expand
from ssmtrain.config.model import ModelConfig
from ssmtrain.layers.base import Context, Layer, ParamSpec, State, Stats
from ssmtrain.layers.norm import Stream
from ssmtrain.model.block import Block
from ssmtrain.model.heads import LmHead
from ssmtrain.model.inputs import TokenInput


@dataclass
class Output:
    """What a forward pass returns: sums, so that any split of the batch adds up to the same loss."""

    loss_sum: Tensor | None = None
    """() fp32: cross-entropy in nats summed over valid labels; None without labels."""
    n_labels: Tensor | None = None
    """() int64: number of valid labels."""
    aux: Tensor | None = None
    """() fp32: router losses, each a mean over the tokens seen; None when no block routes."""
    stats: dict[int, Stats] = field(default_factory=dict)
    """Router statistics by block index, detached."""
    logits: Tensor | None = None
    """(B, L, V) when there were no labels."""
    answers: Tensor | None = None
    """(n,) int64: the likeliest id at each valid label, row by row; None when not asked for."""
    states: list[State | None] | None = None
    """Final states by block, where the context carries states."""


def layout_names(config: ModelConfig) -> list[str]:
    """The block name at each depth."""
    return expand(config.layout, config.n_layers)


class HybridModel(nn.Module):
    """A language model described by a ModelConfig; parameters are left unwritten until init_weights."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.names = layout_names(config)
        d, eps, m = config.d_model, config.norm_eps, config.multipliers
        std = config.init.embedding_std
        self.multiplier = m.residual
        self.input = TokenInput(vocab_size, d, std, m.embedding)
        self.blocks = nn.ModuleList(
            Block(config.blocks[name], d, eps, m.residual, config.residual_fp32) for name in self.names
        )
        self.head = LmHead(vocab_size, d, eps, std, config.tie_embeddings, m.logits)

    def specs(self) -> dict[str, ParamSpec]:
        """How each parameter starts and is treated, by its full name."""
        return {
            f"{prefix}.{name}" if prefix else name: spec
            for prefix, module in self.named_modules()
            if isinstance(module, Layer)
            for name, spec in module.param_specs.items()
        }

    def forward(
        self,
        inputs: Tensor,
        labels: Tensor | None = None,
        ctx: Context | None = None,
        answers: bool = False,
    ) -> Output:
        """Loss sums for inputs and labels (B, L), or logits (B, L, V) without labels.

        With `answers` the likeliest id at each label as well, for which no other logits are made.
        With ctx.states, each block continues from its state and leaves its final state there.
        """
        ctx = ctx or Context()
        stream = Stream(self.input(inputs))  # (B, L, D)
        out = Output()
        for i, block in enumerate(self.blocks):
            stream, state, stats = block(stream, ctx, ctx.states[i] if ctx.states is not None else None)
            if ctx.states is not None:
                ctx.states[i] = state
            if stats:
                aux = stats["aux"] + stats["z"]
                out.aux = aux if out.aux is None else out.aux + aux
                out.stats[i] = {key: value.detach() for key, value in stats.items()}
        x = stream.total(self.multiplier)
        if labels is None:
            out.logits = self.head.logits(x, self.input.weight)  # (B, L, V)
        else:
            out.loss_sum, out.n_labels = self.head.loss(x, labels, self.input.weight)
            if answers:
                out.answers = self.head.answers(x, labels, self.input.weight)
        out.states = ctx.states
        return out

    def init_states(
        self, batch: int, max_len: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> list[State | None]:
        """Allocate empty decoding states for `batch` documents of up to max_len tokens, one per block."""
        return [block.init_state(batch, max_len, dtype, device) for block in self.blocks]  # type: ignore[operator]  # Blocks

    def prefill(self, inputs: Tensor, ctx: Context) -> Tensor:
        """Run inputs (B, L) through the states in ctx; returns the last position's logits (B, V)."""
        assert ctx.states is not None, "prefill needs ctx.states: call init_states first"
        stream = Stream(self.input(inputs))  # (B, L, D)
        for i, block in enumerate(self.blocks):
            stream, ctx.states[i], _ = block(stream, ctx, ctx.states[i])
        ctx.offset += inputs.shape[1]
        x = stream.total(self.multiplier)
        return self.head.logits(x[:, -1], self.input.weight)  # (B, V)

    def step(self, tokens: Tensor, ctx: Context) -> Tensor:
        """Run one token per document (B, 1), updating ctx.states in place; returns logits (B, V)."""
        assert ctx.states is not None, "a step needs ctx.states: call init_states first"
        stream = Stream(self.input(tokens))  # (B, 1, D)
        for block, state in zip(self.blocks, ctx.states):
            stream = block.step(stream, ctx, state)  # type: ignore[operator]  # a Block
        ctx.offset += 1
        x = stream.total(self.multiplier)
        return self.head.logits(x[:, -1], self.input.weight)  # (B, V)

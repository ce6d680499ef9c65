"""Parameters, FLOPs, decoding state and training memory, from the layers' own formulas."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ssmtrain.config.layout import expand
from ssmtrain.config.model import BlockConfig, ModelConfig
from ssmtrain.config.schema import RunConfig
from ssmtrain.layers.base import StateBytes
from ssmtrain.model.hybrid import HybridModel

BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Params:
    """Numbers of parameters."""

    total: int
    active: int
    """Take part in computing one token: of a routed layer's experts only the chosen ones count."""
    embedding: int
    head: int
    """An untied head's projection; 0 when it is the embedding."""


@dataclass(frozen=True)
class Flops:
    """Training FLOPs per token, forward and backward (3 x forward), without recomputation."""

    mixer: int
    ffn: int
    head: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.mixer + self.ffn + self.head


@dataclass(frozen=True)
class TrainingBytes:
    """Estimated bytes on one device while training without sharding."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Counts:
    """Everything that `ssmtrain show` prints about a recipe."""

    layers: int
    layout: str
    params: Params
    flops: Flops
    state: StateBytes
    training: TrainingBytes
    sessions: int
    context: int
    blocks: dict[str, int] = field(default_factory=dict)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in bf16."""
        return self.params.total * BF16

    def as_dict(self) -> dict[str, Any]:
        """The report as plain containers, for --json."""
        return {
            "layers": self.layers,
            "layout": self.layout,
            "blocks": self.blocks,
            "params_total": self.params.total,
            "params_active": self.params.active,
            "params_embedding": self.params.embedding,
            "params_head": self.params.head,
            "flops_per_token": self.flops.total,
            "flops": asdict(self.flops),
            "sessions": self.sessions,
            "context": self.context,
            "kv_bytes": self.state.kv,
            "state_bytes": self.state.conv + self.state.ssm,
            "weight_bytes": self.weight_bytes,
            "training_bytes": {**asdict(self.training), "total": self.training.total},
        }


def block_norms(block: BlockConfig) -> int:
    """RMSNorms in a block."""
    branches = (block.mixer is not None) + (block.ffn is not None)
    return branches * (2 if block.norm == "sandwich" else 1)


def count_params(model: ModelConfig, vocab_size: int) -> Params:
    """Parameters of the model, by formula alone."""
    d = model.d_model
    total = active = d  # the final norm
    for name in expand(model.layout, model.n_layers):
        block = model.blocks[name]
        total += block_norms(block) * d
        active += block_norms(block) * d
        for layer in (block.mixer, block.ffn):
            if layer is not None:
                total += layer.num_params(d)
                active += layer.num_active_params(d)
    embedding = vocab_size * d
    head = 0 if model.tie_embeddings else embedding
    return Params(total + embedding + head, active + embedding + head, embedding, head)


def carried_bytes(model: ModelConfig, slots: int) -> int:
    """Bytes of the states that so many slots carry from row to row; fp32 runs have windows twice as large."""
    blocks = [model.blocks[name] for name in expand(model.layout, model.n_layers)]
    states = [b.mixer.state_bytes(model.d_model, slots, 1) for b in blocks if b.mixer is not None]
    return sum(state.conv + state.ssm for state in states)


def count_flops(model: ModelConfig, vocab_size: int, seq_len: int) -> Flops:
    """Training FLOPs per token in documents of seq_len tokens."""
    mixer = ffn = 0
    for name in expand(model.layout, model.n_layers):
        block = model.blocks[name]
        if block.mixer is not None:
            mixer += block.mixer.flops(model.d_model, seq_len)
        if block.ffn is not None:
            ffn += block.ffn.flops(model.d_model, seq_len)
    return Flops(3 * mixer, 3 * ffn, 3 * 2 * model.d_model * vocab_size)


def count_state(model: ModelConfig, sessions: int, context: int) -> StateBytes:
    """Bytes that decoding `sessions` documents of `context` tokens holds besides the weights."""
    parts = [
        block.mixer.state_bytes(model.d_model, sessions, context)
        for block in (model.blocks[name] for name in expand(model.layout, model.n_layers))
        if block.mixer is not None
    ]
    return StateBytes(*(sum(column) for column in zip(*parts))) if parts else StateBytes()


def build_meta(model: ModelConfig, vocab_size: int) -> HybridModel:
    """The model on the meta device: shapes without storage."""
    with torch.device("meta"):
        return HybridModel(model, vocab_size)


def _kept_width(block: torch.nn.Module, config: BlockConfig) -> int:
    """Elements that a block keeps per token for its backward pass: inputs and outputs of its projections."""
    width = 0
    for name, parameter in block.named_parameters():
        if parameter.ndim == 2 and name.endswith("weight") and ".conv." not in name:
            width += sum(parameter.shape)
        elif parameter.ndim == 3:
            width += getattr(config.ffn, "top_k", 1) * sum(parameter.shape[1:])
    return width


def _forgotten_width(block: torch.nn.Module) -> int:
    """Elements per token that a block makes again for its backward pass, beside the inputs of projections."""
    return sum(len(p) for name, p in block.named_parameters() if name.endswith("conv.weight"))


def count_training(config: RunConfig, built: HybridModel, vocab_size: int) -> TrainingBytes:
    """Estimated bytes of one unsharded training process; activations are for one micro-batch."""
    total = sum(p.numel() for p in built.parameters())
    hidden = sum(p.numel() for n, p in built.named_parameters() if p.ndim == 2 and n.startswith("blocks."))
    # AdamW keeps two fp32 moments; Muon keeps one, for hidden matrices; a moving average is one more.
    moments = 2 * total - (hidden if config.optim.kind == "muon" else 0)
    moments += total if config.ema is not None else 0
    rows = config.trainer.micro_rows or max(
        1, config.trainer.global_batch // (config.data.seq_len * (config.trainer.devices or 1))
    )
    tokens, unit = rows * config.data.seq_len, BF16 if config.trainer.precision == "bf16" else FP32
    stream = FP32 if config.model.residual_fp32 else unit
    widths = [_kept_width(b, config.model.blocks[n]) for b, n in zip(built.blocks, built.names)]
    stored = len(widths) * config.model.d_model * stream
    if config.trainer.recompute == "block":
        per_token = stored + max(widths, default=0) * unit
    else:
        per_token = 2 * stored + sum(widths) * unit
        if config.trainer.recompute == "none":
            per_token += unit * sum(_forgotten_width(block) for block in built.blocks)
    # The loss works through chunks of at most 2^24 logits.
    loss = min(tokens * vocab_size, 2**24) * FP32
    return TrainingBytes(total * FP32, total * FP32, moments * FP32, tokens * per_token + loss)


def count(config: RunConfig, vocab_size: int) -> Counts:
    """Count a recipe: parameters from the module built on meta, the rest from the layers' formulas.

    Raises RuntimeError if the formulas and the module disagree.
    """
    model = config.model
    built = build_meta(model, vocab_size)
    params = count_params(model, vocab_size)
    total = sum(p.numel() for p in built.parameters())
    if total != params.total:
        raise RuntimeError(f"the layers' formulas give {params.total:,} parameters, the model has {total:,}")
    names = built.names
    return Counts(
        layers=len(names),
        layout=model.layout,
        params=params,
        flops=count_flops(model, vocab_size, config.data.seq_len),
        state=count_state(model, config.show.sessions, config.show.context),
        training=count_training(config, built, vocab_size),
        sessions=config.show.sessions,
        context=config.show.context,
        blocks={name: names.count(name) for name in dict.fromkeys(names)},
    )

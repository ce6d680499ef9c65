"""What a layer kind is: its config, its module, its parameters' initialisation, its costs and its state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ssmtrain.config.base import Config

Draw = Callable[[tuple[int, ...], torch.Generator], Tensor]
"""Draws a full fp32 CPU tensor of a shape from a generator."""

State = dict[str, Tensor]
"""What a mixer carries from one piece of a document to the next, one entry per document on the first axis."""


class StateBytes(NamedTuple):
    """Bytes that a mixer holds while decoding, over all sessions."""

    kv: int = 0
    """Keys and values, bf16."""
    conv: int = 0
    """Convolution windows, bf16."""
    ssm: int = 0
    """SSM states, fp32."""


@dataclass(frozen=True)
class ParamSpec:
    """How one parameter starts and how the optimiser treats it."""

    init: Draw
    decay: bool = True
    """False: never weight-decayed."""
    fp32: bool = False
    """True: stays fp32 whatever precision the run computes in."""
    residual: bool = False
    """True: output projection of a residual branch, divided by sqrt(number of branches) at initialisation."""
    plain: bool = False
    """True: an ordinary projection, whose draw `model.init.std` replaces where a recipe sets it."""


class Layer(nn.Module):
    """An nn.Module whose own parameters each carry a ParamSpec under their name."""

    reads_fp32: ClassVar[bool] = False
    """Whether it computes with its input in fp32 even under autocast, so that a norm must not round it."""

    def __init__(self) -> None:
        super().__init__()
        self.param_specs: dict[str, ParamSpec] = {}

    @property
    def entrance(self) -> Layer | None:
        """The Linear that alone reads what the layer is given, where there is one."""
        return None

    def declare(self, name: str, shape: tuple[int, ...], spec: ParamSpec) -> None:
        """Register a parameter of this shape, left unwritten until the model is initialised."""
        self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=torch.float32)))
        self.param_specs[name] = spec


@dataclass
class Context:
    """What all layers of one forward pass share: documents, positions, masks, carried states."""

    doc_ids: Tensor | None = None
    """(B, L) int32, numbered 0 to n_docs - 1 row-major over the batch; None: one document per row."""
    n_docs: int | None = None
    """Number of documents in the batch, a host integer; None when doc_ids is None."""
    states: list[State | None] | None = None
    """One entry per block; None when no state is carried. Blocks read theirs and replace it."""
    offset: int = 0
    """Tokens of each row that the states already hold (the same for every row)."""
    cache: dict[Any, Any] = field(default_factory=dict)
    """Masks and positions built once per batch, keyed by what they depend on."""

    @property
    def carry(self) -> bool:
        """Whether mixers take and return states."""
        return self.states is not None


class LayerConfig(Config):
    """Base of every kind's config: besides the fields, the kind's own formulas."""

    def build(self, d_model: int) -> Layer:
        """Make the module for this model width; parameters are left unwritten."""
        raise NotImplementedError

    def check(self, d_model: int) -> Iterable[tuple[str, str]]:
        """Yield (field, what is wrong and what would be right) for settings that do not fit this width."""
        return ()

    def num_params(self, d_model: int) -> int:
        """Parameters of the module."""
        raise NotImplementedError

    def num_active_params(self, d_model: int) -> int:
        """Parameters that take part in computing one token."""
        return self.num_params(d_model)

    def flops(self, d_model: int, seq_len: int) -> int:
        """Algorithmic forward FLOPs per token in a document of seq_len tokens (2 per multiply-add)."""
        raise NotImplementedError


class MixerConfig(LayerConfig):
    """A kind that mixes over time."""

    causal: ClassVar[bool] = True
    """Whether output t depends on inputs up to t only."""

    def state_bytes(self, d_model: int, sessions: int, context: int) -> StateBytes:
        """Bytes of decoding state for `sessions` documents of `context` tokens."""
        raise NotImplementedError


class FfnConfig(LayerConfig):
    """A kind that mixes over channels."""

    mixes_rows: ClassVar[bool] = False
    """Whether training-time routing looks at the whole batch."""


class Mixer(Layer):
    """A module that mixes over time."""

    def forward(self, x: Tensor, ctx: Context, state: State | None = None) -> tuple[Tensor, State | None]:
        """Mix x (B, L, D) within each document; returns y (B, L, D) and, when ctx.carry, the final state.

        `state` (documents on the first axis) continues each document; None starts from nothing. The state
        returned is a new one: the function is differentiable through it.
        """
        raise NotImplementedError

    def prepare(self, ctx: Context, length: int, device: torch.device) -> None:
        """Fill ctx.cache with all that a forward pass over rows of `length` tokens reads of it.

        For a forward pass that a compiler traces or that runs twice: what it changes outside would count.
        """

    def init_state(self, batch: int, max_len: int, dtype: torch.dtype, device: torch.device) -> State:
        """Allocate an empty decoding state for `batch` documents of up to `max_len` tokens."""
        raise NotImplementedError

    def step(self, x: Tensor, ctx: Context, state: State) -> Tensor:
        """Mix one token x (B, 1, D), updating the state in place; returns y (B, 1, D)."""
        raise NotImplementedError

    def step_sizes(self, x: Tensor, ctx: Context) -> Tensor | None:
        """Step sizes dt (B, L, channels) that the layer takes on x (B, L, D), fp32, for health figures."""
        return None


Stats = dict[str, Tensor]
"""What a router reports: `aux` and `z` losses (scalars), `load` (experts,): tokens sent to each expert."""


class Ffn(Layer):
    """A module that mixes over channels."""

    def forward(self, x: Tensor, ctx: Context) -> tuple[Tensor, Stats]:
        """Mix x (B, L, D) over channels; returns y (B, L, D) and the router's statistics (empty if none)."""
        raise NotImplementedError

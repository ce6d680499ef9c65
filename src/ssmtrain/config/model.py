"""The model page: blocks, layout, multipliers and initial weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Union

from pydantic import Field

from ssmtrain.config.base import Config, Positive, PositiveFloat
from ssmtrain.layers import ffn_kinds, mixer_kinds
from ssmtrain.layers.base import FfnConfig, MixerConfig

if TYPE_CHECKING:
    AnyMixer = MixerConfig
    AnyFfn = FfnConfig
else:
    AnyMixer = Annotated[Union[tuple(mixer_kinds().values())], Field(discriminator="kind")]  # noqa: UP007
    AnyFfn = Annotated[Union[tuple(ffn_kinds().values())], Field(discriminator="kind")]  # noqa: UP007


class BlockConfig(Config):
    """One block: a mixer, an ffn, or both, each a residual branch with its norm."""

    mixer: AnyMixer | None = None
    """The layer that mixes over time; absent: the block has an ffn only."""
    ffn: AnyFfn | None = None
    """The layer that mixes over channels; absent: the block has a mixer only."""
    norm: Literal["pre", "post", "sandwich"] = "pre"
    """Where a branch's norm sits: before it, after it, or both."""


class MultipliersConfig(Config):
    """Scalars of maximal-update-style models such as Granite 4; attention's is the `scale` of its kind."""

    embedding: PositiveFloat = 1.0
    """Multiplies the embedding's output."""
    residual: PositiveFloat = 1.0
    """Multiplies each branch's output before it is added to the residual stream."""
    logits: PositiveFloat = 1.0
    """Multiplies the logits (Granite's logits_scaling is the inverse)."""


class InitConfig(Config):
    """How the model's weights start; each kind draws its own special parameters (A, dt) itself."""

    embedding_std: PositiveFloat = 0.02
    """Standard deviation of the embedding and of an untied head."""
    std: PositiveFloat | None = None
    """Standard deviation of every projection; absent: torch's default for linear maps, as Mamba has it."""
    rescale_residual: bool = True
    """Divide the output projections of residual branches by sqrt(number of branches in the model)."""


class ModelConfig(Config):
    """A language model: token embedding, blocks in the order of the layout, norm and head."""

    d_model: Positive
    """Width of the residual stream."""
    layout: str
    """Which block stands at each depth: a formula over the names in `blocks`, such as M5AM4."""
    blocks: dict[str, BlockConfig]
    """The named blocks: one capital letter, optionally one small letter (M, A, Sw)."""
    n_layers: Positive | None = None
    """Depth to which the formula is tiled; absent: the formula's own length."""
    vocab_size: Positive | None = None
    """Rows of the embedding; at least the tokenizer's size, which is the default."""
    tie_embeddings: bool = True
    """Use the embedding's weight as the head's."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of the RMSNorms of blocks and head."""
    residual_fp32: bool = True
    """Keep the residual stream in fp32 under bf16 autocast."""
    multipliers: MultipliersConfig = MultipliersConfig()
    """Scalars on embedding, residual branches and logits."""
    init: InitConfig = InitConfig()
    """How the weights start."""

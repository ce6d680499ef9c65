"""The optimiser pages."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ssmtrain.config.base import Config, Positive, PositiveFloat

Betas = tuple[Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]]


class AdamWConfig(Config):
    """AdamW (Loshchilov & Hutter 2019) with decay only where it belongs."""

    kind: Literal["adamw"] = "adamw"
    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    betas: Annotated[Betas, Field(strict=False)] = (0.9, 0.95)
    """Decay rates of the two moment estimates."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    """Decoupled weight decay of matrices; A_log, D, dt_bias, norms and biases are never decayed."""
    decay_embeddings: bool = False
    """Whether the embedding (and a tied head) is decayed too."""
    clip: PositiveFloat | None = 1.0
    """Largest norm of the whole gradient; absent (null): no clipping."""


class MuonConfig(Config):
    """Muon (torch.optim.Muon) for two-dimensional hidden matrices, AdamW for everything else."""

    kind: Literal["muon"] = "muon"
    lr: PositiveFloat = 1e-3
    """Peak learning rate of both; Muon's update is scaled to AdamW's root mean square."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    """Muon's momentum."""
    nesterov: bool = True
    """Whether Muon's momentum is Nesterov's."""
    ns_steps: Positive = 5
    """Newton-Schulz iterations."""
    betas: Annotated[Betas, Field(strict=False)] = (0.9, 0.95)
    """AdamW's decay rates."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    """Decoupled weight decay of matrices."""
    decay_embeddings: bool = False
    """Whether the embedding (and a tied head) is decayed too."""
    clip: PositiveFloat | None = 1.0
    """Largest norm of the whole gradient; absent (null): no clipping."""


AnyOptim = Annotated[AdamWConfig | MuonConfig, Field(discriminator="kind")]

"""The pages of places that metrics go to."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ssmtrain.config.base import Config


class NoLogger(Config):
    """metrics.jsonl and the console only."""

    kind: Literal["none"] = "none"


class WandbLogger(Config):
    """Weights & Biases, beside metrics.jsonl; the key comes from its own login or WANDB_API_KEY."""

    kind: Literal["wandb"] = "wandb"
    project: str = "ssmtrain"
    """Project."""
    entity: str | None = None
    """Team or user; absent: the account's default."""
    mode: Literal["online", "offline"] = "online"
    """offline keeps everything in the run folder until `wandb sync`."""


class TensorBoardLogger(Config):
    """TensorBoard event files in the run folder (extra `tensorboard`)."""

    kind: Literal["tensorboard"] = "tensorboard"


AnyLogger = Annotated[NoLogger | WandbLogger | TensorBoardLogger, Field(discriminator="kind")]

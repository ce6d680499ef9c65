"""The moving average of a run's weights."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ssmtrain.config.base import Config


class EmaConfig(Config):
    """An exponential moving average of the trained parameters, in fp32, saved with every checkpoint."""

    decay: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.999
    """Share of the old average that an update keeps."""
    every: Annotated[int, Field(gt=0)] = 1
    """Steps between updates."""
    start: Annotated[int, Field(ge=0)] = 0
    """Step at which the average begins, as a copy of the weights there."""

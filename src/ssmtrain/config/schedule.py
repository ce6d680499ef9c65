"""The learning-rate schedule pages."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ssmtrain.config.base import Config, Count, Fraction

Span = Annotated[int, Field(ge=0, strict=True)] | Annotated[float, Field(ge=0.0, lt=1.0, strict=True)]
"""A whole number of the schedule's unit, or a fraction (below 1) of the run."""


class _Schedule(Config):
    unit: Literal["steps", "tokens"] = "steps"
    """What whole numbers of this schedule count."""
    warmup: Span = 0.05
    """Length of the linear warm-up: a whole number of units, or a fraction (below 1) of the run."""


class WsdSchedule(_Schedule):
    """Warm-up, stable, decay (Hu et al. 2024): constant, then linear to `floor` at the end."""

    kind: Literal["wsd"] = "wsd"
    decay: Span = 0.2
    """Length of the decay at the end."""
    floor: Fraction = 0.0
    """Learning rate at the end, as a share of the peak."""


class DecaySchedule(_Schedule):
    """The decay branch of a WSD run: from the rate at `start`, where it was forked, down to `floor`."""

    kind: Literal["decay"] = "decay"
    start: Count | None = None
    """Position where the decay begins; absent: the step that `from=` forks at."""
    share: Fraction | None = None
    """Learning rate at `start`, as a share of the peak; absent: what the run forked from had there."""
    shape: Literal["linear", "cosine", "sqrt"] = "linear"
    """A straight line, half a cosine, or 1 - sqrt (Haegele et al. 2024), which falls fastest at first."""
    floor: Fraction = 0.0
    """Learning rate at the end, as a share of the peak."""


class CosineSchedule(_Schedule):
    """Half a cosine from the peak to `floor`."""

    kind: Literal["cosine"] = "cosine"
    floor: Fraction = 0.1
    """Learning rate at the end, as a share of the peak."""


class LinearSchedule(_Schedule):
    """A straight line from the peak to `floor`."""

    kind: Literal["linear"] = "linear"
    floor: Fraction = 0.0
    """Learning rate at the end, as a share of the peak."""


class ConstantSchedule(_Schedule):
    """The peak after the warm-up."""

    kind: Literal["constant"] = "constant"


class PowerSchedule(_Schedule):
    """The power scheduler (Shen et al. 2024): a power of the tokens seen, then an exponential decay."""

    kind: Literal["power"] = "power"
    exponent: Annotated[float, Field(gt=0.0)] = 0.5
    """The rate is peak * (warm-up end / now) ** exponent after the warm-up."""
    decay: Span = 0.1
    """Length of the exponential decay at the end."""
    floor: Annotated[float, Field(gt=0.0, le=1.0)] = 0.01
    """Learning rate at the end, as a share of the rate where the decay starts."""


AnySchedule = Annotated[
    WsdSchedule | DecaySchedule | CosineSchedule | LinearSchedule | ConstantSchedule | PowerSchedule,
    Field(discriminator="kind"),
]

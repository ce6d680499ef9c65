"""Learning-rate schedules: pure functions of where a step begins and ends and of where the run ends.

Positions are counted in the schedule's unit (steps or tokens). The warm-up reads the end of the step, so the
first step moves; the decay reads its beginning, so the last step does too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ssmtrain.config.growth import Staged, batches
from ssmtrain.config.schedule import AnySchedule, DecaySchedule, PowerSchedule, WsdSchedule
from ssmtrain.config.trainer import TrainerConfig


@dataclass(frozen=True)
class Horizon:
    """Where a run ends: the number of steps that the schedule is stretched over, and the tokens of a step."""

    steps: int
    step_tokens: int
    max_tokens: int | None = None
    """A limit in tokens that may stop the run before the horizon."""
    warmup: tuple[tuple[int, int], ...] = ()
    """(until how many tokens, tokens of a step) of the smaller steps before."""

    @property
    def batches(self) -> Staged:
        """Tokens of a step over the run."""
        return Staged(self.step_tokens, self.warmup)

    def reached(self, step: int, tokens: int) -> bool:
        """Whether a run that has done this much is finished."""
        return step >= self.steps or (self.max_tokens is not None and tokens >= self.max_tokens)

    @property
    def last_step(self) -> int:
        """The step after which `reached` turns true."""
        if self.max_tokens is None:
            return self.steps
        return min(self.steps, self.batches.steps_to(self.max_tokens))

    def position(self, step: int, unit: str) -> int:
        """How far a run is after so many steps, in steps or in tokens."""
        return step if unit == "steps" else self.batches.tokens_after(step)

    def left(self, step: int) -> tuple[int, int]:
        """Tokens that a run which has done so many steps has yet to see, and those that it has seen."""
        done, whole = (self.batches.tokens_after(steps) for steps in (step, self.last_step))
        return max(0, whole - done), done


def horizon(trainer: TrainerConfig) -> Horizon:
    """The horizon of a run: max_steps, or max_tokens where max_steps is absent; ValueError without either."""
    grown, steps = batches(trainer), trainer.max_steps
    if steps is None:
        if trainer.max_tokens is None:
            raise ValueError("trainer.max_steps or trainer.max_tokens must be set: the schedule ends there")
        steps = grown.steps_to(trainer.max_tokens)
    return Horizon(steps, grown.final, trainer.max_tokens, grown.stages)


def span(length: int | float, total: int) -> float:
    """A length in units: whole numbers as they are, a float as a fraction of the total."""
    return length * total if isinstance(length, float) else float(length)


def lr_at(schedule: AnySchedule, peak: float, step: int, run: Horizon) -> float:
    """Learning rate of the step that begins after `step` finished steps."""
    return peak * factor_at(schedule, step, run)


def factor_at(schedule: AnySchedule, step: int, run: Horizon) -> float:
    """Share of the peak of the step that begins after `step` finished steps."""
    begin, end, total = (run.position(steps, schedule.unit) for steps in (step, step + 1, run.steps))
    return factor(schedule, begin, end, total)


def factor(schedule: AnySchedule, begin: int, end: int, total: int) -> float:
    """Share of the peak at the step from position `begin` to `end` of a run of `total` units."""
    warmup = span(schedule.warmup, total)
    if schedule.kind == "decay" and begin >= (schedule.start or 0):
        return _branch(schedule, begin, total)
    if end < warmup:
        return end / warmup
    if schedule.kind == "wsd":
        return 1.0 - (1.0 - schedule.floor) * _decayed(schedule, begin, warmup, total)
    if schedule.kind == "power":
        return _power(schedule, begin, end, warmup, total)
    if schedule.kind == "constant" or schedule.kind == "decay":
        return 1.0
    done = min(1.0, max(0.0, begin - warmup) / max(total - warmup, 1.0))
    if schedule.kind == "cosine":
        done = 0.5 * (1.0 - math.cos(math.pi * done))
    return 1.0 - (1.0 - schedule.floor) * done


def _decayed(schedule: WsdSchedule | PowerSchedule, begin: float, warmup: float, total: int) -> float:
    """Share of the final decay that lies before `begin`; the decay never starts inside the warm-up."""
    start = max(total - span(schedule.decay, total), warmup)
    if begin <= start:
        return 0.0
    return min(1.0, (begin - start) / (total - start)) if total > start else 1.0


def _branch(schedule: DecaySchedule, begin: int, total: int) -> float:
    """From the rate at the fork down to the floor, in the shape asked for; without a warm-up."""
    start, top = schedule.start or 0, 1.0 if schedule.share is None else schedule.share
    done = min(1.0, (begin - start) / max(total - start, 1))
    if schedule.shape == "cosine":
        done = 0.5 * (1.0 - math.cos(math.pi * done))
    elif schedule.shape == "sqrt":
        done = math.sqrt(done)
    return top + (min(schedule.floor, top) - top) * done


def _power(schedule: PowerSchedule, begin: int, end: int, warmup: float, total: int) -> float:
    """(warm-up / now) ** exponent, then an exponential decay by `floor` (Shen et al. 2024, section 3)."""
    first = max(warmup, float(end - begin))
    start = max(total - span(schedule.decay, total), first)
    now = min(max(float(end), first), max(start, first))
    return (first / now) ** schedule.exponent * schedule.floor ** _decayed(schedule, begin, warmup, total)

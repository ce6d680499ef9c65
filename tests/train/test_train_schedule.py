"""Schedules against values worked out by hand."""

import itertools
import math

import pytest

from ssmtrain.config.schedule import (
    ConstantSchedule,
    CosineSchedule,
    DecaySchedule,
    LinearSchedule,
    PowerSchedule,
    WsdSchedule,
)
from ssmtrain.config.trainer import TrainerConfig
from ssmtrain.train.schedule import Horizon, factor, horizon, lr_at

RUN = Horizon(steps=100, step_tokens=1000)


def curve(schedule: object, run: Horizon = RUN) -> list[float]:
    return [lr_at(schedule, 1.0, step, run) for step in range(run.steps)]  # type: ignore[arg-type]


def test_warmup_is_linear_and_starts_above_zero() -> None:
    lrs = curve(ConstantSchedule(warmup=10))
    assert lrs[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert lrs[10:] == [1.0] * 90


@pytest.mark.parametrize(
    ("schedule", "golden"),
    [
        (WsdSchedule(warmup=0.1, decay=0.2, floor=0.0), {0: 0.1, 9: 1.0, 80: 1.0, 90: 0.5, 99: 0.05}),
        (WsdSchedule(warmup=0, decay=50, floor=0.5), {0: 1.0, 50: 1.0, 75: 0.75, 99: 0.51}),
        (
            CosineSchedule(warmup=0, floor=0.1),
            {0: 1.0, 50: 0.55, 25: 0.1 + 0.45 * (1 + math.sqrt(0.5))},
        ),
        (LinearSchedule(warmup=20, floor=0.0), {9: 0.5, 20: 1.0, 60: 0.5, 99: 1 / 80}),
        (ConstantSchedule(warmup=0), {0: 1.0, 99: 1.0}),
        (
            PowerSchedule(warmup=4, decay=20, exponent=0.5, floor=0.01),
            {3: 1.0, 15: 0.5, 63: 0.25, 80: math.sqrt(4 / 80), 90: math.sqrt(4 / 80) * 0.1},
        ),
    ],
)
def test_golden_points(schedule: object, golden: dict[int, float]) -> None:
    lrs = curve(schedule)
    for step, expected in golden.items():
        assert lrs[step] == pytest.approx(expected), step


@pytest.mark.parametrize("kind", ["wsd", "cosine", "linear", "constant", "power"])
def test_tokens_and_fractions_and_steps_agree(kind: str) -> None:
    cls = {
        "wsd": WsdSchedule,
        "cosine": CosineSchedule,
        "linear": LinearSchedule,
        "constant": ConstantSchedule,
        "power": PowerSchedule,
    }[kind]
    extra = {"decay": 20} if kind in ("wsd", "power") else {}
    in_steps = curve(cls(warmup=10, **extra))
    in_tokens = curve(cls(unit="tokens", warmup=10_000, **{k: v * 1000 for k, v in extra.items()}))
    in_fractions = curve(cls(warmup=0.1, **({"decay": 0.2} if extra else {})))
    assert in_tokens == pytest.approx(in_steps, rel=1e-12)
    assert in_fractions == pytest.approx(in_steps, rel=1e-12)


def test_every_step_moves_and_none_exceeds_the_peak() -> None:
    for schedule in (WsdSchedule(), CosineSchedule(), PowerSchedule(warmup=0)):
        lrs = curve(schedule)
        assert all(0.0 < lr <= 1.0 for lr in lrs), schedule.kind
    # Past the end (an extended run whose schedule was not) the rate stays at the floor.
    assert factor(WsdSchedule(floor=0.1), 150, 151, 100) == pytest.approx(0.1)


def test_warmup_and_decay_longer_than_the_run() -> None:
    lrs = curve(WsdSchedule(warmup=90, decay=90), Horizon(100, 10))
    assert max(lrs) == 1.0
    assert lrs[95] == pytest.approx(0.5)


def test_horizon_and_limits() -> None:
    run = horizon(TrainerConfig(max_tokens=10_000, global_batch=3_000))
    assert run.steps == run.last_step == 4
    assert not run.reached(3, 9_000)
    assert run.reached(4, 12_000)
    both = horizon(TrainerConfig(max_steps=100, max_tokens=9_000, global_batch=3_000))
    assert both.steps == 100  # the schedule's horizon stays
    assert both.last_step == 3
    assert both.reached(3, 9_000)
    with pytest.raises(ValueError, match=r"max_steps or trainer\.max_tokens"):
        horizon(TrainerConfig())


@pytest.mark.parametrize(
    ("shape", "half"), [("linear", 0.5), ("cosine", 0.5), ("sqrt", 1.0 - math.sqrt(0.5))]
)
def test_the_branch_falls_from_its_share_to_its_floor(shape: str, half: float) -> None:
    branch = DecaySchedule(start=60, share=0.8, shape=shape, floor=0.1, warmup=90)  # type: ignore[arg-type]
    values = curve(branch)
    # The fork was after the warm-up of the run forked from, whatever the fraction of the new length is.
    assert values[60] == pytest.approx(0.8)
    assert values[80] == pytest.approx(0.1 + 0.7 * half)
    assert factor(branch, 100, 101, 100) == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(values[60:]))
    assert values[10] == pytest.approx(11 / 90)
    tokens = DecaySchedule(unit="tokens", start=60_000, share=0.8, shape=shape, floor=0.1)  # type: ignore[arg-type]
    assert curve(tokens)[60:] == pytest.approx(values[60:])

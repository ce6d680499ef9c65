"""Which charts a report has: loss against tokens, time and FLOPs, then whatever else was recorded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ssmtrain.report.gather import Told
from ssmtrain.report.plot import Chart, Point, Series
from ssmtrain.runs.folder import figure

MOST = 40
"""Charts of one report."""

AXES = {"tokens": "tokens", "time": "time", "flops": "training FLOPs"}
"""What the loss is shown against, in words."""

UNITS = (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0))
"""Of time, for runs that took at least two of them; shorter ones have seconds."""

TITLES = {
    "train.lr": ("Learning rate", "learning rate", False),
    "train.grad_norm": ("Norm of the gradient", "norm", True),
    "train.tokens_per_s": ("Speed", "tokens/s", False),
    "train.mfu": ("Share of the peak (MFU)", "share", False),
    "train.memory_gb": ("Memory of the device", "GB", False),
    "train.seq_len": ("Tokens in a row", "tokens", False),
    "train.global_batch": ("Tokens in a step", "tokens", False),
    "train.nonfinite": ("Skipped steps", "steps", False),
}
"""Curve -> title, name of the axis, logarithmic."""

LOSSES = ("loss", "bpb", "perplexity")


@dataclass(frozen=True)
class Section:
    """Charts under one heading."""

    title: str
    charts: list[Chart]


def sections(runs: Sequence[Told]) -> list[Section]:
    """All charts of some runs."""
    found = [
        Section("Loss", _losses(runs)),
        Section("Training", _named(runs)),
        Section("Other scores", _groups(runs, _scores(runs), log=False)),
        Section("Data", _groups(runs, _nested(runs, "train."), log=False)),
        Section("Health of the layers", _groups(runs, _nested(runs, "health."), log=True)),
    ]
    room, cut = MOST, []
    for section in found:
        kept = [chart for chart in section.charts if any(one.points for one in chart.series)][:room]
        room -= len(kept)
        if kept:
            cut.append(Section(section.title, kept))
    return cut


def measure(runs: Sequence[Told]) -> tuple[str, str]:
    """The figure that all runs have, and its name: bits per byte, or the loss."""
    has = all("train.bpb" in run.curves or "val.bpb" in run.curves for run in runs)
    return ("bpb", "bits per byte") if has and runs else ("loss", "loss (nats per token)")


def _losses(runs: Sequence[Told]) -> list[Chart]:
    key, name = measure(runs)
    marks = _marks(runs) if key == "bpb" else {}
    longest = max((run.seconds or 0.0 for run in runs), default=0.0)
    unit, seconds = next((one for one in UNITS if longest >= 2 * one[1]), ("seconds", 1.0))
    charts = []
    for axis, words in AXES.items():
        lines = _loss_lines(runs, key, axis, seconds)
        title = f"{name[0].upper()}{name[1:]} against {words}"
        shown = unit if axis == "time" else words
        charts.append(Chart(f"loss-{axis}", title, shown, name, lines, marks=marks))
    return charts


def _loss_lines(runs: Sequence[Told], key: str, axis: str, unit: float) -> list[Series]:
    found = []
    for number, run in enumerate(runs):
        alone = len(runs) == 1
        lines = [(f"train.{key}", "training", 0), (f"val.{key}", "validation", 1)]
        if alone:
            sets = [one for one in run.curves if re.fullmatch(rf"val\..+\.{key}", one)]
            lines += [
                (one, f"validation: {_middle(one)}", colour) for colour, one in enumerate(sorted(sets), 2)
            ]
        for curve, name, colour in lines:
            points = _points(run, curve, axis, unit)
            if points:
                shown, hue = (name, colour) if alone else (f"{run.run.name}, {name}", number)
                found.append(Series(shown, points, hue, dots=curve.startswith("val.")))
    return found


def _named(runs: Sequence[Told]) -> list[Chart]:
    charts = []
    for curve, (title, name, log) in TITLES.items():
        lines = [
            Series(title if len(runs) == 1 else run.run.name, _points(run, curve, "tokens"), number)
            for number, run in enumerate(runs)
            if curve in run.curves
        ]
        if lines:
            charts.append(Chart(_key(curve), title, AXES["tokens"], name, lines, log))
    return charts


def _scores(runs: Sequence[Told]) -> list[str]:
    """Curves of validations and checks that are not losses of the whole text."""
    names = dict.fromkeys(name for run in runs for name in run.curves if name.startswith(("val.", "check.")))
    plain = {f"val.{key}" for key in LOSSES}
    return [name for name in names if name not in plain and not name.endswith((".perplexity", ".bpb"))]


def _nested(runs: Sequence[Told], kind: str) -> list[str]:
    """Curves of a kind that stand deeper in its records than the figures with a title of their own."""
    names = dict.fromkeys(name for run in runs for name in run.curves if name.startswith(kind))
    return [name for name in names if name.count(".") >= 2]


def _groups(runs: Sequence[Told], names: Sequence[str], log: bool) -> list[Chart]:
    """Of one run a chart for each group of curves, of several a chart for each curve."""
    if len(runs) > 1:
        return [
            Chart(
                _key(name),
                _words(name),
                AXES["tokens"],
                _words(name.rpartition(".")[2]),
                [
                    Series(run.run.name, _points(run, name, "tokens"), number)
                    for number, run in enumerate(runs)
                    if name in run.curves
                ],
                log,
            )
            for name in names
        ]
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_group(name), []).append(name)
    return [
        Chart(
            _key(group),
            _words(group if len(members) > 1 else members[0]),
            AXES["tokens"],
            "",
            [
                Series(_member(name, group), _points(runs[0], name, "tokens"), number)
                for number, name in enumerate(members)
            ],
            log,
        )
        for group, members in groups.items()
    ]


def _group(name: str) -> str:
    """What is shown in one chart: the figures of a layer's kind that are alike, or all of one dictionary."""
    above, _, leaf = name.rpartition(".")
    if name.startswith(("val.", "check.")):
        return f"{name.split('.')[0]}.{leaf}"
    if name.startswith("health.layers."):
        return f"{above}.{leaf.partition('_')[0]}" if not leaf.endswith("clamped") else name
    return above


def _member(name: str, group: str) -> str:
    if name.startswith(("val.", "check.")):
        return _middle(name) or "validation"
    return _words(name.removeprefix(group).lstrip("._")) or _words(name)


def _middle(name: str) -> str:
    """`web` of val.web.bpb."""
    return ", ".join(name.split(".")[1:-1])


def _words(name: str) -> str:
    """A curve's name for people."""
    parts = [part.replace("_", " ") for part in name.split(".") if part not in ("health", "layers", "train")]
    return ", ".join(parts)


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60] or "chart"


def _marks(runs: Sequence[Told]) -> dict[str, float]:
    found = runs[0].report.get("yardsticks") if len(runs) == 1 else None
    items = found.items() if isinstance(found, dict) else ()
    return {str(name)[:20]: value for name, bits in items if (value := figure(bits)) is not None}


def _points(run: Told, curve: str, axis: str, unit: float = 1.0) -> list[Point]:
    """A curve's points over tokens, time in a unit, or FLOPs; none where the axis is not known."""
    if curve not in run.curves:
        return []
    kept = run.curves[curve].points()
    if axis == "time":
        return [(point[2] / unit, point[3]) for point in kept]
    if axis == "flops":
        return [(point[1] * run.flops_per_token, point[3]) for point in kept] if run.flops_per_token else []
    return [(point[1], point[3]) for point in kept]

"""Curves of any length in bounded memory."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path

import pytest

from runs.conftest import MakeRun, train_record
from ssmtrain.report.gather import gather
from ssmtrain.report.thin import Thinned


@pytest.mark.parametrize("count", [0, 1, 2, 9, 10, 11, 20, 21, 1000, 12345])
def test_peaks_ends_and_order_stay(count: int) -> None:
    draw = random.Random(count)
    values = [draw.random() for _ in range(count)]
    if count > 3:
        values[count // 3], values[count // 2] = 9.0, -9.0
    curve = Thinned(10)
    for step, value in enumerate(values):
        curve.add((step, 2.0 * step, 0.5 * step, value))
    points = curve.points()
    assert len(points) <= 22 and curve.count == count
    assert all(
        point == (step, 2.0 * step, 0.5 * step, values[step]) for point in points for step in [int(point[0])]
    )
    assert [point[0] for point in points] == sorted({point[0] for point in points})
    if count:
        assert points[0][0] == 0 and points[-1][0] == count - 1
        found = [point[3] for point in points]
        assert (max(found), min(found)) == (max(values), min(values))
    if count <= 10:
        assert len(points) == count
    # Every bucket has points: none of the curve's stretches is left out.
    assert all(low[0] // curve.width == i for i, (low, _) in enumerate(curve.kept))


def test_a_long_run_is_read_in_little_memory(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssmtrain.report.gather.MOST_CURVES", 20)
    folder = make_run("long")
    line = json.dumps(train_record(7))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(2000):
            file.write(line.replace('"step": 7', f'"step": {step}') + "\n")
        for step in range(100):
            file.write(json.dumps({"kind": "health", "step": step, f"odd{step}": 1.0}) + "\n")
            file.write(json.dumps({"kind": "sample", "step": step, "text": "x" * 90_000}) + "\n")
    size = (folder / "metrics.jsonl").stat().st_size
    tracemalloc.start()
    told = gather(folder, Path("runs"), 100, lambda folder: None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size / 4, (peak, size)
    assert len(told.curves) == 20 and len(told.samples) == 8
    assert told.curves["train.loss"].count == 2000 and len(told.curves["train.loss"].points()) <= 202
    assert all(len(text) <= 4000 for _, text in told.samples)

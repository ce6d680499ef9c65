"""The kernel benchmark's arithmetic, its table and its refusal, without a GPU (scripts/bench_kernels.py)."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, timing on the CPU."""
    monkeypatch.syspath_prepend(SCRIPTS)
    script = importlib.import_module("bench_kernels")
    timing = sys.modules["kernel_timing"]
    properties = SimpleNamespace(L2_cache_size=1 << 20)

    def milliseconds(step):
        start = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - start)

    monkeypatch.setattr(timing, "DEVICE", "cpu")
    monkeypatch.setattr(timing, "milliseconds", milliseconds)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    return script


def small(bench: ModuleType, section: str):
    """The first row of a section at its smaller shape, without peers."""
    row = next(bench.rows(section))
    return dataclasses.replace(row, case=row.small, peers=lambda case: ({}, {"mamba-ssm": "not installed"}))


def test_sections_are_chosen_by_name(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.parse([]).only == list(bench.SECTIONS)
    assert bench.parse(["--only", "ssd,cold"]).only == ["ssd", "cold"]
    with pytest.raises(SystemExit):
        bench.parse(["--only", "ssd,attention"])
    assert "unknown sections attention" in capsys.readouterr().err


def test_floors_count_what_must_move(bench: ModuleType) -> None:
    # 8 x 4096 x 5120 in bf16 at 4.3 TB/s: x, z and y forward; x, z, dy, dx and dz back.
    tensor = 8 * 4096 * 5120 * 2
    forward, both = bench.floors(2 * tensor, tensor, 2 * tensor, 4.3e9)
    assert forward == pytest.approx(0.234, abs=1e-3) and both == pytest.approx(0.624, abs=1e-3)
    assert bench.tensor_bytes([torch.empty(3, dtype=torch.bfloat16), None, torch.empty(2)]) == 14


def test_a_row_is_checked_then_timed(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    found = list(bench.time_row(small(bench, "norm"), "norm", 2, True, 4e9))
    assert [timing.implementation for timing in found] == ["ours", "mamba-ssm"]
    assert found[0].forward > 0 and found[0].both > found[0].floor_both > found[0].floor_forward > 0
    assert found[1].forward is None and "not installed" in found[1].note
    assert "largest error" in capsys.readouterr().out
    lines = "\n".join(bench.table(found))
    assert "norm: norm B2 L552 E5120" in lines and "left out: not installed" in lines


def test_an_op_that_is_wrong_gets_no_figures(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    row = small(bench, "norm")
    honest = row.small.call
    # Wrong only in bf16, as a kernel may be and its fp32 reference not.
    off = dataclasses.replace(
        row.small, call=lambda i: (honest(i)[0] * (1.05 if i["x"].dtype == torch.bfloat16 else 1),)
    )
    (timing,) = bench.time_row(dataclasses.replace(row, small=off), "norm", 1, True, 4e9)
    assert timing.forward is None and timing.note.startswith("WRONG: output 0")


def test_one_failure_leaves_the_others(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    row = small(bench, "norm")

    def fails(inputs):
        raise torch.OutOfMemoryError("out of memory\nand more")

    peer = {"mamba-ssm": dataclasses.replace(row.case, call=fails)}
    row = dataclasses.replace(row, peers=lambda case: (peer, {}))
    broken = dataclasses.replace(row, small=dataclasses.replace(row.small, call=fails))
    monkeypatch.setattr(bench, "rows", lambda section: [broken, row])
    found = list(bench.measure("norm", 1, True, 4e9))
    assert found[0].note == "FAILED OutOfMemoryError: out of memory"
    assert found[1].forward > 0
    assert found[2].note == "OutOfMemoryError: out of memory" and found[2].forward is None


def test_the_table_says_how_much_faster(bench: ModuleType) -> None:
    ours = bench.Timing("ssd", "shape", "ours", 1.0, 4.0, 0.5, 2.0)
    theirs = bench.Timing("ssd", "shape", "mamba-ssm", 2.0, 6.0, 0.5, 2.0)
    text = "\n".join(bench.table([ours, theirs]))
    assert "floor 0.500 and 2.000 ms" in text
    assert "2.00x 1.50x" in text.splitlines()[-1] and "4.00" in text.splitlines()[-1]


def test_the_mixer_agrees_with_itself(bench: ModuleType) -> None:
    case = bench.mixer_case(1, 20, documents=7)
    assert max(sys.modules["kernel_timing"].errors(case).values()) < bench.TOLERANCE

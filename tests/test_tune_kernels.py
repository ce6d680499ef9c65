"""The kernel tuner's choices, without a GPU (scripts/tune_kernels.py)."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

SCRIPTS = Path(__file__).parents[1] / "scripts"
KEY = ("kernel", "N=64")
ARCH = "sm_90"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script; importing it unsets TRITON_INTERPRET, which is put back."""
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))
    monkeypatch.syspath_prepend(SCRIPTS)
    pytest.importorskip("triton")
    return importlib.import_module("tune_kernels")


@pytest.fixture
def machine(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU on which BLOCK 256 takes half as long as 128, is wrong at 512, and does not compile at 64."""

    def run(case, inputs, table):
        config = {"BLOCK": 128, "num_warps": 4} | table.get(ARCH, {}).get("kernel", {}).get("N=64", {})
        value = torch.ones(4) * (2 if config["BLOCK"] == 512 else 1)
        return script.Run((value,), [config], {KEY: {"BLOCK": 128, "num_warps": 4}})

    def speedup(base, other, rounds):
        cost = [
            256 / config["BLOCK"] + abs(config["num_warps"] - 4) for config in base.launches + other.launches
        ]
        return cost[0] / cost[1]

    def compiles(work):
        return "too small" if work[2][ARCH]["kernel"]["N=64"]["BLOCK"] == 64 else ""

    monkeypatch.setattr(script, "run", run)
    monkeypatch.setattr(script, "speedup", speedup)
    monkeypatch.setattr(script, "compiles", compiles)
    monkeypatch.setattr(script, "candidates", lambda op, kernel, config: list(script.neighbours(config)))
    case = SimpleNamespace(name="case", op="op", make=lambda device: {})
    pool = SimpleNamespace(map=lambda f, work, chunksize: list(map(f, work)))
    options = argparse.Namespace(steps=4, rounds=1, gain=0.02)
    return SimpleNamespace(tune=lambda table: script.tune(case, KEY, table, ARCH, options, pool))


def test_neighbours_differ_in_one_number(script: ModuleType) -> None:
    config = {"BLOCK": 64, "num_warps": 16, "num_stages": 1, "maxnreg": 128}
    found = list(script.neighbours(config))
    assert all(sum(config[name] != other[name] for name in config) == 1 for other in found)
    tried = {name: sorted({other[name] for other in found} - {config[name]}) for name in config}
    assert tried == {"BLOCK": [32, 128], "num_warps": [8], "num_stages": [2], "maxnreg": [96, 160]}


def test_the_best_that_is_right_is_kept(machine: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    table = machine.tune({"sm_80": {"other": {}}})
    assert table == {"sm_80": {"other": {}}, ARCH: {"kernel": {"N=64": {"BLOCK": 256, "num_warps": 4}}}}
    said = capsys.readouterr().out
    assert "too small" in said and "WRONG RESULT" in said


def test_nothing_is_written_where_nothing_is_gained(machine: SimpleNamespace) -> None:
    table = {ARCH: {"kernel": {"N=64": {"BLOCK": 256, "num_warps": 4}}}}
    assert machine.tune(table) == table


def test_only_launches_that_differ_are_compared(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "identity", lambda launch: launch.split("@")[0])
    base, other = script.changed(["a@1", "b@1", "c@1"], ["a@2", "B@2", "c@2"])
    assert base == ["b@1"] and other == ["B@2"]


def test_results_must_agree(script: ModuleType) -> None:
    base = script.Run((torch.ones(10),), [], {})
    for value, verdict in ((1.001, True), (1.1, False), (float("nan"), False)):
        assert script.agree(base, dataclasses.replace(base, results=(torch.full((10,), value),))) is verdict


def test_lookups_are_seen_and_answered(script: ModuleType) -> None:
    launches = sys.modules["kernel_launches"]
    tuned = launches.tuned
    device = torch.device("cpu")
    with launches.table({"cpu": {"kernel": {"N=64": {"BLOCK": 256}}}}) as asked:
        assert tuned.lookup("kernel", device, "N=64", {"BLOCK": 1, "x": 2}) == {"BLOCK": 256, "x": 2}
        assert tuned.lookup("kernel", device, "N=32", {"BLOCK": 1}) == {"BLOCK": 1}
    assert asked == {KEY: {"BLOCK": 1, "x": 2}, ("kernel", "N=32"): {"BLOCK": 1}}

"""doctor: what it finds, and what it warns of."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ssmtrain import doctor
from ssmtrain.cli import main


def test_report(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["torch"].startswith("2.")
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["cpu"]["usable"] >= 1 and found["memory_bytes"] > 2**28
    assert found["disk"]["runs"]["free_bytes"] > 0
    assert set(found["kernels"]["decision"]) >= {"ssd", "selective_scan", "attention"}
    assert list(tmp_path.iterdir()) == []
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert "torch" in told and "kernels: " in told and "disk for runs" in told


def test_bad_versions_are_named() -> None:
    good: dict[str, str | None] = dict.fromkeys(doctor.PACKAGES, "9.9.9")
    assert doctor.package_advice(good) == []
    for version in ("2.6.2", "2.6.3"):
        (line,) = doctor.package_advice({**good, "lightning": version})
        assert "malicious" in line and "credentials" in line
    (line,) = doctor.package_advice({**good, "torch": "2.9.1+cu128"})
    assert "CVE-2026-24747" in line and "torch>=2.10" in line
    assert doctor.package_advice({**good, "torch": "2.10.0"}) == []
    (line,) = doctor.package_advice({**good, "safetensors": None})
    assert line == "safetensors is not installed: pip install safetensors"
    assert doctor.package_advice({**good, "deepspeed": None}) == []


def test_nothing_is_imported_beside_a_malicious_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "versions", lambda: {"lightning": "2.6.3"})
    monkeypatch.setattr(doctor, "gpus", lambda: pytest.fail("torch was asked"))
    found = doctor.examine()
    assert any("malicious" in line for line in found["advice"])
    assert doctor.describe(found)[-1].startswith("! lightning 2.6.3")


def test_what_would_be_slow_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = {"name": "H200", "memory_bytes": 2**37, "capability": "9.0", "bf16": True}
    found: dict[str, Any] = {
        "gpus": [gpu],
        "compiler": None,
        "cpu": {"OMP_NUM_THREADS": None, "usable": 4},
        "kernels": {"decision": {"ssd": "reference", "attention": "triton"}, "why": "no Triton body"},
    }
    lines = doctor.speed_advice(found)
    assert any("C compiler" in line for line in lines)
    assert [line for line in lines if line.startswith("ssd runs its torch reference on the GPU")]
    assert not any(line.startswith("attention") for line in lines)
    assert any("no bf16" in line for line in doctor.speed_advice({**found, "gpus": [{**gpu, "bf16": False}]}))
    idle = {"OMP_NUM_THREADS": "1", "usable": 4}
    assert any("3 cores idle" in line for line in doctor.speed_advice({**found, "gpus": [], "cpu": idle}))


def test_full_and_locked_places_are_told() -> None:
    places = {
        "runs": {"path": "runs", "free_bytes": 2**30, "writable": True},
        "cache": {"path": "/x", "free_bytes": 2**40, "writable": False},
    }
    full, locked = doctor.disk_advice(places)
    assert "1.0 GiB free for runs" in full
    assert "data.cache_dir=…" in locked

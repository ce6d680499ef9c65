"""doctor: what it finds, and what it warns of."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ssmtrain import doctor, needs
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
        "compilers": {"cc": None, "cxx": None},
        "python_headers": False,
        "cpu": {"OMP_NUM_THREADS": None, "usable": 4},
        "kernels": {"decision": {"ssd": "reference", "attention": "triton"}, "why": "no Triton body"},
    }
    lines = doctor.speed_advice(found)
    assert any("C compiler" in line for line in lines)
    assert [line for line in lines if line.startswith("ssd runs its torch reference on the GPU")]
    assert not any(line.startswith("attention") for line in lines)
    assert any("no bf16" in line for line in doctor.speed_advice({**found, "gpus": [{**gpu, "bf16": False}]}))
    built = {**found, "compiler": "/usr/bin/cc"}
    assert any("Python.h" in line for line in doctor.speed_advice(built))
    assert any("no C++ compiler" in line for line in doctor.speed_advice({**built, "gpus": []}))
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


def test_versions_that_do_not_go_together_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.conflicts() == []
    real = doctor.importlib.metadata.version
    monkeypatch.setattr(
        doctor.importlib.metadata, "version", lambda name: "2.99" if name == "pydantic" else real(name)
    )
    wants = ["pydantic<2.99", "pydantic<1; extra == 'old'", "absent>3", "numpy>=1"]
    monkeypatch.setattr(
        doctor.importlib.metadata, "requires", lambda name: wants if name == "lightning" else None
    )
    assert doctor.conflicts() == [
        "lightning needs pydantic<2.99, 2.99 is installed: pip install 'pydantic<2.99'"
    ]


def test_what_a_recipe_needs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "examine", lambda: examined)
    cpu = {"compilers": {"cc": None, "cxx": None}, "gpus": [], "packages": {}, "kernels": {}, "disk": {}}
    cpu |= {"ssmtrain": "0", "python": "3", "system": "x", "memory_bytes": None, "compiler": None}
    examined: dict[str, Any] = {**cpu, "cpu": {"usable": 1, "cores": 1}, "advice": []}
    assert main(["doctor", "config=quickstart", "ema.decay=0.9", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["needs"]
    assert main(["show", "config=quickstart", "--json"]) == 0
    params = json.loads(capsys.readouterr().out)["params_total"]
    assert found["checkpoint_bytes"] == 16 * params  # fp32 weights, two moments, a moving average
    assert found["folder"].startswith("runs/quickstart-") and list(tmp_path.iterdir()) == []
    assert main(["doctor", "config=quickstart"]) == 0
    assert "next checkpoint: " in capsys.readouterr().out
    assert main(["doctor", "trainer.devices=2"]) == 2
    assert main(["doctor", "config=quickstart", "run=x"]) == 2
    assert main(["doctor", "run=nowhere"]) == 2
    assert "there is no such run" in capsys.readouterr().err


def test_a_run_that_will_not_fit_is_told() -> None:
    found: dict[str, Any] = {
        "folder": "runs/a",
        "checkpoint_bytes": 10 * 2**30,
        "checkpoints_kept": 2,
        "checkpoints_there": 1,
        "free_bytes": 9 * 2**30,
        "training_bytes": 2**38,
        "shared": False,
        "settings": {"precision": "fp32", "kernels": "auto", "compile": True},
    }
    none: dict[str, str | None] = {"cc": None, "cxx": None}
    (room, compiles) = needs.advice(found, [], none)
    assert room.startswith("the next checkpoint takes 10.00 GiB, 9.00 GiB are free") and "g++" in compiles
    (later, _) = needs.advice({**found, "free_bytes": 15 * 2**30}, [], none)
    assert later.startswith("2 checkpoints are still to come beside each other, 20.00 GiB")
    plenty = {**found, "free_bytes": 2**40}
    gpu = {"memory_bytes": 2**37, "bf16": True}
    memory, precision = needs.advice(plenty, [gpu], {"cc": "/usr/bin/cc", "cxx": None})
    assert "256.00 GiB a device, a GPU here has 128.00 GiB" in memory and "fp32 on a GPU" in precision
    shared = needs.advice({**plenty, "shared": True}, [gpu], {"cc": "/usr/bin/cc", "cxx": None})
    assert shared == [precision]

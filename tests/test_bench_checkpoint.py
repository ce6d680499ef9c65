"""The checkpoint benchmark writes, reads and compares (scripts/bench_checkpoint.py)."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script, on tensors of 256 KB and the test's own folder."""
    monkeypatch.syspath_prepend(SCRIPTS)
    script = importlib.import_module("bench_checkpoint")
    monkeypatch.setattr(script, "ELEMENTS", 1 << 16)
    words = ["--gb", "0.004", "--rounds", "1", "--folder", str(tmp_path), "--json", str(tmp_path / "found")]
    monkeypatch.setattr(sys, "argv", ["bench_checkpoint.py", *words])
    return script


def test_each_way_is_timed(bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main() == 0
    said, page = capsys.readouterr().out, json.loads((tmp_path / "found").read_text())
    assert page["ways"].keys() == {"ours", "torch.save", "dcp"} and page["gb"] == pytest.approx(
        0.004, rel=0.1
    )
    assert all(found["save"] > 0 and found["load"] > 0 for found in page["ways"].values())
    assert "torch.save   save" in said and len(page["copy_s"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["found"], "its files are gone"


@pytest.mark.parametrize("way", ["ours", "plain", "distributed"])
def test_a_load_is_compared(bench: ModuleType, way: str, tmp_path: Path) -> None:
    kinds = bench.make(0.001, "cpu")
    save, load = getattr(bench, way)(kinds, tmp_path)
    save()
    load()
    next(iter(kinds["optim"].values())).add_(1)
    with pytest.raises(SystemExit, match="not what was saved"):
        load()

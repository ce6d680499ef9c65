"""Ours and transformers' classes give the same loss curves (a short form of scripts/loss_compare.py)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "loss_compare.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("loss_compare", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["loss_compare"] = module
    spec.loader.exec_module(module)
    return module


pytest.importorskip("transformers", minversion="5.17")
script = load()


@pytest.mark.parametrize("name", script.CASES)
def test_curves_are_equal(name: str) -> None:
    curves = script.compare(name, steps=8)
    assert len(curves.ours) == 8
    assert curves.gap < 5e-6
    assert min(curves.ours) < curves.ours[0] - 0.01, "the models learn"


def change(fields: dict, path: str, value: object) -> None:
    *parents, last = path.split(".")
    for key in parents:
        fields = fields[key]
    assert last in fields
    fields[last] = value


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("granite", "blocks.A.mixer.scale", 0.25),
        ("granite", "blocks.M.mixer.norm_eps", 1e-4),
        ("granite", "multipliers.residual", 0.225),
        ("granite-dense-rope", "blocks.A.mixer.rope_theta", 1000.0),
        ("jamba", "blocks.M.mixer.norm_eps", 1e-4),
        ("jamba", "blocks.E.ffn.normalize", True),
        ("jamba", "blocks.E.ffn.aux_coef", 0.051),
        ("jamba", "norm_eps", 1e-5),
    ],
)
def test_a_small_mistake_in_ours_shows(
    name: str, path: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = script.CASES[name]()
    change(case.ours, path, value)
    monkeypatch.setitem(script.CASES, name, lambda: case)
    assert script.compare(name, steps=3).gap > 5e-5


def test_every_weight_of_theirs_needs_a_place_in_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    case = script.CASES["mamba2"]()
    case.ours["layout"] = "M2"  # theirs has three layers
    with pytest.raises(RuntimeError, match=r"no place for .*layers\.2\.mixer"):
        script.build_pair(case)

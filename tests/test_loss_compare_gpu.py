"""scripts/loss_compare_gpu.py on the CPU: that it tells what it is for, not what a GPU gives."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
pytest.importorskip("transformers")

import kernel_cases
import loss_compare_gpu as script
from ssmtrain.config.load import load
from ssmtrain.kernels import backend

CPU = torch.device("cpu")
TINY = ["model.n_layers=2", "model.d_model=16", "model.vocab_size=257", "model.blocks.M.mixer.d_state=4"]


@pytest.fixture(autouse=True)
def as_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend is as before afterwards."""
    monkeypatch.setattr(backend, "_current", None)


def test_bf16_stays_nearer_than_another_seed(capsys: pytest.CaptureFixture[str]) -> None:
    config = load(["config=mamba_130m", *TINY]).model
    rows = script.batches(6, 2, 32)
    assert rows.shape == (6, 2, 33) and rows.max() < 256
    assert script.compare("tiny", config, rows, CPU)
    printed = capsys.readouterr().out
    assert "within the distance" in printed and "mamba-ssm, bf16: left out" in printed


@pytest.mark.parametrize("fp32,within", [([2.0] * 60, True), ([2.0] * 55 + [3.0] * 5, False)])
def test_one_stretch_too_far_is_told(
    fp32: list[float], within: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    curves = {script.KERNELS: [2.01] * 60, script.FP32: fp32, script.PEER: fp32}
    curves |= dict.fromkeys(script.SEEDS, [2.1] * 60)
    monkeypatch.setattr(script, "curve", lambda way, *_: curves[way])
    config = load(["config=mamba_130m", *TINY]).model
    assert script.compare("tiny", config, torch.zeros(60, 1, 2), CPU) is within


def test_a_kernel_that_leans_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = kernel_cases.conv_case(1, 32, 16)

    def call(inputs: kernel_cases.Inputs) -> tuple[torch.Tensor, ...]:
        outputs = straight.call(inputs)
        wide = outputs[0].dtype == torch.float64
        return outputs if wide else (outputs[0] + 0.01, *outputs[1:])

    monkeypatch.setattr(script, "BIASED", (replace(straight, call=call),))
    assert not script.bias(12, CPU)
    told = [line for line in capsys.readouterr().out.splitlines() if "LEANS" in line]
    assert len(told) == 1 and "output 0" in told[0]


@pytest.mark.gpu
def test_no_kernel_leans() -> None:
    assert script.bias(script.DRAWS, torch.device("cuda"))


def test_standard_errors() -> None:
    torch.manual_seed(0)
    noise = torch.randn(400, dtype=torch.float64)
    assert abs(script.lean(noise.tolist())) < 4 < script.lean((noise + 0.5).tolist())
    assert script.lean([0.0, 0.0]) == 0.0

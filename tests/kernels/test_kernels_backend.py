"""Which implementation runs: decided once, said aloud, refused when it cannot."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from ssmtrain.kernels import backend
from ssmtrain.kernels.gated_norm import gated_norm


@pytest.fixture(autouse=True)
def undecided(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start without a decision and leave none behind; two ops, of which one has a Triton body."""
    monkeypatch.setattr(backend, "_current", None)
    monkeypatch.setattr(backend, "op_names", lambda: ["conv", "scan"])
    monkeypatch.setattr(backend, "has_triton", lambda op: op == "scan")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    yield


def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that Triton kernels can run."""
    monkeypatch.setattr(backend, "triton_obstacle", lambda device_type: None)


def test_every_op_folder_is_an_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert {"ssd", "causal_conv1d", "gated_norm"} <= set(backend.op_names())


def test_the_cpu_takes_the_reference_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        first, second = backend.configure("auto", "cpu"), backend.configure("auto", "cpu")
    assert first == second and first.ops == {"conv": "reference", "scan": "reference"}
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert backend.chosen("scan") == "reference" and backend.chosen("conv", "cpu") == "reference"


def test_a_gpu_takes_triton_and_names_what_runs_slowly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu(monkeypatch)
    with caplog.at_level(logging.INFO):
        decision = backend.configure("auto", "cuda")
        backend.configure("auto", "cuda")
    assert decision.ops == {"conv": "reference", "scan": "triton"}
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "conv" in record.message and "scan" not in record.message
    assert backend.chosen("scan", "cuda") == "triton"
    assert backend.chosen("scan", "cpu") == "reference"
    assert backend.chosen("scan", "meta") == "reference"


def test_a_gpu_tensor_in_a_cpu_run_is_decided_audibly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu(monkeypatch)
    backend.configure("auto", "cpu")
    assert backend.chosen("scan", "cuda") == "triton"
    assert any(record.levelname == "WARNING" and "conv" in record.message for record in caplog.records)


def test_reference_by_name_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert backend.configure("reference", "cuda").ops["scan"] == "reference"
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize(
    "name,device,words",
    [
        ("triton", "cpu", "no GPU"),
        ("fast", "cpu", "choose auto, reference or triton"),
    ],
)
def test_a_backend_that_cannot_run_is_an_error(name: str, device: str, words: str) -> None:
    with pytest.raises(backend.BackendError, match=words):
        backend.configure(name, device)
    assert backend.describe()["current"] is None


def test_triton_by_name_names_the_ops_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(backend.BackendError, match="no Triton body for conv"):
        backend.configure("triton", "cpu")
    monkeypatch.setattr(backend, "has_triton", lambda op: True)
    assert set(backend.configure("triton", "cpu").ops.values()) == {"triton"}


def test_the_ops_of_this_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for op in ("ssd", "selective_scan", "causal_conv1d", "gated_norm", "linear_cross_entropy"):
        assert backend.has_triton(op)
    assert backend.configure("triton", "cpu").ops["selective_scan"] == "triton"
    assert set(backend.configure("auto", "cpu").ops.values()) == {"reference"}


def test_auto_without_triton_installed_warns_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    assert set(backend.configure("auto", "cuda").ops.values()) == {"reference"}
    assert "not installed" in caplog.records[0].message


def test_ops_decide_for_themselves_when_nobody_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(backend, "_current", None)
    gated_norm(torch.ones(2, 4), None, torch.ones(4))
    described = backend.describe()["current"]
    assert described is not None and described["ops"]["gated_norm"] == "reference"


def test_kernels_import_nothing_but_torch() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import ssmtrain.kernels.ssd, ssmtrain.kernels.causal_conv1d, ssmtrain.kernels.gated_norm\n"
        "ours = {n for n in sys.modules if n.startswith('ssmtrain.')}\n"
        "assert all(n.startswith('ssmtrain.kernels') for n in ours), ours\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_ops_that_torch_runs_fast_are_no_reason_to_warn_or_refuse(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu(monkeypatch)
    monkeypatch.setattr(backend, "op_names", lambda: ["attention", "scan"])
    with caplog.at_level(logging.INFO):
        for name in ("auto", "triton"):
            assert backend.configure(name, "cuda").ops == {"attention": "reference", "scan": "triton"}
    assert all(record.levelname == "INFO" for record in caplog.records)

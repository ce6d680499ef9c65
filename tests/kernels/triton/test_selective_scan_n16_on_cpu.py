"""The source of the Gluon selective scan on the CPU, torch in Gluon's place: what it computes, not how fast."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

from kernels.cases import assert_all_close
from kernels.triton.gluon_shim import on_cpu
from kernels.triton.shim import poisoned
from kernels.triton.test_triton_selective_scan import (
    ALL,
    BF16,
    FP32,
    Inputs,
    call,
    documents,
    draw,
    oracle,
    pulled,
    rounded,
)
from ssmtrain.kernels import tuned
from ssmtrain.kernels.selective_scan import triton as ours
from ssmtrain.kernels.ssd import triton_chunks

n16 = pytest.importorskip("ssmtrain.kernels.selective_scan.triton_n16")
n16_ends = pytest.importorskip("ssmtrain.kernels.selective_scan.triton_n16_ends")
n16_back = pytest.importorskip("ssmtrain.kernels.selective_scan.triton_n16_backward")
pytestmark = pytest.mark.skipif(not tuned.interpreting(), reason="the gpu tests run it compiled")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def on_this_machine(monkeypatch: pytest.MonkeyPatch):
    """Gluon kernels run here, on memory that is NaN until it is written."""
    poisoned(monkeypatch, ours, triton_chunks)
    monkeypatch.setattr(tuned, "architecture", lambda device: "sm_90")
    with ExitStack() as stack:
        stack.enter_context(on_cpu(n16, n16.forward, n16_back.backward, n16_ends.ends, n16_ends.starts))
        yield


def check(inputs: Inputs, rows: list[list[int]] | None, dtype: torch.dtype = FP32, **options) -> None:
    """Hold outputs and gradients against the oracle's."""
    doc_ids, n_docs = documents(rows)
    low = rounded(inputs, CPU, dtype)
    assert n16.fits(low["A"].shape[1], *(low[k] for k in ("u", "dt", "z") if k in low))
    found = pulled(call(ours, doc_ids, n_docs, **options), low)
    assert_all_close(found, oracle(low, doc_ids, **options), 1e-6 if dtype == FP32 else 6e-3)


@pytest.mark.parametrize(
    "window,every,rows",
    [
        (64, 64, None),
        (64, 16, [[3, 16, 1, 29], [1, 48]]),
        (32, 16, [[49], [17, 32]]),
        (16, 16, [[1] * 9 + [40], [2, 47]]),
    ],
    ids=str,
)
def test_documents_and_windows(
    window: int, every: int, rows: list[list[int]] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "window_length", lambda channels: window)
    monkeypatch.setattr(n16, "EVERY", every)
    n_docs = documents(rows)[1] or 2
    check(draw(49, n_docs, channels=80, N=16), rows)

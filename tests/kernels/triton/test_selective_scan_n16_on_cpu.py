"""The source of the Gluon selective scan on the CPU, torch in Gluon's place: what it computes."""

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
    assert_alone,
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
    monkeypatch.setattr(ours, "window_length", lambda channels, length: window)
    monkeypatch.setattr(n16, "EVERY", every)
    n_docs = documents(rows)[1] or 2
    check(draw(49, n_docs, channels=80, N=16), rows)


@pytest.mark.parametrize(
    "rows,turn", [(None, 16), ([[3, 16, 1, 29], [1, 48]], 32), ([[49], [17, 32]], 16)], ids=str
)
def test_turns_change_no_bit(
    rows: list[list[int]] | None, turn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chain that is gone back through in turns gives what it gives in one, and what the oracle says."""
    monkeypatch.setattr(ours, "window_length", lambda channels, length: 64)
    monkeypatch.setattr(n16, "EVERY", 16)
    monkeypatch.setattr(n16, "TURN", turn)
    doc_ids, n_docs = documents(rows)
    inputs = rounded(draw(49, n_docs or 2, channels=80, N=16), CPU)
    expected = pulled(call(ours, doc_ids, n_docs), inputs)
    monkeypatch.setattr(tuned, "multiprocessors", lambda device: 1)
    assert n16.turns(ours.plan(inputs["u"], inputs["dt"], inputs["A"].t(), None, "backward"), CPU) > 1
    found = pulled(call(ours, doc_ids, n_docs), inputs)
    for name, one in expected.items():
        assert torch.equal(found[name], one), name
    assert_all_close(found, oracle(inputs, doc_ids), 1e-6)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize(
    "options",
    [{"dt_softplus": False, "dt_limit": (0.0, 0.7)}, {"dt_limit": (0.3, 1.0)}, {"final": False}],
    ids=str,
)
def test_options(options: dict[str, object], dtype: torch.dtype) -> None:
    """Limits on step sizes, no softplus, no final states; what is optional is there or not in turn."""
    optional = ALL if dtype == FP32 else ("dt_bias",)
    check(draw(21, 3, optional, channels=16, N=5), [[21], [1, 20]], dtype, **options)


@pytest.mark.parametrize("window", [16, 64])
def test_packed_documents_have_the_bits_of_documents_alone(
    window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "window_length", lambda channels, length: window)
    monkeypatch.setattr(n16, "EVERY", 16)
    doc_ids, n_docs = documents([[3, 1, 36], [40]])
    assert doc_ids is not None and n_docs is not None
    assert_alone(doc_ids, n_docs, rounded(draw(40, n_docs, channels=32, N=16), CPU))


def test_nothing_crosses_a_boundary(monkeypatch: pytest.MonkeyPatch) -> None:
    """A document of infinities leaves its neighbours' outputs and gradients finite."""
    monkeypatch.setattr(ours, "window_length", lambda channels, length: 16)
    doc_ids, n_docs = documents([[18, 5, 17]])
    inputs = rounded(draw(40, 3, batch=1, channels=16, N=16), CPU)
    clean = pulled(call(ours, doc_ids, n_docs), inputs)
    inputs["B"][0, 18:23] = torch.inf
    dirty = pulled(call(ours, doc_ids, n_docs), inputs)
    outside = torch.ones(40, dtype=torch.bool)
    outside[18:23] = False
    for name in ("output 0", *(f"grad {k}" for k in ("u", "dt", "B", "C", "z"))):
        assert torch.equal(dirty[name][:, outside], clean[name][:, outside]), name


def test_whose_tensors_are_taken() -> None:
    """Up to 16 states, channels in words of 16 bytes and as many as offsets reach, one type."""
    u = torch.zeros(1, 2, 32, dtype=BF16)
    assert n16.fits(16, u, u) and n16.fits(1, u)
    assert not n16.fits(17, u) and not n16.fits(16, u[..., :24]) and not n16.fits(16, u, u.float())
    wide = torch.zeros(1, 1, 2**18, dtype=BF16)
    assert not n16.fits(16, wide) and n16.fits(16, wide[..., 16:])


def test_rows_that_begin_within_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are copied: copies to shared memory are of 16 bytes."""
    inputs = rounded(draw(9, 2, channels=16, N=4), CPU)
    wide = torch.zeros(2, 9, 19)
    wide[..., 3:] = inputs["u"]
    expected = pulled(call(ours), inputs)
    found = pulled(call(ours), inputs | {"u": wide[..., 3:]})
    assert_all_close(found, expected, 1e-7)

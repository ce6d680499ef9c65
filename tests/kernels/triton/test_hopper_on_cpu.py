"""The source of the Hopper pass on the CPU, torch in Gluon's place: what it computes, not how fast."""

from __future__ import annotations

from math import inf

import pytest
import torch

from kernels.cases import assert_all_close, distance
from kernels.triton.gluon_shim import on_cpu
from kernels.triton.shim import poisoned
from kernels.triton.ssd_cases import Results, call, documents, doubled, draw, pulled, rounded
from ssmtrain.kernels import tuned
from ssmtrain.kernels.ssd import reference, triton_chunks
from ssmtrain.kernels.ssd import triton as ours

hopper = pytest.importorskip("ssmtrain.kernels.ssd.triton_hopper")
pytestmark = [
    pytest.mark.skipif(not tuned.interpreting(), reason="test_hopper.py runs it compiled"),
    pytest.mark.filterwarnings("ignore:divide by zero"),
]
BF16, CPU = torch.bfloat16, torch.device("cpu")


@pytest.mark.parametrize(
    "N,chunk,window,rows",
    [
        (64, 128, 1024, None),
        (64, 128, 128, None),
        (128, 64, 1024, [[1, 63, 64, 65, 7], [200]]),
        (64, 128, 128, [[3, 128, 69], [199, 1]]),
        (64, 64, 128, [[1, 299], [64, 236]]),
    ],
    ids=str,
)
def test_passes(
    N: int, chunk: int, window: int, rows: list[list[int]] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward, again for the states, and back: rows and documents, in one window, in several, and across."""
    poisoned(monkeypatch, hopper, ours, triton_chunks)
    monkeypatch.setattr(hopper, "window_length", lambda heads: window)
    monkeypatch.setattr(tuned, "architecture", lambda device: "sm_90")
    doc_ids, n_docs = documents(*rows) if rows else (None, 2)
    length = 200 if doc_ids is None else doc_ids.shape[1]
    inputs = rounded(draw(length, n_docs, batch=2, heads=2, groups=2, P=64, N=N), CPU, BF16)
    inputs["A"] *= torch.tensor([1.0, 0.01])  # of the second head, what entered a window leaves it too
    truth = pulled(call(reference, doc_ids, n_docs), doubled(inputs), BF16)
    d_y, d_final = cotangents(truth)
    x, dt, A, B, C, D, bias, initial = (
        inputs[name] for name in ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")
    )
    shape = ours.shape_of(x, B)
    at = ours._steps(shape, dt, A, bias, doc_ids, n_docs, chunk, True, 0.0, inf)
    assert hopper.fits(shape, at.chunks.size, x, B, C)
    final, d_initial = (torch.full_like(initial, torch.nan) for _ in range(2))
    with on_cpu(hopper, hopper.one_pass):
        y, _ = hopper.run(shape, at, x, B, C, D, doc_ids, initial, final, back=False, keep=False)
        _, states = hopper.run(shape, at, x, B, None, None, doc_ids, initial, None, back=False, keep=True)
        d_x, d_states = hopper.run(shape, at, d_y, C, B, D, doc_ids, d_final, d_initial, back=True, keep=True)
    found = {"output 0": y, "output 1": final, "grad x": d_x, "grad initial_state": d_initial}
    assert_all_close(found, {name: truth[name] for name in found}, 4e-3)
    walked = ours._walk(shape, at, x, B, initial, None, (d_y, C, d_final, d_initial))
    used = slice(None) if doc_ids is None else at.chunks.table[:, 1] > 0
    for mine, theirs in zip((states, d_states), walked, strict=True):
        assert distance(mine[used].float(), theirs[used].float()) < 3e-3


@pytest.mark.parametrize("window", [128, 1024])
def test_room_for_more_documents_changes_no_bit(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch, hopper, ours, triton_chunks)
    monkeypatch.setattr(hopper, "window_length", lambda heads: window)
    monkeypatch.setattr(tuned, "architecture", lambda device: "sm_90")
    doc_ids, n_docs = documents([3, 128, 69, 100], [199, 1, 100])
    inputs = rounded(draw(300, n_docs, ("D", "dt_bias"), batch=2, heads=2, P=64, N=64), CPU, BF16)
    x, dt, A, B, C, D, bias = (inputs[name] for name in ("x", "dt", "A", "B", "C", "D", "dt_bias"))
    shape = ours.shape_of(x, B)
    found = []
    for n in (n_docs, n_docs + 1, n_docs + 40):
        at = ours._steps(shape, dt, A, bias, doc_ids, n, 64, True, 0.0, inf)
        rest = {"doc_ids": doc_ids, "initial": None, "final": None}
        with on_cpu(hopper, hopper.one_pass):
            y, _ = hopper.run(shape, at, x, B, C, D, **rest, back=False, keep=False)
            _, states = hopper.run(shape, at, x, B, None, None, **rest, back=False, keep=True)
            d_x, d_states = hopper.run(shape, at, y, C, B, D, **rest, back=True, keep=True)
        used = at.chunks.table[:, 1] > 0
        found.append((y, d_x, states[used], d_states[used]))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def cotangents(outputs: Results, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """The cotangents that `pulled` draws for these outputs."""
    generator = torch.Generator().manual_seed(seed)
    y, final = (torch.randn(outputs[f"output {i}"].shape, generator=generator) for i in range(2))
    return y.to(BF16), final.to(BF16).float()


def test_documents_without_initial_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "architecture", lambda device: "sm_90")
    doc_ids, n_docs = documents([3, 70], [73])
    inputs = rounded(draw(73, n_docs, (), batch=2, heads=1, P=64, N=64), CPU, BF16)
    with on_cpu(hopper, hopper.one_pass):
        found = call(ours, doc_ids, n_docs)(**inputs)
    for mine, exact in zip(found, call(reference, doc_ids, n_docs)(**doubled(inputs)), strict=True):
        assert distance(mine, exact) < 4e-3


def test_tensors_that_cannot_be_copied_16_bytes_at_once_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "architecture", lambda device: "sm_90")
    shape = ours.Shape(1, 4, 1, 64, 1, 64, BF16)
    for at, width, fits in ((0, 64, True), (8, 80, True), (1, 72, False), (0, 67, False)):
        x = torch.empty(1, 4, width, dtype=BF16)[..., at : at + 64].unflatten(2, (1, 64))
        assert hopper.fits(shape, 128, x) == fits

"""SSD in one pass, on Hopper: against float64, and where windows, pieces and documents meet.

Fewer than 16 heads make windows of 1024 tokens: short rows already have several.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from kernels.cases import assert_all_close, cut_rows, distance
from kernels.triton.shim import poisoned
from kernels.triton.ssd_cases import (
    ALL,
    PER_TOKEN,
    Results,
    apart,
    assert_equal,
    call,
    documents,
    doubled,
    draw,
    pulled,
    rounded,
    strain,
)
from ssmtrain.kernels import ahead, tuned
from ssmtrain.kernels.ssd import reference, triton_chunks
from ssmtrain.kernels.ssd import triton as ours

hopper = pytest.importorskip("ssmtrain.kernels.ssd.triton_hopper")
pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16
SIZES = {"batch": 2, "heads": 8, "groups": 2, "P": 64, "N": 128}
ROWS = {
    "windows within documents": [[1024, 1, 63, 64, 65, 200, 1023], [2100, 340], [1025, 1415]],
    "documents at windows' edges": [[1024, 2048, 1024], [4095, 1], [1, 4095]],
    "many documents in a window": [[1] * 200 + [56, 64, 65, 128], [513]],
}
OF_DOCUMENTS = ("output 0", "output 1", "grad x", "grad dt", "grad initial_state")
"""What has the same bits wherever a document lies; the other gradients are sums over heads or tokens."""


@pytest.fixture(autouse=True)
def passes(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """The directions of the passes that ran, of which there must be one; what is left unwritten is NaN."""
    if tuned.architecture(device) != "sm_90":
        pytest.skip("for Hopper")
    poisoned(monkeypatch, ours, triton_chunks)
    seen: list[bool] = []
    real = hopper.run

    def run(*args, back: bool, **rest):
        if not ahead._only_compiling.get():
            seen.append(back)
        return real(*args, back=back, **rest)

    monkeypatch.setattr(hopper, "run", run)
    yield seen
    assert seen, "other kernels ran"


def lots(
    length: int, n_docs: int, device: torch.device, optional: tuple[str, ...] = ALL, **sizes: int
) -> Iterator[Results]:
    """Inputs in bf16 to take errors over: fewer where they are large."""
    for seed in range(4 if length > 999 else 6 if length > 9 else 24):
        yield rounded(draw(length, n_docs, optional, seed=seed, **SIZES | sizes), device, BF16)


def lasting(length: int, n_docs: int, device: torch.device, **sizes: int) -> Results:
    """Inputs whose decays are so slow that all that enters a window counts."""
    inputs = next(lots(length, n_docs, device, **sizes))
    return inputs | {"A": 1e-3 * inputs["A"]}


@pytest.mark.parametrize("optional", [(), ALL], ids=["bare", "all"])
@pytest.mark.parametrize("N", [64, 128, 256])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 129, 1000, 1024, 1025, 2500, 4096])
def test_every_length(length: int, N: int, optional: tuple[str, ...], device: torch.device) -> None:
    strains = strain(lots(length, 2, device, optional, N=N), None, 2, final=bool(optional))
    assert max(strains.values()) <= 1, strains


@pytest.mark.parametrize("chunk", [64, 128])
@pytest.mark.parametrize("N", [64, 128, 256])
@pytest.mark.parametrize("rows", ROWS)
def test_documents(rows: str, N: int, chunk: int, device: torch.device) -> None:
    doc_ids, n_docs = documents(*ROWS[rows])
    cases = lots(doc_ids.shape[1], n_docs, device, batch=len(doc_ids), N=N)
    strains = strain(cases, doc_ids, n_docs, chunk_size=chunk)
    assert max(strains.values()) <= 1, strains


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("optional", [("D",), ("dt_bias",), ("initial_state",)], ids=str)
@pytest.mark.parametrize("final", [False, True])
def test_what_is_optional(final: bool, optional: tuple[str, ...], packed: bool, device: torch.device) -> None:
    doc_ids, n_docs = documents([1100, 30], [64, 1066]) if packed else (None, 2)
    strains = strain(lots(1130, n_docs, device, optional, N=64), doc_ids, n_docs, final=final)
    assert max(strains.values()) <= 1, strains


@pytest.mark.parametrize("heads,groups", [(12, 1), (8, 8), (12, 3), (24, 1), (64, 4)])
def test_groups(heads: int, groups: int, device: torch.device) -> None:
    """Also of many heads, whose windows are longer."""
    doc_ids, n_docs = cut_rows(2, 2600)
    cases = lots(2600, n_docs, device, heads=heads, groups=groups, N=64)
    strains = strain(cases, doc_ids, n_docs)
    assert max(strains.values()) <= 1, strains


@pytest.mark.parametrize(
    "window,row",
    [(128, [1000]), (128, [300, 1, 128, 571]), (128, [129, 871]), (1024, [4096]), (1024, [1, 2100, 1995])],
    ids=str,
)
def test_states_that_last(
    window: int, row: list[int], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through up to eight windows; also of as few tokens as they can have."""
    monkeypatch.setattr(hopper, "window_length", lambda heads: window)
    doc_ids, n_docs = documents(row, [sum(row)]) if len(row) > 1 else (None, 2)
    inputs = lasting(sum(row), n_docs, device)
    found = pulled(call(ours, doc_ids, n_docs), inputs, BF16)
    truth = pulled(call(reference, doc_ids, n_docs), doubled(inputs), BF16)
    assert_all_close(found, truth, 2e-2)
    if doc_ids is not None:
        assert_bits_alone(doc_ids, n_docs, device)


def of_documents(results: Results) -> Results:
    """What has the same bits wherever a document lies."""
    return {name: results[name] for name in OF_DOCUMENTS}


def assert_bits_alone(doc_ids: Tensor, n_docs: int, device: torch.device, **sizes: int) -> None:
    """Assert that packed documents have the bits of documents alone."""
    inputs = lasting(doc_ids.shape[1], n_docs, device, batch=len(doc_ids), **sizes)
    packed, alone = (pulled(run, inputs, BF16) for run in (call(ours, doc_ids, n_docs), apart(doc_ids)))
    assert_equal(of_documents(packed), of_documents(alone))


@pytest.mark.parametrize("N", [64, 128, 256])
@pytest.mark.parametrize("rows", ROWS)
def test_packed_documents_have_the_bits_of_documents_alone(rows: str, N: int, device: torch.device) -> None:
    assert_bits_alone(*documents(*ROWS[rows]), device, N=N)


@pytest.mark.parametrize("before,after,rows", [(0, 5, 0), (37, 0, 1), (1000, 1024, 3), (64, 1, 40)])
def test_a_document_has_the_same_bits_in_any_company(
    before: int, after: int, rows: int, device: torch.device
) -> None:
    """With documents before and after it in its row, and in rows before its own and one after."""
    length = 2100
    inputs = lasting(length, 1, device, batch=1)
    neighbours = [n for n in (before, length, after) if n]
    whole = sum(neighbours)
    doc_ids, n_docs = documents(*[[whole]] * rows, neighbours, [whole])
    mine = rows + bool(before)
    crowd = lasting(whole, n_docs, device, batch=rows + 2)

    def among(**leaves: Tensor) -> tuple[Tensor, ...]:
        """The document's results, computed in company."""
        mixed = leaves | {k: crowd[k].clone() for k in (*PER_TOKEN, "initial_state")}
        for name in PER_TOKEN:
            mixed[name][rows, before : before + length] = leaves[name][0]
        mixed["initial_state"][mine] = leaves["initial_state"][0]
        y, final = call(ours, doc_ids, n_docs)(**mixed)
        return y[rows : rows + 1, before : before + length], final[mine : mine + 1]

    found, alone = (of_documents(pulled(run, inputs, BF16)) for run in (among, call(ours)))
    assert_equal(found, alone)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("spoilt", [1, 2, 4])
def test_what_is_not_finite_stays_in_its_document(spoilt: int, value: float, device: torch.device) -> None:
    doc_ids, n_docs = documents([70, 1000, 1430], [64, 2371, 65])
    inputs = next(lots(2500, n_docs, device))
    there = (doc_ids == spoilt).to(device)
    wrong = dict(inputs)
    for name in PER_TOKEN:
        wrong[name] = inputs[name].clone()
        wrong[name][there] = value
    wrong["initial_state"] = inputs["initial_state"].clone()
    wrong["initial_state"][spoilt] = value
    run = call(ours, doc_ids, n_docs)
    good, bad = pulled(run, inputs, BF16), pulled(run, wrong, BF16)
    others = torch.arange(n_docs, device=device) != spoilt
    for name in ("output 0", *(f"grad {name}" for name in PER_TOKEN)):
        assert torch.equal(good[name][~there], bad[name][~there]), name
    for name in ("output 1", "grad initial_state"):
        assert torch.equal(good[name][others], bad[name][others]), name
    assert not bad["output 1"][spoilt].isfinite().all()


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
def test_the_same_bits_each_time(packed: bool, device: torch.device) -> None:
    doc_ids, n_docs = cut_rows(2, 4096) if packed else (None, 2)
    inputs = next(lots(4096, n_docs, device, heads=12, groups=1))
    first = pulled(call(ours, doc_ids, n_docs), inputs, BF16)
    for _ in range(10):
        assert_equal(pulled(call(ours, doc_ids, n_docs), inputs, BF16), first)


@pytest.mark.parametrize("at,width,taken", [(8, 24, True), (1, 8, False), (0, 3, False)])
def test_views_of_a_wider_tensor(
    at: int, width: int, taken: bool, device: torch.device, passes: list[bool]
) -> None:
    """Read in place where 16 bytes can be copied at once, else left to the other kernels."""
    inputs = next(lots(1100, 2, device, N=64))
    truth = pulled(call(ours, None, 2), inputs, BF16)
    assert passes == [False, False, True]  # forward, again for its states, and back
    x = inputs["x"]
    wide = torch.full((2, 1100, x[0, 0].numel() + width), torch.nan, dtype=BF16, device=device)
    inside = slice(at, at + x[0, 0].numel())
    wide[..., inside] = x.flatten(2)

    def view(x: Tensor, **rest: Tensor) -> tuple[Tensor, ...]:
        return call(ours, None, 2)(x=x[..., inside].unflatten(2, (8, 64)), **rest)

    found = pulled(view, inputs | {"x": wide}, BF16)
    found["grad x"] = found["grad x"][..., inside].unflatten(2, (8, 64))
    assert passes == [False, False, True] * (1 + taken)
    if taken:
        assert_equal(found, truth)
    else:
        assert_all_close(found, truth, 1e-2)


def test_document_ids_with_room_between_rows(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a slice of wider ones has."""
    monkeypatch.setattr(hopper, "window_length", lambda heads: 128)
    doc_ids, n_docs = documents([10, 502], [512])
    inputs = lasting(512, n_docs, device)
    wide = torch.zeros(2, 652, dtype=torch.int32, device=device)
    wide[:, :512] = doc_ids
    found, truth = (pulled(call(ours, ids, n_docs), inputs, BF16) for ids in (wide[:, :512], doc_ids))
    assert_equal(found, truth)


def test_large_decays(device: torch.device) -> None:
    """Steps from 1e-8 to 100 and A from -1e-4 to -1e4: states that stay, and that are gone in one token."""
    doc_ids, n_docs = documents([65, 1100, 35], [1200])
    inputs = next(lots(1200, n_docs, device, ("D", "initial_state")))
    inputs["A"] = -torch.logspace(-4, 4, 8, device=device)
    uniform = torch.rand(inputs["dt"].shape, generator=torch.Generator().manual_seed(2))
    inputs["dt"] = (1e-8 * 1e10**uniform).to(device, BF16)
    run = partial(call, doc_ids=doc_ids, n_docs=n_docs, dt_softplus=False)
    found = pulled(run(ours), inputs, BF16)
    truth = pulled(run(reference), doubled(inputs), BF16)
    assert all(t.isfinite().all() for t in found.values())
    far = {name: distance(found[name], exact) for name, exact in truth.items()}
    assert max(far.values()) < 1e-2, far

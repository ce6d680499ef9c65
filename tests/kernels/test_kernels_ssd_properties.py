"""What must hold of SSD whatever its numbers, and what happens at the ends of the number range."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels.cases import assert_all_close, cut_rows, distance, outputs_and_grads, spans
from kernels.oracle_ssd import ssd_oracle
from ssmtrain.kernels.ssd import ssd

LENGTH = 131


def make_inputs(length: int = LENGTH, batch: int = 2, heads: int = 4, groups: int = 2) -> dict[str, Tensor]:
    """Random float64 inputs, steps between about 0.05 and 3."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "x": normal(batch, length, heads, 3),
        "dt": normal(batch, length, heads) - 0.5,
        "A": -normal(heads).exp() * 0.2,
        "B": normal(batch, length, groups, 5),
        "C": normal(batch, length, groups, 5),
    }


def cut(inputs: dict[str, Tensor], row: slice, time: slice) -> dict[str, Tensor]:
    """The same inputs over some rows and tokens."""
    return {name: t[row, time] if t.dim() > 1 else t for name, t in inputs.items()}


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
def test_chunk_size_changes_nothing(packed: bool) -> None:
    doc_ids, n_docs = cut_rows(2, LENGTH) if packed else (None, 2)
    inputs = make_inputs()

    def run(chunk: int | None) -> dict[str, Tensor]:
        options = {"chunk_size": chunk, "doc_ids": doc_ids, "n_docs": n_docs, "return_final_state": True}
        return outputs_and_grads(lambda leaves: ssd(**leaves, **options), inputs)

    truth = run(None)
    for chunk in (16, 32, 128, 256):
        assert_all_close(run(chunk), truth, 1e-11)


@pytest.mark.parametrize("at", [1, 40, 64, 130])
def test_split_and_carry_equals_the_whole(at: int) -> None:
    inputs = make_inputs()

    def whole(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return ssd(**leaves, return_final_state=True)

    def halves(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        everything = slice(None)
        first, state = ssd(**cut(leaves, everything, slice(0, at)), return_final_state=True)
        second, state = ssd(
            **cut(leaves, everything, slice(at, None)), initial_state=state, return_final_state=True
        )
        return torch.cat([first, second], 1), state

    assert_all_close(outputs_and_grads(halves, inputs), outputs_and_grads(whole, inputs), 1e-11)


def test_packed_documents_equal_documents_apart() -> None:
    doc_ids, n_docs = cut_rows(2, LENGTH)
    inputs = make_inputs() | {"initial_state": torch.randn(n_docs, 4, 3, 5, dtype=torch.float64)}

    def packed(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return ssd(**leaves, doc_ids=doc_ids, n_docs=n_docs, return_final_state=True)

    def apart(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        tensors = {name: t for name, t in leaves.items() if name != "initial_state"}
        y, states = torch.zeros_like(leaves["x"]), []
        for doc, (row, start, end) in enumerate(spans(doc_ids)):
            here = cut(tensors, slice(row, row + 1), slice(start, end))
            initial = leaves["initial_state"][doc : doc + 1]
            out, state = ssd(**here, initial_state=initial, return_final_state=True)
            y[row, start:end] = out[0]
            states.append(state)
        return y, torch.cat(states)

    ours, truth = outputs_and_grads(packed, inputs), outputs_and_grads(apart, inputs)
    assert_all_close(ours, truth, 1e-13)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
def test_strictly_causal_and_blind_across_documents(packed: bool) -> None:
    doc_ids, n_docs = cut_rows(2, LENGTH) if packed else (None, 2)
    inputs = {name: t.float() for name, t in make_inputs().items()}
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    y, _ = ssd(**leaves, doc_ids=doc_ids, n_docs=n_docs)
    for t in (0, 63, 100):
        changed = {n: v.clone() for n, v in inputs.items()}
        for name in ("x", "dt", "B", "C"):
            changed[name][:, t + 1 :] += 1.0
        after, _ = ssd(**changed, doc_ids=doc_ids, n_docs=n_docs)
        assert torch.equal(after[:, : t + 1], y[:, : t + 1])
        assert not torch.equal(after[:, t + 1 :], y[:, t + 1 :])
        grads = torch.autograd.grad(
            y[:, t].sum(), [leaves[n] for n in ("x", "dt", "B", "C")], retain_graph=True
        )
        assert all((grad[:, t + 1 :] == 0).all() for grad in grads)
        if packed:
            other = doc_ids != doc_ids[:, t : t + 1]
            assert all((grad[other] == 0).all() for grad in grads)


def test_linear_in_x_and_in_the_initial_state() -> None:
    inputs = make_inputs()
    x = inputs.pop("x")
    other, state = torch.randn_like(x), torch.randn(2, 4, 3, 5, dtype=torch.float64)
    one, _ = ssd(x=x, **inputs, initial_state=state)
    two, _ = ssd(x=other, **inputs)
    both, _ = ssd(x=2.0 * x - 3.0 * other, **inputs, initial_state=2.0 * state)
    torch.testing.assert_close(both, 2.0 * one - 3.0 * two, rtol=1e-11, atol=1e-11)
    assert (ssd(x=torch.zeros_like(x), **inputs)[0] == 0).all()


def test_step_zero_is_the_identity() -> None:
    inputs = make_inputs() | {"initial_state": torch.randn(2, 4, 3, 5, dtype=torch.float64)}
    inputs["dt"] = torch.zeros_like(inputs["dt"])
    y, state = ssd(**inputs, dt_softplus=False, return_final_state=True)
    assert torch.equal(state, inputs["initial_state"])
    held = inputs["initial_state"].unflatten(1, (2, 2))  # (B, G, H/G, P, N)
    seen = torch.einsum("bghpn,blgn->blghp", held, inputs["C"]).flatten(2, 3)
    torch.testing.assert_close(y, seen, rtol=1e-12, atol=1e-12)


def test_heads_and_rows_may_be_permuted() -> None:
    inputs = make_inputs(groups=1)
    y, _ = ssd(**inputs)
    heads, rows = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 0])
    moved = {name: t[rows] if t.dim() > 1 else t for name, t in inputs.items()}
    moved |= {"x": moved["x"][:, :, heads], "dt": moved["dt"][:, :, heads], "A": moved["A"][heads]}
    torch.testing.assert_close(ssd(**moved)[0], y[rows][:, :, heads], rtol=1e-12, atol=1e-12)


def test_views_of_a_wider_projection() -> None:
    inputs = make_inputs() | {"z": torch.randn(2, LENGTH, 4, 3, dtype=torch.float64)}
    truth = outputs_and_grads(lambda leaves: ssd(**leaves)[:1], inputs)
    sizes = {name: inputs[name][0, 0].numel() for name in ("z", "x", "B", "C", "dt")}
    wide = torch.cat([inputs[name].flatten(2) for name in sizes], -1)

    def run(leaves: dict[str, Tensor]) -> tuple[Tensor]:
        parts = leaves["wide"].split(list(sizes.values()), -1)
        views = {name: part.view(inputs[name].shape) for name, part in zip(sizes, parts, strict=True)}
        assert not views["x"].is_contiguous()
        return ssd(**views, A=leaves["A"])[:1]

    ours = outputs_and_grads(run, {"wide": wide, "A": inputs["A"]})
    torch.testing.assert_close(ours["output 0"], truth["output 0"], rtol=1e-12, atol=1e-12)
    expected = torch.cat([truth[f"grad {name}"].flatten(2) for name in sizes], -1)
    torch.testing.assert_close(ours["grad wide"], expected, rtol=1e-12, atol=1e-12)
    # Time major, and a gradient that is an expanded scalar.
    turned = {
        n: t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() > 1 else t for n, t in inputs.items()
    }
    torch.testing.assert_close(ssd(**turned)[0], truth["output 0"], rtol=1e-12, atol=1e-12)
    leaf = inputs["x"].clone().requires_grad_()
    ssd(**{**inputs, "x": leaf})[0].sum().backward()
    assert torch.isfinite(leaf.grad).all()


def extremes() -> dict[str, dict]:
    """Inputs at the ends of the range; A runs from -1e-4 to -1e3 over the heads."""
    generator = torch.Generator().manual_seed(3)
    length, heads = 200, 8
    base = make_inputs(length, heads=heads) | {"A": -torch.logspace(-4, 3, heads, dtype=torch.float64)}
    shape = base["dt"].shape

    def steps(low: float, high: float) -> Tensor:
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
        return torch.exp(uniform * (math.log(high) - math.log(low)) + math.log(low))

    ones = {name: torch.ones_like(base[name]) for name in ("x", "B", "C")}
    raw = {"dt_softplus": False}
    limited = {"dt_softplus": True, "dt_limit": (1e-4, 2.0)}
    infinite = base["dt"].clone()
    infinite[:, ::3] = math.inf
    return {
        "tiny steps": base | raw | {"dt": steps(1e-8, 1e-6)},
        "huge steps": base | raw | {"dt": steps(1.0, 50.0)},
        "mixed steps": base | raw | {"dt": steps(1e-8, 50.0)},
        "huge x": base | {"x": base["x"] * 1e4},
        "all equal": base | ones | {"dt": torch.ones(shape, dtype=torch.float64)},
        "all equal, huge steps": base | ones | raw | {"dt": torch.full(shape, 50.0, dtype=torch.float64)},
        "softplus far out": base | {"dt": torch.where(base["dt"] > -0.5, 80.0, -80.0).double()},
        "infinite, limited": base | limited | {"dt": infinite},
    }


@pytest.mark.parametrize("name", list(extremes()))
def test_extremes_stay_finite_and_near_float64(name: str) -> None:
    inputs = extremes()[name]
    options = {key: inputs.pop(key) for key in ("dt_softplus", "dt_limit") if key in inputs}
    truth = outputs_and_grads(lambda leaves: ssd_oracle(**leaves, **options), inputs)
    single = {key: t.float() for key, t in inputs.items()}
    ours = outputs_and_grads(lambda leaves: ssd(**leaves, return_final_state=True, **options), single)
    assert all(torch.isfinite(value).all() for value in ours.values())
    if name == "infinite, limited":
        # The limit has no slope outside; the oracle's softplus gives nan there.
        stuck = torch.isinf(inputs["dt"])
        assert (ours["grad dt"][stuck] == 0).all()
        truth["grad dt"] = torch.where(stuck, 0.0, truth["grad dt"])
    far = {key: distance(ours[key], truth[key]) for key in truth}
    # Sums of log decays of hundreds cost digits beside steps of 1e-8; all else is rounding.
    assert max(far.values()) < (2e-4 if name == "mixed steps" else 1e-5), far

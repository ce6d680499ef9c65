"""Properties of the selective scan that hold whatever computes it, and its extremes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.cases import assert_all_close, cut_rows, distance, outputs_and_grads, spans
from kernels.oracle_selective_scan import make_inputs, selective_scan_oracle
from ssmtrain.kernels.selective_scan import recurrence, selective_scan, selective_scan_step

TIMED = ("u", "dt", "B", "C", "z")


def scan_all(inputs: dict[str, Tensor], **options) -> tuple[Tensor, Tensor]:
    y, state = selective_scan(**inputs, return_final_state=True, **options)
    assert state is not None
    return y, state


def cut(inputs: dict[str, Tensor], start: int, end: int) -> dict[str, Tensor]:
    return {name: t[:, start:end] if name in TIMED else t for name, t in inputs.items()}


def test_blocks_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    doc_ids, n_docs = cut_rows(2, 130)
    inputs = make_inputs(130, n_docs)

    def run(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return scan_all(leaves, doc_ids=doc_ids, n_docs=n_docs)

    truth = outputs_and_grads(run, inputs)
    for block in (1, 7, 16, 32, 64, 128, 256):
        monkeypatch.setattr(recurrence, "block_tokens", lambda *_, block=block: block)
        assert_all_close(outputs_and_grads(run, inputs), truth, 1e-13)


@pytest.mark.parametrize("where", [1, 64, 99])
def test_split_and_carry_equals_whole(where: int) -> None:
    inputs = make_inputs(100, 2)

    def split(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        first, state = scan_all(cut(leaves, 0, where))
        second, state = scan_all({**cut(leaves, where, 100), "initial_state": state})
        return torch.cat([first, second], dim=1), state

    assert_all_close(outputs_and_grads(split, inputs), outputs_and_grads(scan_all, inputs), 1e-12)


def test_steps_equal_the_scan() -> None:
    inputs = make_inputs(37, 2)
    truth, final = scan_all(inputs)
    state = inputs["initial_state"].clone()
    storage = state.data_ptr()
    for t in range(37):
        token = {name: inputs[name][:, t] for name in TIMED}
        y = selective_scan_step(state, **token, A=inputs["A"], D=inputs["D"], dt_bias=inputs["dt_bias"])
        torch.testing.assert_close(y, truth[:, t], rtol=1e-12, atol=1e-12)
    assert state.data_ptr() == storage
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


def test_packed_documents_equal_documents_apart() -> None:
    doc_ids, n_docs = cut_rows(2, 150)
    inputs = make_inputs(150, n_docs)

    def packed(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return scan_all(leaves, doc_ids=doc_ids, n_docs=n_docs)

    def apart(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        outs, states = [], []
        for document, (row, start, end) in enumerate(spans(doc_ids)):
            own = {name: t[row : row + 1] if name in TIMED else t for name, t in leaves.items()}
            own["initial_state"] = leaves["initial_state"][document : document + 1]
            y, state = scan_all(cut(own, start, end))
            outs.append(y[0])
            states.append(state)
        return torch.cat(outs).view(2, 150, -1), torch.cat(states)

    assert_all_close(outputs_and_grads(packed, inputs), outputs_and_grads(apart, inputs), 1e-12)


@pytest.mark.parametrize("name", TIMED)
def test_the_future_changes_nothing_before_it(name: str) -> None:
    inputs = {key: tensor.float() for key, tensor in make_inputs(90, 2).items()}
    before, _ = scan_all(inputs)
    changed = inputs[name].clone()
    changed[:, 40:] += 3.0
    after, _ = scan_all({**inputs, name: changed})
    assert torch.equal(before[:, :40], after[:, :40]) and not torch.equal(before[:, 40:], after[:, 40:])
    leaf = inputs[name].clone().requires_grad_()
    scan_all({**inputs, name: leaf})[0][:, 39].sum().backward()
    assert leaf.grad is not None
    assert not leaf.grad[:, 40:].any() and leaf.grad[:, :40].any()


def test_linear_in_its_input_and_state() -> None:
    one, two = make_inputs(50, 2), make_inputs(50, 2)
    two |= {"u": torch.roll(one["u"], 1, 1), "initial_state": torch.roll(one["initial_state"], 1, 0)}
    mixed = {**one, **{key: 2 * one[key] - 3 * two[key] for key in ("u", "initial_state")}}
    for mix, a, b in zip(scan_all(mixed), scan_all(one), scan_all(two), strict=True):
        torch.testing.assert_close(mix, 2 * a - 3 * b, rtol=1e-11, atol=1e-11)
    zero = {**one, "u": torch.zeros_like(one["u"]), "initial_state": torch.zeros_like(one["initial_state"])}
    assert not any(out.any() for out in scan_all(zero))


def test_rows_do_not_know_their_place() -> None:
    inputs = make_inputs(70, 3, batch=3)
    order = torch.tensor([2, 0, 1])
    moved = {k: t[order] if k in (*TIMED, "initial_state") else t for k, t in inputs.items()}
    for out, base in zip(scan_all(moved), scan_all(inputs), strict=True):
        torch.testing.assert_close(out, base[order], rtol=1e-13, atol=1e-13)


def test_a_zero_step_keeps_the_state() -> None:
    inputs = make_inputs(30, 2, ("initial_state",))
    inputs["dt"] = torch.zeros_like(inputs["dt"])
    y, state = scan_all(inputs, dt_softplus=False)
    assert torch.equal(state, inputs["initial_state"])
    read = torch.einsum("ben,bln->ble", inputs["initial_state"], inputs["C"])
    torch.testing.assert_close(y, read, rtol=1e-13, atol=1e-13)


def test_strides_do_not_matter() -> None:
    inputs = make_inputs(67, 2)
    wide = torch.randn(2, 67, 40, dtype=torch.float64)
    views = {"dt": wide[..., 5:8], "B": wide[..., 9:13], "C": wide[..., 14:18], "z": wide[..., 20:26:2]}
    strange = inputs | {name: view.copy_(inputs[name]) for name, view in views.items()}
    swapped = {"u": (0, 1), "A": (0, 1), "initial_state": (0, 2)}
    strange |= {
        name: inputs[name].transpose(*axes).contiguous().transpose(*axes) for name, axes in swapped.items()
    }
    assert not any(strange[name].is_contiguous() for name in (*views, *swapped))

    def gradients(tensors: dict[str, Tensor]) -> list[Tensor]:
        leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
        y, state = scan_all(leaves)
        # The gradient that comes back has strides of its own too.
        loss = (y.transpose(1, 2).contiguous() ** 2).sum() + state.sum()
        return [y, state, *torch.autograd.grad(loss, list(leaves.values()))]

    plain = {name: tensor.clone() for name, tensor in inputs.items()}
    for ours, theirs in zip(gradients(strange), gradients(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decay", [-1e-4, -1.0, -1e3])
@pytest.mark.parametrize("step", [1e-8, 1e-3, 1.0, 50.0])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_extremes_stay_finite_and_accurate(decay: float, step: float, size: float) -> None:
    inputs = make_inputs(130, 2, ("D", "z", "initial_state"))
    inputs |= {
        "u": inputs["u"] * size,
        "A": torch.full_like(inputs["A"], decay),
        "dt": torch.full_like(inputs["dt"], step),
    }

    def ours(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return scan_all(leaves, dt_softplus=False)

    def oracle(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return selective_scan_oracle(**leaves, dt_softplus=False)

    truth = outputs_and_grads(oracle, inputs)
    found = outputs_and_grads(ours, {name: tensor.float() for name, tensor in inputs.items()})
    for name, value in found.items():
        assert value.isfinite().all(), name
        # Where fp32 decays to zero, the truth may be a number below fp32's smallest.
        small = truth[name].abs().max() < 1e-30
        assert (small and not value.any()) or distance(value, truth[name]) < 1e-5, name


def test_every_token_alike() -> None:
    inputs = make_inputs(200, 2, ("dt_bias",))
    alike = {name: t[:, :1].expand_as(t).clone() if name in TIMED else t for name, t in inputs.items()}
    truth = outputs_and_grads(lambda leaves: selective_scan_oracle(**leaves), alike)
    found = outputs_and_grads(scan_all, {name: tensor.float() for name, tensor in alike.items()})
    assert_all_close(found, truth, 1e-5)


@pytest.mark.parametrize("softplus", [True, False])
def test_an_infinite_step_meets_a_finite_limit(softplus: bool) -> None:
    inputs = make_inputs(40, 2, ("dt_bias",))
    endless = inputs["dt"].clone()
    endless[:, 7::9] = float("inf")
    huge = torch.where(endless.isinf(), 1e4, endless)
    options = {"dt_softplus": softplus, "dt_limit": (0.0, 2.5)}
    truth = outputs_and_grads(
        lambda leaves: selective_scan_oracle(**leaves, **options), inputs | {"dt": huge}
    )
    found = outputs_and_grads(lambda leaves: scan_all(leaves, **options), inputs | {"dt": endless})
    assert_all_close(found, truth, 1e-12)

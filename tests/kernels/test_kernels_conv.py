"""The causal convolution against its oracle: outputs, windows and every gradient; and its properties."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kernels.cases import LENGTHS, assert_all_close, cut_rows, outputs_and_grads, spans
from kernels.oracle_causal_conv1d import causal_conv1d_oracle
from ssmtrain.kernels.causal_conv1d import causal_conv1d, causal_conv1d_step, rows


def make_inputs(length: int, n_docs: int, state: bool, taps: int = 4, channels: int = 5) -> dict[str, Tensor]:
    """Random float64 inputs."""
    generator = torch.Generator().manual_seed(length + taps)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = {"x": normal(2, length, channels), "weight": normal(channels, taps), "bias": normal(channels)}
    return inputs | ({"initial_state": normal(n_docs, channels, taps)} if state else {})


def both(
    inputs: dict[str, Tensor], doc_ids: Tensor | None, n_docs: int, activation: str | None = "silu"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and gradients of the kernel and of the oracle."""
    packed = {"doc_ids": doc_ids, "activation": activation}
    ours = outputs_and_grads(
        lambda leaves: causal_conv1d(**leaves, **packed, n_docs=n_docs, return_final_state=True), inputs
    )
    return ours, outputs_and_grads(lambda leaves: causal_conv1d_oracle(**leaves, **packed), inputs)


@pytest.fixture(params=["small pieces", "whole rows"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Walk over rows in pieces of 16 tokens, or of several rows."""
    if request.param == "small pieces":
        monkeypatch.setattr(rows, "CACHE", 1)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("length", LENGTHS)
def test_matches_the_oracle_at_every_length(length: int, packed: bool) -> None:
    doc_ids, n_docs = cut_rows(2, length) if packed else (None, 2)
    ours, truth = both(make_inputs(length, n_docs, state=True), doc_ids, n_docs)
    assert all(value.dtype == torch.float64 for value in ours.values())
    assert_all_close(ours, truth, 1e-12)


CASES = list(itertools.product([2, 3, 4], [False, True], [False, True], [None, "silu"]))


@pytest.mark.parametrize("taps,packed,state,activation", CASES)
def test_matches_the_oracle_with_each_option(
    taps: int, packed: bool, state: bool, activation: str | None
) -> None:
    doc_ids, n_docs = cut_rows(2, 13) if packed else (None, 2)
    inputs = make_inputs(13, n_docs, state, taps)
    if not state:
        del inputs["bias"]
    ours, truth = both(inputs, doc_ids, n_docs, activation)
    assert_all_close(ours, truth, 1e-12)


def test_fp32_and_extremes_stay_near_float64() -> None:
    doc_ids, n_docs = cut_rows(2, 65)
    inputs = make_inputs(65, n_docs, state=True)
    for scale in (1.0, 1e4, 1e-30):
        scaled = inputs | {"x": inputs["x"] * scale}
        _, truth = both(scaled, doc_ids, n_docs)
        ours, _ = both({name: t.float() for name, t in scaled.items()}, doc_ids, n_docs)
        assert all(torch.isfinite(value).all() for value in ours.values())
        assert_all_close(ours, truth, 1e-6)


def test_gradcheck() -> None:
    inputs = make_inputs(6, 3, state=True, channels=2)
    doc_ids = torch.tensor([[0, 0, 0, 0, 1, 1], [2, 2, 2, 2, 2, 2]])

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(inputs, tensors, strict=True))
        return causal_conv1d(**named, doc_ids=doc_ids, n_docs=3, return_final_state=True)

    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in inputs.values()], fast_mode=True)


@pytest.mark.parametrize("at", [1, 3, 20])
def test_split_and_carry_equals_the_whole(at: int) -> None:
    inputs = make_inputs(23, 2, state=True)
    y, final = causal_conv1d(**inputs, return_final_state=True)
    rest = {name: inputs[name] for name in ("weight", "bias")}
    state, x = inputs["initial_state"], inputs["x"]
    first, state = causal_conv1d(x[:, :at], **rest, initial_state=state, return_final_state=True)
    second, state = causal_conv1d(x[:, at:], **rest, initial_state=state, return_final_state=True)
    torch.testing.assert_close(torch.cat([first, second], 1), y, rtol=1e-13, atol=1e-13)
    assert torch.equal(state, final)


def test_packed_documents_equal_documents_apart() -> None:
    doc_ids, n_docs = cut_rows(2, 70)
    inputs = make_inputs(70, n_docs, state=False)
    y, final = causal_conv1d(**inputs, doc_ids=doc_ids, n_docs=n_docs, return_final_state=True)
    for doc, (row, start, end) in enumerate(spans(doc_ids)):
        alone, state = causal_conv1d(
            inputs["x"][row : row + 1, start:end], inputs["weight"], inputs["bias"], return_final_state=True
        )
        torch.testing.assert_close(y[row, start:end], alone[0], rtol=1e-13, atol=1e-13)
        assert torch.equal(final[doc], state[0])


def test_steps_equal_the_pass() -> None:
    inputs = make_inputs(9, 2, state=True)
    y, final = causal_conv1d(**inputs, return_final_state=True)
    state = inputs["initial_state"].clone()
    storage = state.data_ptr()
    for t in range(9):
        out = causal_conv1d_step(state, inputs["x"][:, t], inputs["weight"], inputs["bias"])
        torch.testing.assert_close(out, y[:, t], rtol=1e-13, atol=1e-13)
    assert torch.equal(state, final) and state.data_ptr() == storage


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
def test_strictly_causal(packed: bool) -> None:
    doc_ids, n_docs = cut_rows(2, 40) if packed else (None, 2)
    inputs = {name: t.float() for name, t in make_inputs(40, n_docs, state=False).items()}
    y, _ = causal_conv1d(**inputs, doc_ids=doc_ids, n_docs=n_docs)
    for t in (0, 1, 15, 16, 30):
        x = inputs["x"].clone()
        x[:, t + 1 :] += 1.0
        after, _ = causal_conv1d(**{**inputs, "x": x}, doc_ids=doc_ids, n_docs=n_docs)
        assert torch.equal(after[:, : t + 1], y[:, : t + 1])
        assert not torch.equal(after[:, t + 1 :], y[:, t + 1 :])


def test_views_of_a_wider_projection_and_half_precision() -> None:
    inputs = make_inputs(40, 2, state=False)
    wide = torch.randn(2, 40, 11, dtype=torch.float64)
    wide[..., 3:8] = inputs["x"]
    y, _ = causal_conv1d(**inputs)
    view, _ = causal_conv1d(wide[..., 3:8], inputs["weight"], inputs["bias"])
    torch.testing.assert_close(view, y, rtol=1e-13, atol=1e-13)
    leaf = inputs["x"].to(torch.bfloat16).requires_grad_()
    weight, bias = inputs["weight"].float(), inputs["bias"].float()
    with torch.autocast("cpu", torch.bfloat16):
        low, _ = causal_conv1d(leaf, weight, bias)
    exact, _ = causal_conv1d(leaf.detach().float(), weight, bias)
    assert low.dtype == torch.bfloat16 and torch.equal(low, exact.bfloat16())
    low.float().sum().backward()
    assert leaf.grad.dtype == torch.bfloat16 and torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize(
    "change,words",
    [
        ({"weight": torch.zeros(5, 5)}, "2..4"),
        ({"weight": torch.zeros(4, 4)}, "weight"),
        ({"activation": "relu"}, "silu"),
        ({"initial_state": torch.zeros(3, 5, 4)}, "initial_state"),
        ({"doc_ids": torch.zeros(2, 9, dtype=torch.int32)}, "n_docs"),
    ],
)
def test_arguments_that_disagree_are_named(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        causal_conv1d(**{**make_inputs(9, 2, state=False), **change})

"""Selective scan against the step-by-step oracle: outputs, final states and every gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kernels.cases import LENGTHS, assert_all_close, cut_rows, distance, outputs_and_grads
from kernels.oracle_selective_scan import make_inputs, selective_scan_oracle
from ssmtrain.kernels.selective_scan import recurrence, selective_scan


def both(
    inputs: dict[str, Tensor],
    doc_ids: Tensor | None,
    n_docs: int,
    final: bool = True,
    dtype: torch.dtype = torch.float64,
    **options,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and gradients of the kernel, at the dtype, and of the oracle."""

    def kernel(leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        y, state = selective_scan(
            **leaves, doc_ids=doc_ids, n_docs=n_docs, return_final_state=final, **options
        )
        assert final or state is None
        return (y, state) if final else (y,)

    def oracle(leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        out = selective_scan_oracle(**leaves, doc_ids=doc_ids, **options)
        return out if final else out[:1]

    ours = outputs_and_grads(kernel, {name: tensor.to(dtype) for name, tensor in inputs.items()})
    return ours, outputs_and_grads(oracle, inputs)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("length", LENGTHS)
def test_matches_the_oracle_at_every_length(length: int, packed: bool) -> None:
    doc_ids, n_docs = cut_rows(2, length) if packed else (None, 2)
    inputs = make_inputs(length, n_docs)
    ours, truth = both(inputs, doc_ids, n_docs)
    assert all(value.dtype == torch.float64 for value in ours.values())
    assert_all_close(ours, truth, 1e-11)
    # In fp32 the same case stays within the rounding of fp32.
    ours, _ = both(inputs, doc_ids, n_docs, dtype=torch.float32)
    assert_all_close(ours, truth, 1e-5)


@pytest.mark.parametrize("block", [1, 3, 16])
@pytest.mark.parametrize("packed,final", itertools.product([False, True], [False, True]))
@pytest.mark.parametrize("optional", [(), ("initial_state",), ("D", "z"), ("dt_bias", "initial_state")])
def test_matches_the_oracle_with_each_option(
    optional: tuple[str, ...], packed: bool, final: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recurrence, "block_tokens", lambda *_: block)
    doc_ids, n_docs = cut_rows(2, 37) if packed else (None, 2)
    ours, truth = both(make_inputs(37, n_docs, optional), doc_ids, n_docs, final)
    assert_all_close(ours, truth, 1e-11)


@pytest.mark.parametrize(
    "options",
    [
        {"dt_softplus": False},
        {"dt_softplus": False, "dt_limit": (0.1, 0.9)},
        {"dt_softplus": True, "dt_limit": (0.05, 0.4)},
    ],
)
def test_step_sizes_and_their_limits(options: dict) -> None:
    inputs = make_inputs(21, 2, ("dt_bias",))
    inputs["dt"][0, 3:6] = 50.0
    ours, truth = both(inputs, None, 2, **options)
    assert_all_close(ours, truth, 1e-11)


def test_only_the_final_state_in_the_loss() -> None:
    inputs = make_inputs(19, 2, ("initial_state",))

    def last(run):
        return lambda leaves: (run(**leaves)[1],)

    ours = outputs_and_grads(last(lambda **leaves: selective_scan(**leaves, return_final_state=True)), inputs)
    truth = outputs_and_grads(last(selective_scan_oracle), inputs)
    # C does not reach the state: no gradient in the oracle, zeros here.
    assert not ours.pop("grad C").any()
    assert_all_close(ours, truth, 1e-11)


def test_gradcheck_with_documents_and_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrence, "block_tokens", lambda *_: 2)
    doc_ids = torch.tensor([[0, 0, 0, 1, 1], [2, 3, 3, 3, 3]])
    inputs = make_inputs(5, 4, width=2, n=2)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(inputs, tensors, strict=True))
        return selective_scan(**named, doc_ids=doc_ids, n_docs=4, return_final_state=True)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(dtype: torch.dtype) -> None:
    narrow = ("u", "dt", "B", "C", "z")
    inputs = make_inputs(70, 2)
    half = {name: t.to(dtype) if name in narrow else t.float() for name, t in inputs.items()}
    y, state = selective_scan(**half, return_final_state=True)
    assert y.dtype == dtype and state.dtype == torch.float32
    exact, exact_state = selective_scan(**{k: t.float() for k, t in half.items()}, return_final_state=True)
    assert torch.equal(y, exact.to(dtype)) and torch.equal(state, exact_state)


def test_autocast_does_not_reach_inside() -> None:
    inputs = {name: tensor.float() for name, tensor in make_inputs(70, 2, ("D", "z")).items()}
    plain = outputs_and_grads(lambda leaves: selective_scan(**leaves)[:1], inputs)
    with torch.autocast("cpu", torch.bfloat16):
        cast = outputs_and_grads(lambda leaves: selective_scan(**leaves)[:1], inputs)
    assert all(torch.equal(plain[name], cast[name]) for name in plain)


def test_a_long_document_keeps_its_accuracy() -> None:
    """Rounding does not pile up over 20,000 tokens of slow decay, as it would in a cumulative sum of dt A."""
    inputs = make_inputs(20000, 1, ("dt_bias",), batch=1, width=2, n=2)
    inputs["A"] = inputs["A"] * 0.01
    exact, _ = selective_scan(**inputs)
    y, _ = selective_scan(**{name: tensor.float() for name, tensor in inputs.items()})
    assert distance(y[:, -1000:], exact[:, -1000:]) < 2e-6


def test_states_of_all_tokens_are_never_kept() -> None:
    inputs = {
        name: tensor.float().requires_grad_() for name, tensor in make_inputs(2048, 1, batch=1, n=64).items()
    }
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        y, _ = selective_scan(**inputs)
    states = y.numel() * 64
    inputs_kept = sum(tensor.numel() for tensor in inputs.values())
    assert sum(kept.values()) < states / 16 + 2 * inputs_kept


@pytest.mark.parametrize(
    "change,words",
    [
        ({"A": torch.zeros(3, 2)}, "B"),
        ({"A": torch.zeros(2, 4)}, "A"),
        ({"dt": torch.zeros(2, 9, 1)}, "dt"),
        ({"D": torch.zeros(4)}, "D"),
        ({"initial_state": torch.zeros(3, 3, 4)}, "initial_state"),
        ({"doc_ids": torch.zeros(2, 9, dtype=torch.int32)}, "n_docs"),
        ({"doc_ids": torch.tensor([[0] * 9, [1] * 9]), "n_docs": 3}, "hold 2 documents"),
        ({"n_docs": 5}, "n_docs"),
    ],
)
def test_shapes_that_disagree_are_named(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        selective_scan(**{**make_inputs(9, 2, ()), **change})


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
def test_the_gpu_agrees_with_the_oracle(packed: bool) -> None:
    doc_ids, n_docs = cut_rows(2, 257) if packed else (None, 2)
    inputs = make_inputs(257, n_docs)
    ids = None if doc_ids is None else doc_ids.cuda()

    def kernel(leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return selective_scan(**leaves, doc_ids=ids, n_docs=n_docs, return_final_state=True)

    def oracle(leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return selective_scan_oracle(**leaves, doc_ids=doc_ids)

    truth = outputs_and_grads(oracle, inputs)
    ours = outputs_and_grads(
        lambda leaves: tuple(out.cpu() for out in kernel({k: t.cuda() for k, t in leaves.items()})),
        {name: tensor.float() for name, tensor in inputs.items()},
    )
    assert_all_close(ours, truth, 1e-5)

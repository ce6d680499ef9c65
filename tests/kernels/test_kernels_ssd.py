"""SSD against the step-by-step oracle: outputs, final states and every gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kernels.cases import LENGTHS, assert_all_close, cut_rows, outputs_and_grads
from kernels.oracle_ssd import ssd_oracle
from ssmtrain.kernels.ssd import ssd, ssd_step

TENSORS = ("x", "dt", "A", "B", "C")
OPTIONAL = ("D", "z", "dt_bias", "initial_state")


def make_inputs(
    length: int,
    n_docs: int,
    optional: tuple[str, ...],
    groups: int = 1,
    wide_d: bool = False,
    *,
    batch: int = 2,
    heads: int = 4,
    head_dim: int = 3,
    n: int = 5,
) -> dict[str, Tensor]:
    """Random float64 inputs of moderate size; step sizes between about 0.1 and 2."""
    generator = torch.Generator().manual_seed(length + groups)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = {
        "x": normal(batch, length, heads, head_dim),
        "dt": normal(batch, length, heads) - 1,
        "A": -normal(heads).exp() * 0.3,
        "B": normal(batch, length, groups, n),
        "C": normal(batch, length, groups, n),
        "D": normal(heads, head_dim) if wide_d else normal(heads),
        "z": normal(batch, length, heads, head_dim),
        "dt_bias": normal(heads),
        "initial_state": normal(n_docs, heads, head_dim, n),
    }
    return {name: inputs[name] for name in (*TENSORS, *optional)}


def both(
    inputs: dict[str, Tensor], doc_ids: Tensor | None, n_docs: int, final: bool = True, **options
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and gradients of the kernel and of the oracle."""
    chunk = options.pop("chunk_size", None)

    def kernel(leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        packed = {"doc_ids": doc_ids, "n_docs": n_docs, "return_final_state": final, "chunk_size": chunk}
        y, state = ssd(**leaves, **packed, **options)
        return (y, state) if final else (y,)

    def oracle(leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        out = ssd_oracle(**leaves, doc_ids=doc_ids, **options)
        return out if final else out[:1]

    return outputs_and_grads(kernel, inputs), outputs_and_grads(oracle, inputs)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("length", LENGTHS)
def test_matches_the_oracle_at_every_length(length: int, packed: bool) -> None:
    doc_ids, n_docs = cut_rows(2, length) if packed else (None, 2)
    inputs = make_inputs(length, n_docs, OPTIONAL, groups=2)
    ours, truth = both(inputs, doc_ids, n_docs)
    assert all(value.dtype == torch.float64 for value in ours.values())
    assert_all_close(ours, truth, 1e-9)
    # In fp32 the same case stays within the rounding of fp32.
    options = {"doc_ids": doc_ids, "n_docs": n_docs, "return_final_state": True}
    single = {name: tensor.float() for name, tensor in inputs.items()}
    ours = outputs_and_grads(lambda leaves: ssd(**leaves, **options), single)
    assert_all_close(ours, truth, 1e-5)


OPTION_CASES = list(
    itertools.product([False, True], [(), ("initial_state",), ("D", "z")], [1, 4], [False, True])
)


@pytest.mark.parametrize("packed,optional,groups,final", OPTION_CASES)
def test_matches_the_oracle_with_each_option(
    packed: bool, optional: tuple[str, ...], groups: int, final: bool
) -> None:
    doc_ids, n_docs = cut_rows(2, 37) if packed else (None, 2)
    inputs = make_inputs(37, n_docs, optional, groups, wide_d=groups == 4)
    ours, truth = both(inputs, doc_ids, n_docs, final, chunk_size=16)
    assert_all_close(ours, truth, 1e-10)


@pytest.mark.parametrize(
    "options",
    [
        {"dt_softplus": False, "dt_limit": (0.0, float("inf"))},
        {"dt_softplus": False, "dt_limit": (0.1, 0.9)},
        {"dt_softplus": True, "dt_limit": (0.05, 0.4)},
    ],
)
def test_step_sizes_and_their_limits(options: dict) -> None:
    inputs = make_inputs(21, 2, ("dt_bias",))
    inputs["dt"][0, 3:6] = 50.0
    ours, truth = both(inputs, None, 2, chunk_size=8, **options)
    assert_all_close(ours, truth, 1e-10)


def test_missing_gradients_cost_nothing_and_change_nothing() -> None:
    """Inputs without requires_grad are accepted in any mixture."""
    inputs = make_inputs(20, 2, OPTIONAL)
    full, _ = both(inputs, None, 2)
    for name in inputs:
        leaf = inputs[name].clone().requires_grad_()
        y, state = ssd(**{**inputs, name: leaf}, return_final_state=True)
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(out.shape, generator=generator, dtype=torch.float64) for out in (y, state)]
        reached = [(out, c) for out, c in zip((y, state), cotangents, strict=True) if out.requires_grad]
        torch.autograd.backward(*zip(*reached, strict=True))
        assert_all_close({name: leaf.grad}, {name: full[f"grad {name}"]}, 1e-12)


def test_gradcheck_with_documents_and_states() -> None:
    doc_ids = torch.tensor([[0, 0, 0, 1, 1], [2, 3, 3, 3, 3]])
    inputs = make_inputs(5, 4, OPTIONAL, groups=2, heads=2, head_dim=2, n=2)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(inputs, tensors, strict=True))
        return ssd(**named, doc_ids=doc_ids, n_docs=4, chunk_size=2, return_final_state=True)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(dtype: torch.dtype) -> None:
    inputs = make_inputs(70, 2, ("D", "z", "dt_bias"))
    half = {
        name: t.to(dtype) if name in ("x", "dt", "B", "C", "z") else t.float() for name, t in inputs.items()
    }
    y, state = ssd(**half, return_final_state=True)
    assert y.dtype == dtype and state.dtype == torch.float32
    exact, exact_state = ssd(**{name: t.float() for name, t in half.items()}, return_final_state=True)
    assert torch.equal(y, exact.to(dtype)) and torch.equal(state, exact_state)


def test_autocast_does_not_reach_inside() -> None:
    inputs = {name: tensor.float() for name, tensor in make_inputs(70, 2, ("D",)).items()}
    plain, _ = ssd(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        leaf = inputs["x"].clone().requires_grad_()
        cast, _ = ssd(**{**inputs, "x": leaf})
    cast.sum().backward()
    other = inputs["x"].clone().requires_grad_()
    ssd(**{**inputs, "x": other})[0].sum().backward()
    assert torch.equal(plain, cast) and torch.equal(leaf.grad, other.grad)


@pytest.mark.parametrize("groups", [1, 2])
def test_steps_equal_the_scan(groups: int) -> None:
    inputs = make_inputs(37, 2, OPTIONAL, groups)
    truth, final = ssd(**inputs, return_final_state=True)
    # A state that a scan with gradients left must be one that steps can write to.
    _, left = ssd(**{**inputs, "x": inputs["x"].clone().requires_grad_()}, return_final_state=True)
    left.mul_(0.5)
    state = inputs["initial_state"].clone()
    storage = state.data_ptr()
    for t in range(37):
        token = {name: tensor[:, t] for name, tensor in inputs.items() if name in ("x", "dt", "B", "C", "z")}
        y = ssd_step(state, **token, A=inputs["A"], D=inputs["D"], dt_bias=inputs["dt_bias"])
        torch.testing.assert_close(y, truth[:, t], rtol=1e-10, atol=1e-10)
    assert state.data_ptr() == storage
    torch.testing.assert_close(state, final, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "change,words",
    [
        ({"A": torch.zeros(3)}, "A"),
        ({"B": torch.zeros(2, 9, 3, 5)}, "B"),
        ({"D": torch.zeros(5)}, "D"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"initial_state": torch.zeros(3, 4, 3, 5)}, "initial_state"),
        ({"doc_ids": torch.zeros(2, 9, dtype=torch.int32)}, "n_docs"),
    ],
)
def test_shapes_that_disagree_are_named(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ssd(**{**make_inputs(9, 2, ()), **change})

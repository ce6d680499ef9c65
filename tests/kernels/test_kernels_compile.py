"""torch.compile takes each op whole: no graph breaks, the same numbers (traced only: no compiler needed)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.cases import assert_all_close, cut_rows, outputs_and_grads
from ssmtrain.kernels import backend
from ssmtrain.kernels.causal_conv1d import causal_conv1d
from ssmtrain.kernels.gated_norm import gated_norm, stream_norm
from ssmtrain.kernels.ssd import ssd

LENGTH = 70
DOC_IDS, N_DOCS = cut_rows(2, LENGTH)


def normal(*shape: int) -> Tensor:
    """Normal numbers in float64."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def scan(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return ssd(**leaves, doc_ids=DOC_IDS, n_docs=N_DOCS, return_final_state=True)


def conv(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    wide = {**leaves, "x": leaves["x"][..., 2:8]}
    return causal_conv1d(**wide, doc_ids=DOC_IDS, n_docs=N_DOCS, return_final_state=True)


def norm(leaves: dict[str, Tensor]) -> tuple[Tensor]:
    return (gated_norm(**leaves, n_groups=2),)


def low_norm(leaves: dict[str, Tensor]) -> tuple[Tensor]:
    return (gated_norm(**leaves, out_dtype=torch.float32),)


def stream(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    x, y = stream_norm(leaves["x"] * 2, leaves["weight"], branch=leaves.get("branch"), scale=0.5)
    return x * 3, y


CASES: dict[str, tuple[Callable, dict[str, Tensor]]] = {
    "ssd": (
        scan,
        {
            "x": normal(2, LENGTH, 4, 3),
            "dt": normal(2, LENGTH, 4),
            "A": -normal(4).exp(),
            "B": normal(2, LENGTH, 2, 5),
            "C": normal(2, LENGTH, 2, 5),
            "D": normal(4),
            "initial_state": normal(N_DOCS, 4, 3, 5),
        },
    ),
    "causal_conv1d": (
        conv,
        {
            "x": normal(2, LENGTH, 9),
            "weight": normal(6, 4),
            "bias": normal(6),
            "initial_state": normal(N_DOCS, 6, 4),
        },
    ),
    "gated_norm": (norm, {"x": normal(2, 9, 8), "z": normal(2, 9, 8), "weight": normal(8)}),
    "gated_norm, rounded": (low_norm, {"x": normal(2, 9, 8), "z": normal(2, 9, 8), "weight": normal(8)}),
    "stream_norm": (stream, {"x": normal(2, 9, 8), "weight": normal(8)}),
    "stream_norm, of a sum": (
        stream,
        {"x": normal(2, 9, 8), "weight": normal(8), "branch": normal(2, 9, 8)},
    ),
}


@pytest.mark.parametrize("op", list(CASES))
def test_no_graph_breaks_and_the_same_numbers(op: str) -> None:
    backend.configure("auto", "cpu")
    run, inputs = CASES[op]
    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert_all_close(outputs_and_grads(compiled, inputs), outputs_and_grads(run, inputs), 1e-12)

"""What the kernel tests share: rows cut into documents, gradients by name, and distances."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

LENGTHS = (1, 2, 63, 64, 65, 255, 257, 1000)


def cut_rows(batch: int, length: int, seed: int = 0) -> tuple[Tensor, int]:
    """Cut rows at random places; where there is room, documents of one token at both ends of the first."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.empty(batch, length, dtype=torch.int32)
    document = 0
    for row in range(batch):
        cuts = torch.randint(1, max(length, 2), (3,), generator=generator).tolist()
        if row == 0:
            cuts += [1, length - 1]
        edges = sorted({0, length, *(cut for cut in cuts if 0 < cut < length)})
        for start, end in pairwise(edges):
            ids[row, start:end] = document
            document += 1
    return ids, document


def spans(doc_ids: Tensor) -> list[tuple[int, int, int]]:
    """List each document's (row, start, end) in order of its number."""
    found = []
    for document in range(int(doc_ids.max()) + 1):
        row, time = (doc_ids == document).nonzero(as_tuple=True)
        found.append((int(row[0]), int(time[0]), int(time[-1]) + 1))
    return found


def outputs_and_grads(
    run: Callable[[dict[str, Tensor]], tuple[Tensor, ...]], inputs: dict[str, Tensor], seed: int = 1
) -> dict[str, Tensor]:
    """Run on leaves made from inputs, pull random cotangents back; returns outputs and gradients by name."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    outputs = run(leaves)
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(out.shape, generator=generator, dtype=torch.float64) for out in outputs]
    torch.autograd.backward(outputs, [c.to(out.dtype) for c, out in zip(cotangents, outputs, strict=True)])
    result = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    return result | {f"grad {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def distance(value: Tensor, truth: Tensor) -> float:
    """Relative L2 distance, absolute where the truth is zero."""
    gap, size = (value.double() - truth.double()).norm(), truth.double().norm()
    return float(gap / size) if size > 0 else float(gap)


def assert_all_close(ours: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float) -> None:
    """Assert the same names, and each value within a relative L2 distance of the truth."""
    assert ours.keys() == truth.keys()
    far = {name: distance(ours[name], truth[name]) for name in truth}
    wrong = {name: d for name, d in far.items() if not d <= tolerance}
    assert not wrong, f"relative distance over {tolerance}: {wrong}"

"""What the tests of the Triton SSD share: inputs, the ops as functions of tensors, gradients by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from kernels.cases import assert_all_close, distance, spans
from kernels.oracle_ssd import ssd_oracle
from kernels.triton import same_dtype
from ssmtrain.kernels import tuned
from ssmtrain.kernels.ssd import reference
from ssmtrain.kernels.ssd import triton as ours

Results = dict[str, Tensor]
KEPT = {"A", "D", "dt_bias", "initial_state"}
"""What stays in fp32 when x has 16 bits."""
ALL = ("D", "dt_bias", "initial_state")
PER_TOKEN = ("x", "dt", "B", "C")


def draw(
    length: int,
    n_docs: int = 1,
    optional: tuple[str, ...] = ALL,
    *,
    batch: int = 1,
    heads: int = 2,
    groups: int = 1,
    P: int = 16,
    N: int = 16,
    wide_d: bool = False,
    seed: int = 0,
) -> Results:
    """Random inputs, float64 but with fp32's digits; step sizes between about 0.1 and 2."""
    generator = torch.Generator().manual_seed(1000 * seed + length + groups)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).double()

    inputs = {
        "x": normal(batch, length, heads, P),
        "dt": normal(batch, length, heads) - 1,
        "A": -normal(heads).exp() * 0.3,
        "B": normal(batch, length, groups, N),
        "C": normal(batch, length, groups, N),
        "D": normal(heads, P) if wide_d else normal(heads),
        "z": normal(batch, length, heads, P),
        "dt_bias": normal(heads),
        "initial_state": normal(n_docs, heads, P, N),
    }
    return {name: inputs[name] for name in ("x", "dt", "A", "B", "C", *optional)}


def rounded(inputs: Results, device: torch.device, dtype: torch.dtype = torch.float32) -> Results:
    """The inputs as the op gets them."""
    return {name: t.to(device, torch.float32 if name in KEPT else dtype) for name, t in inputs.items()}


def doubled(inputs: Results) -> Results:
    """The same numbers in float64."""
    return {name: t.double() for name, t in inputs.items()}


def call(
    module, doc_ids: Tensor | None = None, n_docs: int = 1, final: bool = True, **options
) -> Callable[..., tuple[Tensor, ...]]:
    """The op of a module as a function of its tensors."""
    settings = {"dt_softplus": True, "dt_limit": (0.0, None), "chunk_size": None} | options

    def run(**tensors: Tensor) -> tuple[Tensor, ...]:
        absent = {name: None for name in ("D", "z", "dt_bias", "initial_state") if name not in tensors}
        ids = None if doc_ids is None else doc_ids.to(tensors["x"].device)
        packed = {"doc_ids": ids, "n_docs": n_docs, "return_final_state": final}
        y, state = module.ssd(**tensors, **absent, **packed, **settings)
        return (y, state) if final else (y,)

    return run


def pulled(
    run: Callable[..., tuple[Tensor, ...]],
    inputs: Results,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    seed: int = 1,
) -> Results:
    """Outputs and gradients; cotangents are what `dtype` can hold."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    outputs = run(**leaves)
    device = outputs[0].device
    generator = torch.Generator(device).manual_seed(seed)
    cotangents = [scale * torch.randn(out.shape, generator=generator, device=device) for out in outputs]
    torch.autograd.backward(
        outputs, [c.to(dtype).to(out.dtype) for c, out in zip(cotangents, outputs, strict=True)]
    )
    result = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    return result | {f"grad {k}": leaf.grad for k, leaf in leaves.items() if leaf.grad is not None}


def oracle(
    inputs: Results, doc_ids: Tensor | None, dtype: torch.dtype = torch.float32, scale: float = 1.0, **options
) -> Results:
    """Outputs and gradients of the oracle, in float64, on the CPU."""
    options.pop("chunk_size", None)
    low, high = options.pop("dt_limit", (0.0, None))
    options["dt_limit"] = (low, float("inf") if high is None else high)
    exact = {name: t.double().cpu() for name, t in inputs.items()}
    return pulled(lambda **leaves: ssd_oracle(**leaves, doc_ids=doc_ids, **options), exact, dtype, scale)


def check(
    inputs: Results,
    doc_ids: Tensor | None,
    n_docs: int,
    device: torch.device,
    tolerance: float = 3e-6,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    of_steps: float | None = None,
    **options,
) -> None:
    """Hold outputs and gradients against the oracle's.

    Gradients of A and dt_bias are sums over tokens in which much cancels: ten times the tolerance, unless
    there is one of its own for these and that of dt.
    """
    low = rounded(inputs, device, dtype)
    found = pulled(call(ours, doc_ids, n_docs, **options), low, dtype, scale)
    found = {name: t.cpu() for name, t in found.items()}
    assert all(torch.isfinite(t).all() for t in found.values())
    truth = oracle(low, doc_ids, dtype, scale, **options)
    sums = ("grad A", "grad dt_bias") if of_steps is None else ("grad A", "grad dt_bias", "grad dt")
    apart = {name: truth.pop(name) for name in sums if name in truth}
    assert_all_close({name: found.pop(name) for name in apart}, apart, of_steps or 10 * tolerance)
    assert_all_close(found, truth, tolerance)


def strain(
    cases: Iterable[Results], doc_ids: Tensor | None = None, n_docs: int = 1, **options
) -> dict[str, float]:
    """Our distance from float64 over all cases, as a part of what test_triton_ssd.py allows."""
    squares: dict[str, Tensor] = {}
    counts: Counter[str] = Counter()
    for inputs in cases:
        dtype = inputs["x"].dtype
        run = partial(call, doc_ids=doc_ids, n_docs=n_docs, **options)
        found, upcast, narrow = (
            pulled(run(module), inputs, dtype) for module in (ours, reference, same_dtype)
        )
        truth = pulled(run(reference), doubled(inputs), dtype)
        for name, exact in truth.items():
            theirs = narrow[name] if narrow[name].dtype == torch.float32 else upcast[name]
            assert found[name].dtype == theirs.dtype and found[name].isfinite().all(), name
            norms = [(t.double() - exact).norm() ** 2 for t in (found[name], theirs)]
            squares[name] = squares.get(name, 0) + torch.stack([*norms, exact.norm() ** 2])
            counts[name] += exact.numel()
    ceiling = 1e-5 if dtype == torch.float32 else 1e-2
    strains = {}
    for name, sums in squares.items():
        error, their_error = (sums[:2] / sums[2]).sqrt().tolist()
        luck = 1 + 2 / counts[name] ** 0.5  # the error of a few sums is a matter of it
        allowed = 2 * luck * their_error if counts[name] >= 32 else ceiling
        strains[name] = error / min(allowed, ceiling)
    return strains


def use(
    monkeypatch: pytest.MonkeyPatch, blocks: int, heads: int | None = None, **changes: dict[str, int]
) -> None:
    """Make a chunk one block of tokens or two, a program take up to `heads` heads, and change tile sizes."""
    real = ours.configuration

    def configuration(kernel: str, shape: ours.Shape, Q: int, device: torch.device) -> tuned.Config:
        change = changes.get(kernel, {})
        config = real(kernel, shape, Q, device) | {"BM": Q // blocks}
        assert change.keys() <= config.keys(), f"{kernel} has no {change.keys() - config.keys()}"
        return config | change

    monkeypatch.setattr(ours, "configuration", configuration)
    if heads is not None:
        monkeypatch.setattr(ours, "_heads_at_once", lambda most, shape, chunks: min(heads, shape.per_group))
        monkeypatch.setattr(ours, "_heads_of_a_run", lambda shape, chunks: min(heads, shape.per_group))


def documents(*rows: list[int]) -> tuple[Tensor, int]:
    """Document ids from the lengths of each row's documents."""
    ids, count = [], 0
    for lengths in rows:
        numbers = torch.arange(count, count + len(lengths), dtype=torch.int32)
        ids.append(numbers.repeat_interleave(torch.tensor(lengths)))
        count += len(lengths)
    return torch.stack(ids), count


def part(inputs: Results, row: slice, time: slice) -> Results:
    """The same inputs over some rows and tokens, no states."""
    return {k: t[row, time] if k in PER_TOKEN else t for k, t in inputs.items() if k != "initial_state"}


def apart(doc_ids: Tensor, **options):
    """The op on each document alone, put together again."""
    run = call(ours, **options)

    def each(**tensors: Tensor) -> tuple[Tensor, Tensor]:
        rows: list[list[Tensor]] = [[] for _ in range(doc_ids.shape[0])]
        states = []
        for document, (row, start, end) in enumerate(spans(doc_ids)):
            here = part(tensors, slice(row, row + 1), slice(start, end))
            if "initial_state" in tensors:
                here["initial_state"] = tensors["initial_state"][document : document + 1]
            y, state = run(**here)
            rows[row].append(y)
            states.append(state)
        return torch.cat([torch.cat(ys, 1) for ys in rows]), torch.cat(states)

    return each


def assert_equal(found: Results, expected: Results, *sums: str) -> None:
    """Assert the same bits, but for sums over tokens, which may be added up in another order."""
    assert found.keys() == expected.keys()
    wrong = [k for k in expected if k.split()[-1] not in sums and not torch.equal(found[k], expected[k])]
    assert not wrong, wrong
    for name in sums:
        assert distance(found[f"grad {name}"], expected[f"grad {name}"]) < 2e-5, name


@pytest.fixture(autouse=True)
def quick_reduce(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, tl.reduce with a function of ours makes a call per element: here, per step of an axis."""

    def reduce(self: Any, inputs: tuple[Any, ...]) -> list[Any]:
        assert self.axis is not None and not self.keep_dims
        data = [np.moveaxis(arg.handle.data, self.axis, 0) for arg in inputs]
        total = tuple(self.to_tensor(d[0], arg.dtype) for d, arg in zip(data, inputs, strict=True))
        for step in range(1, data[0].shape[0]):
            here = (self.to_tensor(d[step], arg.dtype) for d, arg in zip(data, inputs, strict=True))
            total = self.combine_fn.fn(*total, *here)
        return list(total)

    monkeypatch.setattr(interpreter.ReduceOps, "generic_reduce", reduce)

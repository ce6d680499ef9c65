"""What the layer tests share: example configs by kind, built layers, packed rows, gradients by name."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from ssmtrain.layers.base import Context, Layer, LayerConfig, ParamSpec

D_MODEL = 16
LENGTH = 37
DOCUMENTS = ((1, 20, 16), (5, 32))
"""Lengths of the documents packed in each row."""


def page(kind: str) -> ModuleType | None:
    """The kind's own test file, which lists EXAMPLES, FP32 and NO_DECAY; None if there is none."""
    path = Path(__file__).parent / f"test_layers_{kind}.py"
    if not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location(f"layers_page_{kind}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def examples(kinds: dict[str, type[LayerConfig]]) -> dict[str, LayerConfig]:
    """Every example config of these kinds, by a readable name."""
    found: dict[str, LayerConfig] = {}
    for kind, config in kinds.items():
        for fields in getattr(page(kind), "EXAMPLES", []):
            label = ",".join(f"{k}={v}" for k, v in fields.items()) or "default"
            found[f"{kind}[{label}]"] = config.model_validate(fields)
    return found


def specs(layer: nn.Module) -> dict[str, ParamSpec]:
    """Each parameter's ParamSpec by its full name."""
    return {
        f"{prefix}.{name}" if prefix else name: spec
        for prefix, module in layer.named_modules()
        if isinstance(module, Layer)
        for name, spec in module.param_specs.items()
    }


def build(config: LayerConfig, dtype: torch.dtype = torch.float64, d_model: int = D_MODEL) -> nn.Module:
    """The layer with every parameter drawn, then moved a little so that ones and zeros are tested too."""
    layer = config.build(d_model)
    generator = torch.Generator().manual_seed(0)
    declared = specs(layer)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            value = declared[name].init(tuple(parameter.shape), generator)
            parameter.copy_(value + 0.1 * torch.randn(value.shape, generator=generator))
    # A kind that balances over the batch in training is held to the document and row clauses in evaluation.
    return layer.to(dtype).train(not getattr(config, "mixes_rows", False))


def inputs(batch: int, length: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    """Standard normal (B, L, D)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, D_MODEL, generator=generator, dtype=dtype)


def packed(lengths: tuple[tuple[int, ...], ...] = DOCUMENTS) -> Context:
    """A context whose rows are cut into documents of these lengths."""
    rows, n = [], 0
    for row in lengths:
        rows.append(torch.cat([torch.full((t,), n + i, dtype=torch.int32) for i, t in enumerate(row)]))
        n += len(row)
    return Context(doc_ids=torch.stack(rows), n_docs=n)


def spans(lengths: tuple[tuple[int, ...], ...] = DOCUMENTS) -> list[tuple[int, int, int]]:
    """(row, start, end) of each document, in order."""
    found = []
    for row, row_lengths in enumerate(lengths):
        start = 0
        for length in row_lengths:
            found.append((row, start, start + length))
            start += length
    return found


def gradients(layer: nn.Module, y: Tensor, x: Tensor, seed: int = 2) -> dict[str, Tensor]:
    """Gradients of a random projection of y to x and to every parameter, by name."""
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    parameters = dict(layer.named_parameters())
    grads = torch.autograd.grad((y * weight.to(y.dtype)).sum(), [x, *parameters.values()])
    return dict(zip(["input", *parameters], grads, strict=True))


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    """Every entry equal to a relative tolerance of its largest value."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        bound = tolerance * max(1.0, value.abs().max().item())
        error = (value - b[name]).abs().max().item()
        assert error <= bound, f"{name} differs by {error:.3g} (largest value {value.abs().max():.3g})"

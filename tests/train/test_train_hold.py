"""Copies in host memory: what they hold, where they lie, and that they stay where they are."""

from __future__ import annotations

import pytest
import torch

from ssmtrain.checkpoint.parts import Part
from ssmtrain.train import hold
from ssmtrain.train.hold import Hold

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
    ),
]


def shares(device: str, width: int = 300) -> dict[str, dict[str, Part]]:
    """Of many sizes and types, one longer than a slab, one of no elements, one a scalar."""
    made = {
        "long": torch.randn(90, width),
        "odd": torch.randn(7).to(torch.bfloat16),
        "step": torch.tensor(3.0),
        "none": torch.empty(0, 4),
        "turned": torch.randn(6, 5).t(),
        "bytes": torch.arange(13, dtype=torch.uint8),
    }
    model = {name: Part(one.to(device), 2, 200) for name, one in made.items()}
    return {"model": model, "rng": {"cpu": Part(torch.arange(5))}}


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_held_does_not_change_with_the_run(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hold, "SLAB", 4096)
    held, parts = Hold(), shares(device)
    before = {
        (kind, name): part.tensor.cpu().clone() for kind, x in parts.items() for name, part in x.items()
    }
    copied = held.copy(parts)
    for x in parts.values():
        for part in x.values():
            part.tensor.zero_()
    for (kind, name), value in before.items():
        part = copied[kind][name]
        assert part.tensor.device.type == "cpu" and part.tensor.dtype == value.dtype
        assert torch.equal(part.tensor, value), name
        assert (part.start, part.total) == (parts[kind][name].start, parts[kind][name].total)
        assert part.tensor.data_ptr() % hold.ALIGNED == 0 or not value.numel()
    assert torch.equal(held.copy(parts)["model"]["long"].tensor, torch.zeros(90, 300))


@pytest.mark.parametrize("device", DEVICES)
def test_memory_is_taken_once_and_follows_the_shapes(device: str) -> None:
    held = Hold()
    held.reserve(shares(device))
    places = {key: buffer.data_ptr() for key, buffer in held.buffers.items()}
    slabs = {buffer.untyped_storage().data_ptr() for buffer in held.buffers.values()}
    assert len(slabs) == (1 if device == "cpu" else 2), "small tensors share one"
    held.copy(shares(device))
    assert {key: buffer.data_ptr() for key, buffer in held.buffers.items()} == places
    wider = shares(device, width=310)
    copied = held.copy(wider)
    assert torch.equal(copied["model"]["long"].tensor, wider["model"]["long"].tensor.cpu())
    assert {key for key, buffer in held.buffers.items() if buffer.data_ptr() != places[key]} == {
        ("model", "long")
    }
    held.copy({"rng": wider["rng"]})
    assert held.buffers.keys() == {("rng", "cpu")}, "what is not saved any more takes no memory"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_locked_memory_and_a_system_that_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    held, parts = Hold(), shares("cuda")
    held.reserve(parts)
    buffer = held.buffers["model", "long"]
    assert buffer.is_pinned() and not held.buffers["rng", "cpu"].is_pinned()
    del buffer
    held.buffers.clear()
    again = Hold()
    again.reserve(parts)
    assert again.buffers["model", "long"].is_pinned(), "it was let go of, and can be locked again"
    real = torch.cuda.cudart()

    class Refusing:
        cudaError = real.cudaError
        cudaHostUnregister = real.cudaHostUnregister

        @staticmethod
        def cudaHostRegister(at: int, size: int, flags: int) -> object:
            assert real.cudaHostRegister(at, size, flags) == real.cudaError.success
            return real.cudaHostRegister(at, size, flags)  # already registered

    monkeypatch.setattr(torch.cuda, "cudart", lambda: Refusing)
    refused = Hold()
    copied = refused.copy(parts)
    assert torch.equal(copied["model"]["long"].tensor, parts["model"]["long"].tensor.cpu())
    assert torch.ones(3, device="cuda").sum().item() == 3

"""Linear cross-entropy against torch's own in float64: values, gradients, chunks and memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.cases import assert_all_close, distance, outputs_and_grads
from ssmtrain.kernels.linear_cross_entropy import linear_cross_entropy, reference


def make_inputs(rows: int = 50, width: int = 12, vocab: int = 23) -> tuple[dict[str, Tensor], Tensor]:
    """Random float64 hidden and weight, and labels with some to ignore."""
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[2::7] = -100
    return {"hidden": hidden, "weight": weight}, labels


def torch_loss(leaves: dict[str, Tensor], labels: Tensor, scale: float = 1.0, ignore: int = -100) -> Tensor:
    logits = scale * F.linear(leaves["hidden"], leaves["weight"])
    return F.cross_entropy(logits, labels, ignore_index=ignore, reduction="sum")


def both(
    inputs: dict[str, Tensor], labels: Tensor, scale: float = 1.0, **options
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Loss and gradients of the kernel and of torch in float64, for 3 times the mean loss."""
    count = int((labels != -100).sum())

    def ours(leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        loss, n_valid = linear_cross_entropy(**leaves, labels=labels, logit_scale=scale, **options)
        assert n_valid.dtype == torch.int64 and n_valid.shape == () and int(n_valid) == count
        return (3 * loss / n_valid,)

    truth = outputs_and_grads(
        lambda leaves: (3 * torch_loss(leaves, labels, scale) / count,),
        {name: tensor.double() for name, tensor in inputs.items()},
    )
    return outputs_and_grads(ours, inputs), truth


@pytest.mark.parametrize("scale", [1.0, 0.125, 4.0])
@pytest.mark.parametrize("chunk", [None, 1, 7, 25, 50, 1000])
def test_matches_torch_in_any_chunks(chunk: int | None, scale: float) -> None:
    inputs, labels = make_inputs()
    ours, truth = both(inputs, labels, scale, chunk=chunk)
    assert all(value.dtype == torch.float64 for value in ours.values())
    assert_all_close(ours, truth, 1e-13)
    ours, truth = both({name: tensor.float() for name, tensor in inputs.items()}, labels, scale, chunk=chunk)
    assert_all_close(ours, truth, 2e-6)


def test_chunks_of_ignored_rows_and_none_left() -> None:
    inputs, labels = make_inputs()
    labels[10:30] = -100
    ours, truth = both(inputs, labels, chunk=5)
    assert_all_close(ours, truth, 1e-13)
    assert not ours["grad hidden"][10:30].any()
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    loss, n_valid = linear_cross_entropy(**leaves, labels=torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0.0 and n_valid.item() == 0
    assert not any(leaf.grad is None or leaf.grad.any() for leaf in leaves.values())


def test_another_ignored_label_and_no_rows() -> None:
    inputs, labels = make_inputs()
    labels[labels == -100] = 3
    loss, n_valid = linear_cross_entropy(**inputs, labels=labels, ignore_index=3)
    torch.testing.assert_close(loss, torch_loss(inputs, labels, ignore=3), rtol=1e-13, atol=0)
    assert int(n_valid) == int((labels != 3).sum())
    weight = inputs["weight"].clone().requires_grad_()
    loss, n_valid = linear_cross_entropy(inputs["hidden"][:0], weight, labels[:0])
    loss.backward()
    assert loss.item() == 0.0 and n_valid.item() == 0 and weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize("label", [23, -1])
def test_labels_outside_the_vocabulary_raise(label: int) -> None:
    inputs, labels = make_inputs()
    labels[5] = label
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        linear_cross_entropy(**inputs, labels=labels)


def test_only_the_gradients_that_are_wanted() -> None:
    inputs, labels = make_inputs()
    both_leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    linear_cross_entropy(**both_leaves, labels=labels)[0].backward()
    for name, tensor in inputs.items():
        leaf = tensor.clone().requires_grad_()
        linear_cross_entropy(**{**inputs, name: leaf}, labels=labels)[0].backward()
        assert leaf.grad is not None and torch.equal(leaf.grad, both_leaves[name].grad)
    assert not linear_cross_entropy(**inputs, labels=labels)[0].requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_value_alone(mode: type) -> None:
    inputs, labels = make_inputs()
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    truth = torch_loss(leaves, labels)
    with mode():
        loss, _ = linear_cross_entropy(**leaves, labels=labels, chunk=9)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, truth.detach(), rtol=1e-13, atol=0)


def test_tied_to_the_embedding() -> None:
    inputs, labels = make_inputs()
    tokens = labels.clamp_min(0)

    def run(loss_of) -> Tensor:
        weight = inputs["weight"].clone().requires_grad_()
        loss_of(F.embedding(tokens, weight).tanh(), weight).backward()
        assert weight.grad is not None
        return weight.grad

    ours = run(lambda hidden, weight: linear_cross_entropy(hidden, weight, labels, chunk=8)[0])
    truth = run(lambda hidden, weight: torch_loss({"hidden": hidden, "weight": weight}, labels))
    assert distance(ours, truth) < 1e-13


def test_backward_twice_gives_the_same() -> None:
    inputs, labels = make_inputs()
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    loss, _ = linear_cross_entropy(**leaves, labels=labels)
    first = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
    second = torch.autograd.grad(2 * loss, list(leaves.values()))
    assert all(torch.equal(2 * a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("chunk", [None, 64])
def test_autocast_multiplies_in_bf16_and_sums_in_fp32(chunk: int | None) -> None:
    inputs, labels = make_inputs(rows=600, width=32, vocab=100)
    single = {name: 0.3 * tensor.float() for name, tensor in inputs.items()}

    def cast(loss_of) -> dict[str, Tensor]:
        def run(leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
            with torch.autocast("cpu", torch.bfloat16):
                return (loss_of(leaves),)

        return outputs_and_grads(run, single)

    ours = cast(lambda leaves: linear_cross_entropy(**leaves, labels=labels, chunk=chunk)[0])
    plain = cast(lambda leaves: torch_loss(leaves, labels))
    truth = outputs_and_grads(
        lambda leaves: (torch_loss(leaves, labels),), {k: t.double() for k, t in single.items()}
    )
    assert all(value.dtype == torch.float32 for value in ours.values())
    for name in truth:
        far = distance(ours[name], truth[name])
        assert 1e-7 < far < 1e-2 and far <= 2 * distance(plain[name], truth[name]) + 1e-5, name


class Largest(TorchDispatchMode):
    """Notes the largest tensor made inside."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_logits_of_a_long_row_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "LOGITS", 1000)
    inputs, labels = make_inputs(rows=400, width=4, vocab=20)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    with Largest() as largest:
        linear_cross_entropy(**leaves, labels=labels)[0].backward()
    # Hidden and its gradient are the largest; full logits would be 8,000.
    assert largest.elements == 400 * 4


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [None, 100])
def test_the_gpu_agrees_with_torch_and_never_waits(chunk: int | None) -> None:
    inputs, labels = make_inputs(rows=700, width=64, vocab=520)
    single = {name: 0.2 * tensor.float().cuda() for name, tensor in inputs.items()}
    on_gpu = labels.cuda()
    truth = outputs_and_grads(
        lambda leaves: (torch_loss(leaves, labels),), {name: t.double().cpu() for name, t in single.items()}
    )

    def run(cast: bool) -> dict[str, Tensor]:
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in single.items()}
        with torch.autocast("cuda", torch.bfloat16, enabled=cast):
            torch.cuda.set_sync_debug_mode("error")
            try:
                loss, _ = linear_cross_entropy(**leaves, labels=on_gpu, chunk=chunk)
                loss.backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return {"output 0": loss.detach()} | {f"grad {name}": leaf.grad for name, leaf in leaves.items()}

    # outputs_and_grads pulls back a random number: take it out of the truth.
    weight = torch.randn((), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    truth = {name: value if name == "output 0" else value / weight for name, value in truth.items()}
    for cast, tolerance in ((False, 1e-5), (True, 1e-2)):
        found = {name: value.cpu() for name, value in run(cast).items()}
        assert all(value.dtype == torch.float32 for value in found.values())
        assert_all_close(found, truth, tolerance)

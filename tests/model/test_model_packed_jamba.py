"""A Jamba-style model on packed rows: Mamba layers with inner norms, attention, MLPs and experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssmtrain.config.model import ModelConfig
from ssmtrain.kernels import backend, tuned
from ssmtrain.layers.base import Context
from ssmtrain.model.hybrid import HybridModel
from ssmtrain.model.init import init_weights

LENGTHS = (5, 1, 13, 3)
VOCAB = 31
MAMBA = {"kind": "mamba1", "d_state": 4, "inner_norm": True}
MLP = {"kind": "mlp", "hidden": 24}
BLOCKS = {
    "M": {"mixer": MAMBA, "ffn": MLP},
    "E": {
        "mixer": MAMBA,
        "ffn": {"kind": "moe", "n_experts": 4, "top_k": 2, "hidden": 8, "router": "softmax", "aux_coef": 0.0},
    },
    "A": {"mixer": {"kind": "attention", "n_heads": 2, "position": "none"}, "ffn": MLP},
}


def losses_and_gradients(model: HybridModel, rows: list[tuple[Tensor, Tensor, Context]]) -> dict[str, Tensor]:
    """The loss of each label, of all rows, and the gradients of their sum."""
    model.zero_grad()
    found = []
    for inputs, labels, context in rows:
        out = model(inputs, labels, context)
        assert out.loss_sum is not None
        out.loss_sum.backward()
        found.append(out.loss_sum.detach())
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": torch.stack(found).sum()} | grads


def compare(dtype: torch.dtype, device: str, tolerance: float, lengths: tuple[int, ...] = LENGTHS) -> None:
    """Hold a row of documents against the documents by themselves: the loss, and every gradient."""
    config = ModelConfig.model_validate({"d_model": 16, "layout": "MEAE", "blocks": BLOCKS})
    model = HybridModel(config, VOCAB)
    init_weights(model, config.init, 0)
    model.to(device, dtype)
    tokens = torch.randint(VOCAB, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(device)
    labels = tokens.roll(1, 1)
    ids = torch.cat([torch.full((n,), i, dtype=torch.int32) for i, n in enumerate(lengths)])[None]
    context = Context(doc_ids=ids.to(device), n_docs=len(lengths))
    packed = losses_and_gradients(model, [(tokens, labels, context)])
    parts = zip(tokens.split(lengths, 1), labels.split(lengths, 1), strict=True)
    alone = losses_and_gradients(model, [(part, label, Context()) for part, label in parts])
    assert packed.keys() == alone.keys() and len(packed) == 1 + len(list(model.parameters()))
    for name, value in alone.items():
        gap = (packed[name] - value).norm() / value.norm().clamp(min=1e-12)
        assert gap < tolerance, (name, gap.item())


def test_packed_documents_train_like_documents_alone() -> None:
    compare(torch.float64, "cpu", 1e-10)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not tuned.interpreting(), reason="the gpu test runs them compiled")
def test_through_the_triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter, the kernels of the Mamba layer."""
    ops = {
        op: "triton" if op in ("selective_scan", "causal_conv1d") else "reference"
        for op in backend.op_names()
    }
    monkeypatch.setattr(backend, "_current", backend.Backend("auto", "cpu", ops, "a test"))
    compare(torch.float32, "cpu", 2e-5, (3, 1, 5))


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_current", None)
    # A GPU's exponential is good to 2^-22, torch's to 2^-24.
    compare(torch.float32, "cuda", 5e-5)

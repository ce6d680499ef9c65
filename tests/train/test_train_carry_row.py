"""Rows whose states are carried are one long row: the same loss through a whole model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ssmtrain.config.model import ModelConfig
from ssmtrain.data.module import MemoryStream, Rows
from ssmtrain.kernels import backend
from ssmtrain.layers.base import Context
from ssmtrain.model.hybrid import HybridModel
from ssmtrain.model.init import init_weights
from ssmtrain.train.carry import Carry

EXPERTS = {"kind": "moe", "n_experts": 4, "top_k": 2, "hidden": 8, "router": "softmax", "aux_coef": 0.0}
LAYERS: dict[str, Any] = {
    "d_model": 16,
    "layout": "MEFM",
    "blocks": {
        "M": {"mixer": {"kind": "mamba2", "d_state": 16, "head_dim": 16, "chunk_size": 16}, "ffn": EXPERTS},
        "E": {"mixer": {"kind": "mamba1", "d_state": 4}, "ffn": {"kind": "mlp", "hidden": 24}},
        "F": {"ffn": {"kind": "mlp", "hidden": 24}},
    },
}
VOCAB, L, SLOTS = 31, 8, 3
DOCUMENTS = (5, 40, 3, 1, 2, 29, 16, 28, 24)


def stream(*lengths: int) -> MemoryStream:
    """Documents of some lengths."""
    ids = np.random.default_rng(0).integers(0, VOCAB, sum(lengths))
    return MemoryStream(ids, np.cumsum([0, *lengths])[:-1])


def compare(lengths: tuple[int, ...], dtype: torch.dtype, device: str, tolerance: float) -> None:
    """Hold two epochs of steps, in micro-batches, against each slot's stretch as one row."""
    config = ModelConfig.model_validate(LAYERS)
    net = HybridModel(config, VOCAB)
    init_weights(net, config.init, 0)
    net.to(device, dtype)
    text = stream(*lengths)
    rows = Rows(text, L, 3, 0, SLOTS)
    steps = rows.per_epoch // SLOTS
    assert steps == 6
    carry = Carry(net, range(SLOTS), SLOTS, dtype, torch.device(device))
    order = rows.samples(range(2 * rows.per_epoch)).reshape(2 * steps, SLOTS)
    for epoch in range(2):
        total = 0.0
        for step in range(epoch * steps, (epoch + 1) * steps):
            total += loss_of_step(carry, net, rows, step)
            assert all(not t.requires_grad for s in carry.now for t in (s or {}).values()), "gradients stop"
        whole = sum(loss_of_row(net, text, order[epoch * steps :][:steps, slot]) for slot in range(SLOTS))
        assert total == pytest.approx(whole, rel=tolerance)


def loss_of_step(carry: Carry, net: HybridModel, rows: Rows, step: int) -> float:
    """The sum of a step's losses, two rows and then one."""
    carry.follow(step * SLOTS)
    total, at = 0.0, step * SLOTS
    for size in (2, 1):
        batch = rows.batch(range(at, at + size))
        states, there = carry.begin(batch), batch.to(carry.device)
        out = net(there.inputs, there.labels, Context(there.doc_ids, there.n_docs, states))
        assert out.loss_sum is not None and out.states is not None
        carry.keep(batch, out.states)
        total, at = total + out.loss_sum.item(), at + size
    carry.advance(at)
    return total


def loss_of_row(net: HybridModel, text: MemoryStream, order: np.ndarray) -> float:
    """The loss of a stretch as one row, or as two where it goes beyond the end of the stream."""
    assert ((np.diff(order) == 1) | (order[1:] == 0)).all()
    total, device = 0.0, net.input.weight.device
    for part in np.split(order, np.flatnonzero(order == 0)):
        if len(part):
            begin = int(part[0]) * L
            some = text.ids[begin : begin + len(part) * L + 1]
            inside = text.starts[(text.starts > begin) & (text.starts < begin + len(some))] - begin
            opens = np.zeros(len(some), np.int32)
            opens[inside] = 1
            labels = torch.from_numpy(np.where(opens[1:] == 1, -100, some[1:])[None]).to(device)
            ids = torch.from_numpy(np.cumsum(opens, dtype=np.int32)[None, :-1])
            ctx = Context(ids.to(device), int(ids[0, -1]) + 1)
            out = net(torch.from_numpy(some[None, :-1]).to(device), labels, ctx)
            assert out.loss_sum is not None
            total += out.loss_sum.item()
    return total


@pytest.mark.parametrize("lengths", [(150,), DOCUMENTS])
def test_rows_that_follow_each_other_are_one_long_row(lengths: tuple[int, ...]) -> None:
    """Of Mamba-1, Mamba-2, MLP and experts; documents begin and end inside of rows and at their ends."""
    compare(lengths, torch.float64, "cpu", 1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(150,), DOCUMENTS])
def test_on_a_gpu(lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_current", None)
    compare(lengths, torch.float32, "cuda", 1e-5)

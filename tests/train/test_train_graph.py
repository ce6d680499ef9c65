"""Passes recorded as CUDA graphs: the same bits as passes called, whatever the batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssmtrain.checkpoint import faults
from ssmtrain.config.errors import UserError
from ssmtrain.config.model import ModelConfig
from ssmtrain.data.module import Batch
from ssmtrain.kernels import backend
from ssmtrain.layers.base import Context
from ssmtrain.model.hybrid import HybridModel
from ssmtrain.model.init import init_weights
from ssmtrain.parallel.apply import apply
from ssmtrain.train import graph
from ssmtrain.train.graph import Graphs, Pass, room_for

from .conftest import ledger, page, same, weights

Train = Callable[..., tuple[int, Path]]


def batch_of(rows: int, documents: int | None, seed: int, length: int = 24, vocab: int = 31) -> Batch:
    """Random rows; `documents` in each, None for whole rows."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab, (rows, length + 1), generator=generator)
    ids = None
    if documents is not None:
        cuts = torch.stack([torch.randperm(length - 1, generator=generator) for _ in range(rows)]) + 1
        starts = torch.zeros(rows, length, dtype=torch.int32).scatter_(1, cuts[:, : documents - 1], 1)
        starts[:, 0] = 1
        ids = (starts.flatten().cumsum(0) - 1).to(torch.int32).view(rows, length)
    n_docs = rows if documents is None else rows * documents
    return Batch(tokens[:, :-1], tokens[:, 1:].contiguous(), ids, n_docs, list(range(rows)))


def test_room_is_a_power_of_two() -> None:
    assert [room_for(n) for n in (1, 8, 9, 16, 17, 1000)] == [8, 8, 16, 16, 32, 1024]


class Linear(nn.Module):
    """A pass whose gradients and sums tell what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(31))
        self.unused = nn.Parameter(torch.ones(2))
        self.seen: list[tuple[int, float]] = []

    def run(self, batch: Batch, scale: Tensor, share: float) -> Pass:
        self.seen.append((batch.n_docs, share))
        hits = torch.nn.functional.one_hot(batch.inputs, 31).sum((0, 1)).float()
        loss = (self.weight * hits).sum()
        (loss * scale).backward()
        return torch.stack([loss.detach(), loss.detach() * share]).double(), {3: hits.long()}


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Graphs of a CPU: replaying one computes the pass where the recorded one left its results."""
    done: list[str] = []

    def record(self: Graphs, batch: Batch, share: float) -> graph._Recorded:
        done.append("record")
        static, scale = graph._copied(batch, self.device), torch.ones(())
        assert all(to.data_ptr() != new.data_ptr() for to, new in graph._tensors(static, batch))
        before = [p.grad for p in self.parameters]
        values = [None if old is None else old.clone() for old in before]
        result = self.run(static, scale, share)
        grads = [p.grad for p in self.parameters]
        for grad, value in zip(grads, values, strict=True):
            if grad is not None:  # recording computes nothing
                grad.copy_(torch.full_like(grad, torch.nan) if value is None else value)

        def replay() -> None:
            done.append("replay")
            kept = [None if old is None else old.clone() for old in before]
            for parameter, old in zip(self.parameters, kept, strict=True):
                parameter.grad = old
            sums, loads = self.run(static, scale, share)
            for parameter, grad in zip(self.parameters, grads, strict=True):
                if grad is not None:
                    grad.copy_(parameter.grad)
            result[0].copy_(sums)
            result[1][3].copy_(loads[3])

        return graph._Recorded(SimpleNamespace(replay=replay), static, scale, result, grads)  # type: ignore[arg-type]

    monkeypatch.setattr(Graphs, "_record", record)
    return done


def test_called_recorded_launched(replayed: list[str]) -> None:
    """Batches of two shapes and several numbers of documents; what was returned stays as it was."""
    model, plain = Linear(), Linear()
    graphs = Graphs(model.run, list(model.parameters()), torch.device("cpu"))
    results = []
    for i, (rows, documents) in enumerate([(2, None), (2, None), (2, 3), (2, None), (2, 2), (2, 3), (2, 6)]):
        batch = batch_of(rows, documents, i)
        found = graphs(batch, 0.5 + i, 1.0)
        expected = plain.run(batch, torch.tensor(0.5 + i), 1.0)
        results.append((found, expected))
        assert torch.equal(model.weight.grad, plain.weight.grad) and model.unused.grad is None
        model.zero_grad()
        plain.zero_grad()
    for (sums, loads), (own, counts) in results:
        assert torch.equal(sums, own) and torch.equal(loads[3], counts[3])
    assert replayed == ["record", "replay", "replay", "record", "replay", "replay"]
    assert {n for n, _ in model.seen} == {2, 8, 16}  # the room that there is for documents


def test_micro_batches_add_up(replayed: list[str]) -> None:
    """Into the gradients of the first, wherever it ran."""
    model, plain = Linear(), Linear()
    graphs = Graphs(model.run, list(model.parameters()), torch.device("cpu"))
    for step in range(5):
        for micro, rows in enumerate((2, 2, 1)):
            batch = batch_of(rows, None, 10 * step + micro)
            graphs(batch, 1.0, rows / 5)
            plain.run(batch, torch.tensor(1.0), rows / 5)
        assert torch.equal(model.weight.grad, plain.weight.grad)
        model.zero_grad()
        plain.zero_grad()
    # A step of calls, one that begins with a graph, and from then on three graphs: first, second and third.
    assert replayed.count("record") == 3 and replayed.count("replay") == 1 + 3 + 3 + 3


def test_refused_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ssmtrain.train.fit import place

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for words, text in (
        ({"trainer__accelerator": "cpu"}, "on the CPU"),
        ({"trainer__accelerator": "gpu", "trainer__devices": 2}, "on 2 devices"),
    ):
        with pytest.raises(UserError, match=f"trainer.cuda_graphs: {text}"):
            place(page(tmp_path, trainer__cuda_graphs=True, **words))
    assert place(page(tmp_path, trainer__cuda_graphs=True, trainer__devices=1)) == ("gpu", 1)


MIX = {
    "d_model": 64,
    "layout": "MSAE",
    "blocks": {
        "M": {"mixer": {"kind": "mamba2", "d_state": 64, "head_dim": 64}},
        "S": {"mixer": {"kind": "mamba1"}, "ffn": {"kind": "mlp", "hidden": 64}},
        "A": {"mixer": {"kind": "attention", "n_heads": 2}, "ffn": {"kind": "mlp", "hidden": 64}},
        "E": {
            "mixer": {"kind": "mamba2", "d_state": 16, "head_dim": 32},
            "ffn": {"kind": "moe", "n_experts": 4, "top_k": 2, "hidden": 64},
        },
    },
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    monkeypatch.setattr(backend, "_current", None)
    backend.configure("auto", "cuda")
    yield torch.device("cuda")
    torch.cuda.synchronize()


def hybrid(device: torch.device, recompute: str) -> tuple[HybridModel, Callable[..., Pass]]:
    """A model with every kind of mixer, and its passes under autocast."""
    config = ModelConfig.model_validate(MIX)
    model = HybridModel(config, 96)
    init_weights(model, config.init, 0)
    apply(model, SimpleNamespace(recompute=recompute, compile=False))  # type: ignore[arg-type]
    model.to(device)

    def run(batch: Batch, scale: Any, share: float) -> Pass:
        with torch.autocast("cuda", torch.bfloat16):
            n_docs = None if batch.doc_ids is None else batch.n_docs
            out = model(batch.inputs, batch.labels, Context(doc_ids=batch.doc_ids, n_docs=n_docs))
        (out.loss_sum * scale + out.aux * share).backward()
        sums = torch.stack([out.loss_sum.detach(), out.aux.detach() * share]).double()
        return sums, {i: stats["load"] for i, stats in out.stats.items()}

    return model, run


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", ["ops", "block"])
def test_no_bit_changes_on_a_gpu(recompute: str, gpu: torch.device) -> None:
    """Whole rows and packed ones, in two micro-batches, while the weights change."""
    found = []
    for recorded in (False, True):
        model, run = hybrid(gpu, recompute)
        parameters = list(model.parameters())
        graphs = Graphs(run, parameters, gpu)
        if not recorded:
            graphs._record = None  # type: ignore[assignment,method-assign]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
        rows = []
        for step in range(12):
            for micro in range(2):
                documents = None if step % 2 else 1 + (step + micro) % 5
                batch = batch_of(2, documents, 2 * step + micro, 300, 96)
                if not recorded:
                    graphs.called.clear()  # called every time
                sums, loads = graphs(batch, 1e-3 * (step + 1), 0.5)
                rows.append((sums, loads[3]))
            rows.append([p.grad.clone() for p in parameters])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        found.append([t.cpu() for row in rows for t in row])
        if recorded:
            assert len(graphs.recorded) >= 4
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(t.isfinite().all() for t in found[0])


@pytest.mark.gpu
def test_what_cannot_be_recorded_says_so(gpu: torch.device) -> None:
    weight = nn.Parameter(torch.ones(31, device=gpu))

    def run(batch: Batch, scale: Any, share: float) -> Pass:
        loss = weight.sum() * float(batch.inputs.sum())  # waits for the GPU
        (loss * scale).backward()
        return torch.stack([loss.detach(), loss.detach()]).double(), {}

    graphs = Graphs(run, [weight], gpu)
    graphs(batch_of(1, None, 0), 1.0, 1.0)
    weight.grad = None
    with pytest.raises(UserError, match="cannot be recorded"):
        graphs(batch_of(1, None, 1), 1.0, 1.0)
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
def test_a_run_and_its_continuation(
    graphs: bool, train: Train, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, whatever was called and whatever launched; a continued run begins without narrow copies."""
    changes = {"cuda_graphs": graphs, "precision": "bf16", "micro_batch": 2, "devices": 1, "max_steps": 12}
    changes = {f"trainer__{name}": value for name, value in changes.items()}
    code, whole = train(name="whole", **changes)
    assert code == 0
    monkeypatch.setattr(faults, "_passed", Counter())
    faults.arm("step_end:7:TERM")
    code, folder = train(name="parts", **changes)
    assert code == 75
    faults.arm()
    code, folder = train(name="parts", **changes)
    assert code == 0 and ledger(folder) == ledger(whole)
    for stem in ("model", "optim"):
        assert same(weights(folder, 12, stem), weights(whole, 12, stem)), stem

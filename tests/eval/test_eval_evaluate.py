"""Scoring: equals the loss by hand, whatever the batch, and adds up over ranks."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from ssmtrain.config.model import ModelConfig
from ssmtrain.config.tasks import Mqar, Parity
from ssmtrain.data.module import text_rows
from ssmtrain.data.tasks import TaskRows
from ssmtrain.data.tokenizer import ByteTokenizer
from ssmtrain.eval.evaluate import Score, evaluate, right
from ssmtrain.model import heads
from ssmtrain.model.hybrid import HybridModel
from ssmtrain.model.init import init_weights

TEXTS = ["It is a truth universally acknowledged", "that a single man", "in possession of a good fortune" * 3]
CPU = torch.device("cpu")


def tiny() -> HybridModel:
    blocks = {
        "M": {"mixer": {"kind": "mamba1", "d_state": 4}},
        "A": {"mixer": {"kind": "attention", "n_heads": 2}},
    }
    config = ModelConfig.model_validate({"d_model": 16, "layout": "MA", "blocks": blocks})
    model = HybridModel(config, 257)
    init_weights(model, config.init, 0)
    return model.double()


def test_score_equals_the_loss_by_hand() -> None:
    model, rows = tiny(), text_rows(TEXTS, ByteTokenizer(), 16)
    total = count = 0
    for i in range(rows.per_epoch):
        batch = rows.batch_rows([i])
        row = batch.inputs[0]
        # Each stretch between document ends is computed alone.
        ends = [j + 1 for j in range(16) if int(row[j]) == 256] + [16]
        start = 0
        for end in dict.fromkeys(ends):
            if end > start:
                logits = model(row[None, start:end]).logits[0]
                labels = batch.labels[0, start:end]
                total += cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
                count += int((labels != -100).sum())
            start = end
    for batch_rows in (1, 3, 64):
        score = evaluate(model, rows, CPU, batch_rows)
        assert score.labels == count
        assert score.loss_sum == pytest.approx(total, rel=1e-9)


def test_ranks_add_up_and_limits_hold() -> None:
    model, rows = tiny(), text_rows(TEXTS, ByteTokenizer(), 8)
    whole = evaluate(model, rows, CPU, 2)
    parts = [evaluate(model, rows, CPU, 2, rank=r, world=3) for r in range(3)]
    assert sum(p.labels for p in parts) == whole.labels
    assert sum(p.loss_sum for p in parts) == pytest.approx(whole.loss_sum, rel=1e-12)
    assert evaluate(model, rows, CPU, 2, max_rows=1).labels <= 8


def test_units() -> None:
    score = Score(loss_sum=100 * math.log(2.0), labels=50)
    assert score.loss == pytest.approx(2 * math.log(2.0))
    assert score.perplexity == pytest.approx(4.0)
    assert score.bits_per_byte(tokens=50, n_bytes=100) == pytest.approx(1.0)


def test_the_mode_of_the_model_is_left_as_found() -> None:
    model = tiny().train()
    evaluate(model, text_rows(TEXTS, ByteTokenizer(), 16), CPU)
    assert model.training


@pytest.mark.parametrize("world", [1, 2, 3, 5, 40])
def test_ranks_that_run_together_run_as_often(world: int) -> None:
    """A model that is cut over ranks runs on all of them or on none; each row still counts once."""
    model, rows = tiny(), text_rows(TEXTS, ByteTokenizer(), 8)
    whole = evaluate(model, rows, CPU, 2)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(len(calls)))
    parts, counts = [], []
    for r in range(world):
        calls.clear()
        parts.append(evaluate(model, rows, CPU, 2, rank=r, world=world, together=True))
        counts.append(len(calls))
    assert len(set(counts)) == 1 and counts[0] >= 1
    assert sum(p.labels for p in parts) == whole.labels
    assert sum(p.loss_sum for p in parts) == pytest.approx(whole.loss_sum, rel=1e-12)


def test_right_answers_are_counted_as_by_hand() -> None:
    """Labels, and rows of which all labels, are the likeliest id; with any batch and over ranks."""
    model = tiny()
    rows = TaskRows(Parity(seq_len=9, vocab_size=257, min_len=3, asked="every"), "val", 0, 11)
    model.input.weight.data.mul_(1e-6)  # so that the likeliest is often the same id, and sometimes right
    hits = whole = labels = 0
    batch = rows.batch_rows(range(11))
    guess = int(batch.labels[0, 0])
    with torch.no_grad():
        model.input.weight[guess] += 3.0
    for i in range(11):
        said = model(batch.inputs[i : i + 1]).logits[0].argmax(-1)
        asked = batch.labels[i] != -100
        good = (said == batch.labels[i])[asked]
        hits, whole, labels = hits + int(good.sum()), whole + int(good.all()), labels + int(asked.sum())
    assert 0 < hits < labels
    for batch_rows in (1, 4, 64):
        score = evaluate(model, rows, CPU, batch_rows, answers=True)
        assert (score.right, score.rows, score.rows_right, score.labels) == (hits, 11, whole, labels)
    parts = [evaluate(model, rows, CPU, 2, rank=r, world=3, answers=True) for r in range(3)]
    assert sum(p.right or 0 for p in parts) == hits and sum(p.rows for p in parts) == 11
    assert score.accuracies() == {"accuracy": hits / labels, "row_accuracy": whole / 11}
    assert evaluate(model, rows, CPU).accuracies() == {}


def test_a_row_counts_where_every_label_is_right() -> None:
    labels = torch.tensor([[-100, 5, 6], [-100, -100, -100], [7, -100, 8], [9, 9, 9]])
    answers = torch.tensor([5, 6, 7, 0, 9, 9, 9])
    assert [int(count) for count in right(answers, labels)] == [6, 3, 2]


def test_no_logits_are_made_where_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = tiny(), []
    largest = model.head._largest

    def counted(hidden: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        seen.append(len(hidden))
        return largest(hidden, embedding)

    monkeypatch.setattr(model.head, "_largest", counted)
    monkeypatch.setattr(heads, "chunk_rows", lambda vocab, on_gpu: 4)
    rows = TaskRows(Mqar(seq_len=64, vocab_size=257, n_pairs=3), "val", 0, 5)
    evaluate(model, rows, CPU, 5, answers=True)
    assert seen == [4, 4, 4, 3]

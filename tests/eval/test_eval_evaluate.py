"""Scoring: equals the loss by hand, whatever the batch, and adds up over ranks."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from ssmtrain.config.model import ModelConfig
from ssmtrain.data.module import text_rows
from ssmtrain.data.tokenizer import ByteTokenizer
from ssmtrain.eval.evaluate import Score, evaluate
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

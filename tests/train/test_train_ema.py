"""The moving average of the weights: by hand, over interruptions and forks, and as what is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from ssmtrain.checkpoint import faults
from ssmtrain.checkpoint.runs import resolve
from ssmtrain.checkpoint.weights import saved_weights
from ssmtrain.cli import main
from ssmtrain.config.ema import EmaConfig
from ssmtrain.config.errors import UserError
from ssmtrain.config.load import typed
from ssmtrain.config.schema import dump
from ssmtrain.train.ema import Ema
from ssmtrain.train.fit import fit
from ssmtrain.train.forks import load_from
from train.conftest import ledger, page, same, weights

Train = Callable[..., tuple[int, Path]]
EVERY_STEP = {"trainer__save_every": 1, "trainer__keep_last": 99, "trainer__val_every": 0}


def test_the_average_is_that_of_the_weights_by_hand(train: Train) -> None:
    code, folder = train(ema={"decay": 0.75, "every": 2, "start": 3}, **EVERY_STEP)
    assert code == 0
    with pytest.raises(FileNotFoundError):
        weights(folder, 2, "ema")
    average = weights(folder, 3)
    for step in range(3, 9):
        if step > 3 and step % 2 == 0:
            average = {n: torch.lerp(average[n], w, 0.25) for n, w in weights(folder, step).items()}
        assert same(weights(folder, step, "ema"), average), step
    assert not same(weights(folder, 8, "ema"), weights(folder, 8))


def test_it_changes_no_bit_of_the_training(train: Train) -> None:
    _, plain = train(name="plain")
    _, averaged = train(name="averaged", ema__decay=0.5)
    assert ledger(plain) == ledger(averaged) and same(weights(plain, 8), weights(averaged, 8))


def test_it_resumes_to_the_same_bits(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"ema": {"decay": 0.5, "start": 2}, "trainer__save_every": 100}
    _, whole = train(name="whole", **changes)
    faults.arm("step_end:5:TERM")
    assert train(name="parts", **changes)[0] == 75
    faults.arm()
    code, folder = train(name="parts", **changes)
    assert code == 0 and same(weights(folder, 8, "ema"), weights(whole, 8, "ema"))
    # A fork goes on with the average; one of a run without begins with a copy of the weights.
    _, plain = train(name="plain")
    for parent, stem in ((folder, "ema"), (plain, "model")):
        words = [f"name=fork-{stem}", "trainer.max_steps=9", "ema.every=5", f"runs_dir={folder.parent}"]
        run = resolve(load_from({"from": str(parent)}, words))
        assert fit(run.config, run) == 0
        run.close()
        assert same(weights(run.folder, 9, "ema"), weights(parent, 8, stem))


def test_a_skipped_step_is_not_taken_in() -> None:
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad = False
    ema = Ema(EmaConfig(decay=0.5), dict(layer.named_parameters()))
    ema.begin(0)
    assert list(ema.shadow) == ["weight"]
    before = ema.shadow["weight"].clone()
    with torch.no_grad():
        layer.weight += 1
    ema.update(1, skipped=True)
    assert torch.equal(ema.shadow["weight"], before)
    ema.update(2, skipped=False)
    assert torch.allclose(ema.shadow["weight"], before + 0.5)
    with pytest.raises(ValueError, match="do not fit the model: bias"):
        ema.load({"weight": before, "bias": before})
    with pytest.raises(ValueError, match="do not fit the model: weight"):
        ema.load({"weight": torch.ones(3)})


def test_eval_and_generate_read_it(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = train(ema__decay=0.9999)
    checkpoint = folder / "checkpoints" / "step-00000008"
    taken = saved_weights(checkpoint, ema=True)
    assert same({n: taken[n] for n in weights(folder, 8, "ema")}, weights(folder, 8, "ema"))
    capsys.readouterr()
    found = []
    for words in ([], ["weights=ema"]):
        assert main(["eval", f"run={folder}", "--json", *words]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert [one["weights"] for one in found] == ["trained", "ema"]
    # At this decay the average is still where it began, where nothing is known: log 257.
    assert found[0]["loss"] < 4.5 and found[1]["loss"] == pytest.approx(5.55, abs=0.05)
    assert main(["generate", f"run={folder}", "weights=ema", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"] == "ema"
    assert main(["eval", f"run={folder}", "weights=best"]) == 2
    assert "weights=best: expected ema" in capsys.readouterr().err


def test_where_there_is_none(train: Train, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    _, folder = train(trainer__max_steps=1)
    assert main(["eval", f"run={folder}", "weights=ema"]) == 2
    assert (
        "has no moving average of the weights\n       train with ema.decay=0.999" in capsys.readouterr().err
    )
    tree = dump(page(tmp_path)) | {"ema": {"start": 8}}
    with pytest.raises(UserError, match=r"ema\.start = 8: the run ends at step 8"):
        typed(tree)

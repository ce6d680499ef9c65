"""The best checkpoint: found from the records, linked in one rename, kept by retention, named by @best."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ssmtrain.checkpoint import store
from ssmtrain.checkpoint.best import Best, linked
from ssmtrain.checkpoint.runs import locate, open_run
from ssmtrain.config.errors import UserError
from ssmtrain.config.reference import Reference, parse
from train.conftest import page, records, train  # noqa: F401

Train = Callable[..., tuple[int, Path]]


def _saved(folder: Path, *steps: int) -> Path:
    for step in steps:
        store.save(folder / "checkpoints", step, {"model": {"w": torch.ones(2) * step}}, {})
    return folder / "checkpoints"


def _records(folder: Path, *found: tuple[str, int, float | None, int]) -> Path:
    lines = [
        json.dumps({"kind": kind, "step": step, "loss": loss, "labels": n}) for kind, step, loss, n in found
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines) + "{torn")
    return folder / "metrics.jsonl"


def test_the_lowest_loss_among_what_is_saved(tmp_path: Path) -> None:
    found = [("val", 2, 3.0, 10), ("train", 4, 0.1, 10), ("val", 3, 1.0, 10), ("val", 4, 2.5, 10)]
    best = Best(tmp_path, _saved(tmp_path, 2, 4), _records(tmp_path, *found, ("val", 5, None, 10)))
    assert best.step == 4 and linked(tmp_path) is None
    best.link()
    assert os.readlink(tmp_path / "best") == "checkpoints/step-00000004"
    assert linked(tmp_path) == tmp_path / "checkpoints" / "step-00000004"
    # A record comes before its checkpoint: nothing moves until that is there.
    best.write({"kind": "val", "step": 6, "loss": 2.0, "labels": 10})
    assert best.step == 4
    _saved(tmp_path, 6)
    best.link()
    assert best.step == 6 and os.readlink(tmp_path / "best") == "checkpoints/step-00000006"
    best.write({"kind": "val", "step": 6, "loss": float("nan"), "labels": 10})
    assert best.step == 6
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".best")]


def test_losses_over_other_texts_are_not_compared(tmp_path: Path) -> None:
    """The last validation is of the whole split, those on the way of its first tokens."""
    found = [("val", 2, 3.0, 10), ("val", 4, 2.0, 10), ("val", 6, 1.0, 99)]
    folder = _saved(tmp_path, 2, 4, 6)
    assert Best(tmp_path, folder, _records(tmp_path, *found)).step == 6
    assert Best(tmp_path, folder, _records(tmp_path, *found, ("best", 6, 2.2, 10))).step == 4
    # After trainer.val_tokens has changed, those of before do not count.
    assert Best(tmp_path, folder, _records(tmp_path, ("val", 2, 1.0, 99), *found[1:2])).step == 4


def test_a_link_is_only_a_name(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    _saved(folder, 2)
    outside = _saved(tmp_path / "other", 7) / "step-00000007"
    os.symlink(outside, folder / "best")
    assert linked(folder) is None
    os.unlink(folder / "best")
    os.symlink(tmp_path / "run" / "checkpoints", folder / "best")
    assert linked(folder) is None


def test_intervals_and_the_best_outlive_the_newest(train: Train, tmp_path: Path) -> None:  # noqa: F811
    code, folder = train(
        trainer__save_every=1,
        trainer__val_every=1,
        trainer__keep_every=3,
        optim__lr=3.0,
        trainer__max_steps=7,
    )
    assert code == 0
    losses = {record["step"]: record["loss"] for record in records(folder, "val")}
    best = min(losses, key=lambda step: losses[step])
    assert best < 5, "the rate is meant to be ruinous"
    kept = [store.step_of(path) for path in store.checkpoints(folder / "checkpoints")]
    assert kept == sorted({3, 6, 7, best})
    assert open_run(f"{folder}@best").step == best
    # What it was pointed at is found again from the records after a cut-back.
    os.unlink(folder / "best")
    train(trainer__save_every=1, trainer__val_every=1, trainer__max_steps=8, optim__lr=3.0)
    assert open_run(f"{folder}@best").step == best


def test_the_last_step_is_compared_on_the_same_text(train: Train) -> None:  # noqa: F811
    code, folder = train(trainer__val_every=4, trainer__val_tokens=64)
    assert code == 0
    assert [record["step"] for record in records(folder, "best")] == [8]
    assert records(folder, "best")[0]["labels"] == records(folder, "val")[0]["labels"]
    assert records(folder, "val")[-1]["labels"] > records(folder, "val")[0]["labels"]
    assert open_run(f"{folder}@best").step == 8


def test_a_reference_names_a_checkpoint(tmp_path: Path) -> None:
    assert parse("a/b@step-0050") == Reference("a/b", step=50)
    assert parse("a@best") == Reference("a", best=True)
    assert parse("a") == Reference("a")
    for wrong in ("a@50", "a@step-", "a@step-123456789", "a@newest", "a@"):
        with pytest.raises(UserError, match=r"expected @step-<number> or @best"):
            parse(wrong)
    (tmp_path / "me@home").mkdir()
    assert parse(str(tmp_path / "me@home")) == Reference(str(tmp_path / "me@home"))


def test_steps_that_are_not_there_name_the_nearest(train: Train, tmp_path: Path) -> None:  # noqa: F811
    _, folder = train(trainer__save_every=2, trainer__keep_last=9, trainer__val_every=3)
    assert open_run(f"{folder}@step-4").step == 4
    with pytest.raises(
        UserError, match=r"there is no such checkpoint\nthe nearest: .*@step-2, .*@step-4, .*@step-6;"
    ):
        open_run(f"{folder}@step-3")
    shard = folder / "checkpoints" / "step-00000004" / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match="is damaged"):
        open_run(f"{folder}@step-4")
    os.unlink(folder / "best")
    with pytest.raises(UserError, match="no checkpoint of this run is of a step that was validated"):
        open_run(f"{folder}@best")


def test_an_arm_cannot_have_the_links_name(tmp_path: Path) -> None:
    assert locate(page(tmp_path, name="best"))[0] == "best"
    with pytest.raises(UserError, match="cannot be a folder"):
        locate(page(tmp_path, name="sweep/best"))


def test_an_interval_that_meets_no_save_is_an_error(tmp_path: Path) -> None:
    from ssmtrain.config.load import typed
    from ssmtrain.config.schema import dump

    tree: dict[str, Any] = dump(page(tmp_path))
    tree["trainer"]["keep_every"] = 6
    with pytest.raises(UserError, match=r"trainer.keep_every = 6: expected a multiple of .* = 4"):
        typed(tree)

"""The proof of resume: what it runs, what it compares, and that it can fail."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ssmtrain.check import resume
from ssmtrain.check.compare import compare
from ssmtrain.check.starts import Start
from ssmtrain.checkpoint import store
from ssmtrain.checkpoint.records import read_config, write_config
from ssmtrain.checkpoint.runs import Run, open_run
from ssmtrain.config.errors import UserError
from ssmtrain.config.load import load, typed
from ssmtrain.config.request import Request
from ssmtrain.config.schema import RunConfig

PAGE = {
    "recipe": "tiny",
    "model": {"d_model": 16, "layout": "A", "blocks": {"A": {"mixer": {"kind": "attention", "n_heads": 2}}}},
    "trainer": {"max_steps": 1000, "save_every": 200},
}


@pytest.fixture(autouse=True)
def keep_in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


class Trainer:
    """Stands in for the command line: a made-up training that obeys faults as the real one does."""

    def __init__(self, loss: Callable[[str, int, int], float] = lambda run, start, step: 1.0 / step) -> None:
        self.loss = loss
        self.lines: list[tuple[str, str]] = []

    def __call__(self, page: Path, folder: Path, fault: str) -> Start:
        config = load([f"config={page}"])
        self.lines.append((folder.name, fault))
        point, count = fault.split(":")[:2]
        folder.mkdir(exist_ok=True)
        write_config(folder, config)
        run = open_run(str(folder)) if store.checkpoints(folder / "checkpoints") else Run("", folder, config)
        ledger = folder / "ledger.jsonl"
        kept = ledger.read_text().splitlines(keepends=True)[: run.step] if ledger.exists() else []
        every, passed = config.trainer.save_every, 0
        for step in range(run.step + 1, 1001):
            kept.append(json.dumps(self.figures(folder.name, run.step, step)) + "\n")
            ledger.write_text("".join(kept))
            asked = point == "step_start" and step - run.step == int(count)
            if point == "after_optimizer" and step - run.step == int(count):
                return Start(folder.name, fault, -9, run.step, step, "")
            if step % every and not asked:
                continue
            passed += 1
            dies = point not in ("step_start", "after_optimizer") and passed == self.save_of(point, run.step)
            if not (dies and point in ("mid_file", "before_rename")):
                weight = torch.tensor([self.loss(folder.name, run.step, step)])
                shards = {name: {"w": weight} for name in ("model", "optim", "rng")}
                store.save(folder / "checkpoints", step, shards, {})
            if dies:
                return Start(folder.name, fault, -9, run.step, step, "")
            if asked:
                return Start(folder.name, fault, 75, run.step, step, "")
        return Start(folder.name, fault, 0, run.step, 1000, "")

    def figures(self, run: str, start: int, step: int) -> dict:
        loss = self.loss(run, start, step)
        return {
            "step": step,
            "loss_hex": loss.hex(),
            "grad_norm_hex": "0x1p0",
            "samples": [step],
            "tokens": step,
            "params": ["0" * 16],
        }

    def save_of(self, point: str, start: int) -> int:
        """Which save of a start passes the point: an old checkpoint is only pruned beside two newer ones."""
        return 2 if point == "mid_prune" and start else 1


def _check(monkeypatch: pytest.MonkeyPatch, trainer: Trainer, *words: str, **flags: bool) -> int:
    monkeypatch.setattr(resume, "start", trainer)
    return resume.command(Request("check resume", typed(PAGE), None, list(words), flags))


def test_an_exact_run_is_ok(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer()
    assert _check(monkeypatch, trainer) == 0
    assert trainer.lines == [
        ("unbroken", "step_start:12:TERM"),
        ("broken", "mid_file:1"),
        ("broken", "after_optimizer:4"),
        ("broken", "before_rename:1"),
        ("broken", "mid_prune:1"),
        ("broken", "step_start:3:TERM"),
    ]
    said = capsys.readouterr().out
    assert "SIGKILL at before_rename" in said and "equal      12 losses" in said
    assert said.rstrip().endswith("OK: the killed run equals the unbroken one to the last bit")


def test_the_last_bit_of_one_loss_is_enough_to_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def loss(run: str, start: int, step: int) -> float:
        return 1.0 / step + (2**-53 if run == "broken" and step == 11 else 0.0)

    assert _check(monkeypatch, Trainer(loss), json=True) == 1
    output = capsys.readouterr()
    found = json.loads(output.out)
    assert found["ok"] is False and found["kills"] == 4 and found["deterministic"] is True
    assert found["differences"] == ["losses: 1 of 12, the first at step 11"]
    kept = Path(re.search(r"kept in (\S+)", output.err)[1])
    assert read_config(kept / "broken").trainer.save_every == 3


def test_a_recipe_that_never_repeats_itself_is_told_apart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _check(monkeypatch, Trainer(lambda run, start, step: len(run) / step)) == 1
    assert "not deterministic on this machine" in capsys.readouterr().out


def test_state_lost_in_a_resume_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Something that is not saved starts again from its beginning after each kill."""
    assert _check(monkeypatch, Trainer(lambda run, start, step: 1.0 / (step - start))) == 1
    said = capsys.readouterr().out
    assert "losses: 9 of 12, the first at step 4" in said and "tensors of parameters: 1, such as w" in said


def test_a_point_that_is_not_passed_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "faults", lambda every: ["step_start:3:TERM"])
    assert _check(monkeypatch, Trainer()) == 1


def test_a_run_that_cannot_start_is_told_with_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(page: Path, run: Path, fault: str) -> Start:
        return Start(run.name, fault, 2, 0, 0, "loading\n\nerror: data.train: no such file\n")

    monkeypatch.setattr(resume, "start", refused)
    with pytest.raises(UserError, match=r"ended with code 2:\nloading\nerror: data\.train: no such file"):
        resume.command(Request("check resume", typed(PAGE)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("trainer", "words", "lengths"),
    [
        ({"max_steps": 1000}, [], (12, 3)),
        ({"max_steps": 40}, ["trainer.max_steps=40"], (40, 13)),
        ({"max_steps": 40, "save_every": 5}, ["trainer.max_steps=40", "+trainer.save_every=5"], (40, 5)),
        ({"max_steps": 7}, [], (7, 2)),
        ({"max_steps": None, "max_tokens": 5 * 8192}, [], (5, 1)),
        ({"max_steps": 3}, [], "trainer.max_steps = 3: too few"),
        ({"max_steps": 12, "save_every": 4}, ["trainer.save_every=4"], "trainer.save_every = 4: no room"),
    ],
)
def test_lengths(trainer: dict, words: list[str], lengths: tuple[int, int] | str) -> None:
    config = RunConfig.model_validate(PAGE | {"trainer": trainer})
    if isinstance(lengths, str):
        with pytest.raises(UserError, match=lengths):
            resume.lengths(config, words)
    else:
        assert resume.lengths(config, words) == lengths


@pytest.mark.parametrize("every", range(1, 30))
def test_every_fault_is_passed_in_its_turn(every: int) -> None:
    """The second kill falls between the first save and the second, whatever the cadence."""
    count = int(resume.faults(every)[1].partition(":")[2])
    assert every < count <= 2 * every


def _run(folder: Path, model: dict[str, torch.Tensor], ledger: str = "") -> Run:
    shards = {"model": model, "optim": {}, "rng": {}}
    run = Run(folder.name, folder, typed(PAGE))
    run.checkpoint = store.save(run.checkpoints, 1, shards, {})
    run.ledger.write_text(ledger)
    return run


def test_tensors_are_compared_as_bits(tmp_path: Path) -> None:
    base = {"a": torch.tensor([0.0, float("nan")]), "b": torch.ones(2)}
    one = _run(tmp_path / "one", base)
    assert compare(one, _run(tmp_path / "same", base), 0)[1] == []
    for number, change in enumerate(
        [
            {"a": torch.tensor([-0.0, float("nan")])},
            {"b": torch.ones(2).bfloat16()},
            {"b": torch.ones(1, 2)},
            {"c": torch.ones(1)},
        ]
    ):
        other = _run(tmp_path / str(number), base | change)
        (found,) = compare(one, other, 0)[1]
        assert found == f"tensors of parameters: 1, such as {next(iter(change))}"


def test_a_missing_or_doubled_step_is_found(tmp_path: Path) -> None:
    line = '{{"step": {}, "loss_hex": "", "grad_norm_hex": "", "samples": [], "tokens": 0, "params": []}}\n'
    one = _run(tmp_path / "one", {}, line.format(1) + line.format(2))
    for name, steps in (("short", [1]), ("twice", [1, 1, 2]), ("swapped", [2, 1])):
        other = _run(tmp_path / name, {}, "".join(line.format(step) for step in steps))
        expected = f"{name} has {len(steps)} steps in its ledger, expected 1 to 2"
        assert expected in compare(one, other, 2)[1]


def test_a_hash_of_parameters_is_compared(tmp_path: Path) -> None:
    """Of every step, and of every rank."""
    line = '{{"step": 1, "loss_hex": "", "grad_norm_hex": "", "samples": [], "tokens": 0, "params": {}}}\n'
    one, other = (_run(tmp_path / name, {}, line.format(f'["a", "{name}"]')) for name in ("b", "c"))
    assert compare(one, other, 1)[1] == ["hashes of parameters: 1 of 1, the first at step 1"]


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_the_real_thing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from faults.harness import write_page

    write_page(tmp_path, steps=100, every=50)
    request = Request("check resume", load([f"config={tmp_path}/tiny.yaml"]), None, [], {"json": True})
    assert resume.command(request) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["kills"] == 4 and found["equal"]["losses"] == 12

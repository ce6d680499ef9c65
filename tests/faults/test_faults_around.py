"""What goes wrong around a run: another one in its folder, its data, its service, the clock, the machine."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from faults import spoil
from faults.harness import write_page
from faults.ranks import Pair, Ranks
from ssmtrain.checkpoint import faults, store
from ssmtrain.config.errors import UserError
from ssmtrain.train.callbacks import saving
from train.conftest import WORDS, losses, records
from train.conftest import train as train

Train = Callable[..., tuple[int, Path]]


def stopped(ranks: Ranks) -> bool:
    """Whether the first process stands still (SIGSTOP)."""
    state = Path(f"/proc/{ranks.processes[0].pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state == "T"


def test_a_second_start_in_the_folder_is_told_of_the_first(tmp_path: Path) -> None:
    write_page(tmp_path, steps=4, every=2)
    story = Pair(tmp_path, "one", world=1)
    first = story.go({0: "step_start:3:STOP"})
    while not stopped(first):
        time.sleep(0.01)
    line = ["fit", f"config={tmp_path}/tiny.yaml", "name=one", f"runs_dir={tmp_path}/runs"]
    second = Ranks.begin(line, tmp_path / "second.log", 1)
    assert second.wait() == [2], second.output
    assert f"run one is in use by process {first.processes[0].pid}" in second.output, second.output
    assert "wait for it, stop it, or start another run with name=…" in second.output
    first.signal(0, signal.SIGCONT)
    assert story.done(first).code == 0 and len(story.ledger()) == 4


@pytest.fixture
def black_hole() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.socket() as hole:
        hole.bind(("127.0.0.1", 0))
        hole.listen(50)
        yield hole.getsockname()[1]


def test_a_service_that_never_answers_is_not_waited_for(tmp_path: Path, black_hole: int) -> None:
    """Weights & Biases behind a firewall that drops everything: told once, and the run is the same."""
    write_page(tmp_path, steps=4, every=2)
    alone, story = (Pair(tmp_path, name, world=1) for name in ("alone", "logged"))
    assert alone.run().code == 0
    line = ["fit", f"config={tmp_path}/tiny.yaml", "name=logged", f"runs_dir={tmp_path}/runs", "logger=wandb"]
    service = {"WANDB_BASE_URL": f"http://127.0.0.1:{black_hole}", "WANDB_API_KEY": "x" * 40}
    hooks = {0: partial(spoil.first_contact, 1.0)}
    done = Ranks.begin(
        line, tmp_path / "logged.log", 1, before=hooks, WANDB_MODE="online", WANDB_HTTP_TIMEOUT="1", **service
    )
    assert done.wait(limit=60) == [0], done.output
    assert "Weights & Biases is not available (" in done.output and "x" * 40 not in done.output
    assert "metrics.jsonl has everything" in done.output
    assert story.ledger() == alone.ledger()


def test_a_tokenizer_of_the_same_size_is_refused(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tokenizer.json"
    names = ["<|endoftext|>", "[UNK]", *sorted(set(WORDS))]

    def write(words: list[str]) -> None:
        made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        made.save(str(file))

    write(names)
    changes = {"tokenizer": {"kind": "file", "path": str(file)}, "data__seq_len": 32}
    faults.arm("step_end:1:TERM")
    assert train(**changes)[0] == 75
    faults.arm()
    write([*names[:2], *reversed(names[2:])])
    with pytest.raises(UserError) as caught:
        train(**changes)
    assert caught.value.lines == [
        "tokenizer: its content has changed since the run started",
        "put the former file back, or start another run with name=…",
    ]
    write(names)
    assert train(**changes)[0] == 0


def rewrite_versions(checkpoint: Path, **changes: str) -> None:
    """Make a checkpoint say that it was saved with other versions, its hash being right."""
    state = json.loads((checkpoint / store.STATE).read_text())
    state["versions"] |= changes
    data = json.dumps(state).encode() + b"\n"
    (checkpoint / store.STATE).write_bytes(data)
    manifest = json.loads((checkpoint / store.MANIFEST).read_text())
    manifest["files"][store.STATE] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (checkpoint / store.MANIFEST).write_text(json.dumps(manifest) + "\n")


def test_other_versions_are_told_in_a_line(
    train: Train, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ssmtrain")
    faults.arm("step_start:3:TERM")
    code, folder = train()
    assert code == 75
    faults.arm()
    (newest,) = store.checkpoints(folder / "checkpoints")
    known = json.loads((newest / store.STATE).read_text())["versions"]
    assert {"ssmtrain", "torch", "triton", "python", "device", "cuda", "driver"} == known.keys()
    rewrite_versions(newest, torch="2.0.1", device="CPU of another kind")
    assert train()[0] == 0
    now = f"torch 2.0.1 then, {known['torch']} now; device CPU of another kind then, {known['device']} now"
    assert f"other than when step 3 was saved: {now}" in caplog.text
    assert "the last bits of the loss may differ" in caplog.text
    (record,) = records(folder, "environment")
    assert record["step"] == 3 and len(record["changes"]) == 2
    caplog.clear()
    assert train(trainer__max_steps=9)[0] == 0
    assert "other than" not in caplog.text


def test_a_disk_without_room_is_told_before_the_first_step(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, folder = train(name="small", trainer__max_steps=1)
    assert code == 0
    (newest,) = store.checkpoints(folder / "checkpoints")
    size = sum((newest / name).stat().st_size for name in ("model.safetensors", "optim.safetensors"))
    usage = type("Usage", (), {"free": 0.9 * size})
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="GB are free there, a checkpoint takes") as caught:
        train(name="full")
    assert caught.value.lines[1] == "free some, or put the run elsewhere with runs_dir=…"
    assert not (tmp_path / "runs" / "full" / "ledger.jsonl").exists()
    usage.free = 1.3 * size
    assert train(name="full", trainer__max_steps=1)[0] == 0


def test_a_clock_that_jumps_changes_nothing(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """A day back at every look, with a time limit; and the newest checkpoint is so by its step."""
    _, whole = train(name="whole")
    jumps = iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: 1e9 - 86400.0 * next(jumps))
    faults.arm("step_end:6:TERM")
    code, folder = train(name="jumped", trainer__max_seconds=600, trainer__save_every=2)
    assert code == 75
    faults.arm()
    older, newest = store.checkpoints(folder / "checkpoints")
    os.utime(newest, (0, 0))
    os.utime(older, (4e9, 4e9))
    assert store.newest_good(folder / "checkpoints", pytest.fail) == newest
    assert train(name="jumped", trainer__max_seconds=600, trainer__save_every=2)[0] == 0
    assert losses(folder) == losses(whole)
    seconds = [record["seconds"] for record in records(folder, "train")]
    assert seconds == sorted(seconds) and seconds[0] > 0 and seconds[-1] < 300


def soaked(folder: Path, steps: int, layout: str) -> list[list[int]]:
    """(step, resident bytes, open files, threads) before every step of a run of the tiny hybrid."""
    write_page(folder, steps, every=40)
    story, log = Pair(folder, "soak", world=1, limit=900), folder / "weights.txt"
    words = [
        f"model.layout={layout}",
        "trainer.global_batch=32",
        "trainer.val_every=50",
        "trainer.val_tokens=32",
        "trainer.health_every=50",
    ]
    done = story.done(story.go(None, *words, before={0: partial(spoil.weighed, str(log))}))
    assert done.code == 0, done.output
    found = [[int(word) for word in line.split()] for line in log.read_text().splitlines()]
    assert [line[0] for line in found] == list(range(steps))
    return found


def growth(found: list[list[int]], begin: int) -> float:
    """Bytes per step that the memory grows by from a step on: the line of least squares."""
    steps, sizes = zip(*((line[0], line[1]) for line in found[begin:]), strict=True)
    return statistics.linear_regression(steps, sizes).slope


def test_a_soak_of_three_hundred_steps(tmp_path: Path) -> None:
    """Saves, validations and figures included, neither memory nor files nor threads pile up."""
    found = soaked(tmp_path, 320, "A")
    assert growth(found, 120) * 200 < 2 * 2**20
    assert len({line[2] for line in found[120:]}) == 1, "open files"
    assert len({line[3] for line in found[120:]}) == 1, "threads"


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_a_soak_of_two_thousand_steps(tmp_path: Path) -> None:
    found = soaked(tmp_path, 2000, "MSA")
    assert growth(found, 500) * 1000 < 2**20
    assert len({line[2] for line in found[500:]}) == 1

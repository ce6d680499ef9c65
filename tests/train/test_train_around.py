"""What surrounds the step: signals, random states, records, the curve, loggers, peaks, compile."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ssmtrain.layers.base import Context
from ssmtrain.parallel import apply as applied
from ssmtrain.train import curve
from ssmtrain.train.callbacks.wandb_log import WandbSink, _at_the_end, flat, unsent
from ssmtrain.train.callbacks.words import duration, si
from ssmtrain.train.journal import Journal, JsonLines
from ssmtrain.train.module import LitLM
from ssmtrain.train.peaks import peak_of_name
from ssmtrain.train.signals import Signals
from ssmtrain.train.state import RunState, forked_rng, rng_tensors, seed_generators, set_rng_tensors
from train.conftest import records

CPU = torch.device("cpu")
Train = Callable[..., tuple[int, Path]]


def draws() -> tuple[float, float, float, float]:
    return float(torch.rand(())), float(np.random.normal()), random.random(), random.gauss(0, 1)


def test_generators_come_back_to_the_bit() -> None:
    seed_generators(3, 0, 7)
    draws()
    state = rng_tensors(CPU)
    expected = [draws(), draws()]
    set_rng_tensors(state, CPU)
    assert [draws(), draws()] == expected
    set_rng_tensors(state, CPU)
    with forked_rng(CPU, seed=5):
        draws()
    assert [draws(), draws()] == expected
    seed_generators(3, 1, 7)
    assert draws() != expected[0]


def test_run_state_round_trip() -> None:
    state = RunState(step=3, tokens=9, best_val=1.5)
    assert RunState.from_dict({**state.as_dict(), "of_a_later_version": 1}) == state


def test_signals_set_a_flag_and_the_second_interrupt_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    signals, ended = Signals(), []
    signals.at_once = lambda: ended.append("children")
    monkeypatch.setattr(os, "_exit", ended.append)
    try:
        signals.install()
        signal.raise_signal(signal.SIGTERM)
        assert ended == ["children", 75]  # nothing to finish yet
        ended.clear()
        signals.asked, signals.training = None, True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # another library takes it: install again takes it back
        signals.install()
        signal.raise_signal(signal.SIGTERM)
        assert signals.asked == "SIGTERM"
        signal.raise_signal(signal.SIGUSR1)
        assert (signals.asked, ended) == ("SIGTERM", [])
        signal.raise_signal(signal.SIGINT)
        assert ended == ["children", 130]
    finally:
        signals.restore()
    assert signal.getsignal(signal.SIGTERM) is before
    worker = threading.Thread(target=Signals().install)  # fit may be called outside the main thread
    worker.start()
    worker.join()


def test_records_are_json_and_a_broken_sink_is_dropped(tmp_path: Path) -> None:
    class Broken:
        def write(self, record: Any) -> None:
            raise OSError("unplugged")

        def close(self) -> None:
            raise OSError("unplugged")

    journal = Journal()
    journal.sinks = [Broken(), JsonLines(tmp_path / "m.jsonl")]
    journal.write("train", 1, loss=float("nan"), layers={"mamba2": {"dt_max": float("inf")}}, many=[1.0])
    journal.write("train", 2, loss=1.0)
    assert len(journal.sinks) == 1
    journal.close()
    first, second = map(json.loads, (tmp_path / "m.jsonl").read_text().splitlines())
    assert first == {
        "kind": "train",
        "step": 1,
        "loss": None,
        "layers": {"mamba2": {"dt_max": None}},
        "many": [1.0],
    }
    assert second["loss"] == 1.0


def test_curve(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"kind": "train", "step": i, "loss": 1.0, "bpb": 8.0 - i / 20}) for i in range(100)]
    path.write_text("\n".join([*lines, '{"kind": "val", "step": 99, "bpb": 3.5}', '{"kind": "tra']))
    train, val = curve.read(path)
    assert len(train) == 100 and val == [(99, 3.5)]
    assert curve.last_loss(path) == 1.0
    drawn = curve.draw([bpb for _, bpb in train], width=40)
    assert len(drawn) == 4 and drawn[0].startswith(" 7.9") and drawn[-1].startswith(" 3.07")
    assert drawn[-1].count("█") > drawn[0].count("█")
    assert curve.draw([1.0, 1.0, 1.0])[-1].endswith("▁▁▁")
    assert curve.draw([1.0]) == []


def test_words_and_peaks() -> None:
    assert [duration(s) for s in (41.6, 185, 7800, 273600)] == ["42 s", "3 min 05 s", "2 h 10 min", "3 d 4 h"]
    assert [si(n) for n in (940, 12345, 1.2e6)] == ["940", "12.3k", "1.2M"]
    assert peak_of_name("NVIDIA H200") == peak_of_name("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_of_name("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_of_name("NVIDIA H100 PCIe") == 756e12
    assert peak_of_name("NVIDIA L40S") == 362e12
    assert peak_of_name("some GPU") is None


def test_compiled_blocks_decode_and_score_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda f: lambda *args: ("fast", f(*args)))
    prepared: list[Context] = []
    run = applied.compiled(lambda x, ctx, state: x, lambda x, ctx: prepared.append(ctx))
    x, ctx = torch.ones(1), Context()
    assert run(x, ctx) == ("fast", x) and prepared == [ctx]
    assert run(x, Context(states=[])) is x
    with torch.no_grad():
        assert run(x, Context()) is x


def test_wandb_offline_and_a_service_that_fails(
    train: Train, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    sent: list[dict[str, Any]] = []
    started: list[dict[str, Any]] = []

    class Page:
        id = "1a2b"

        def define_metric(self, *args: Any, **options: Any) -> None: ...

        def log(self, figures: dict[str, Any]) -> None:
            sent.append(figures)

        def finish(self) -> None:
            sent.append({"finished": True})

    def init(**options: Any) -> Page:
        started.append(options)
        return Page()

    monkeypatch.setattr(wandb, "init", init)
    changes = {"logger": {"kind": "wandb", "mode": "offline"}, "trainer__max_steps": 2}
    assert train(**changes)[0] == 0
    assert {"step", "train/loss", "train/time/data"} <= sent[0].keys()
    assert sent[-1] == {"finished": True}
    train(**{**changes, "trainer__max_steps": 3})
    assert started[0]["id"] == started[1]["id"] and started[1]["resume"] == "allow"
    assert (started[0]["mode"], started[0]["project"]) == ("offline", "ssmtrain")

    def refuse(**options: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(wandb, "init", refuse)
    code, folder = train(name="alone", **changes)
    assert code == 0 and "no route to host" in caplog.text
    assert records(folder, "train")
    assert flat({"kind": "health", "step": 1, "layers": {"m": {"a": 1.0}}}) == {"health/layers/m/a": 1.0}


def pieces_of_log(data: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format: blocks of 32 KiB, each record in one piece or several."""
    at, held = 7, b""  # the file's own header
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        held += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield held
            held = b""


def logged(folder: Path) -> tuple[list[Any], list[tuple[int, float]]]:
    """What wandb wrote of a start: its run records, and (step, training loss) of its history."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("*.wandb")
    runs, curve = [], []
    for data in pieces_of_log(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            runs.append(record.run)
        items = {(i.key or i.nested_key[0]): json.loads(i.value_json) for i in record.history.item}
        if "train/loss" in items:
            curve.append((items["step"], items["train/loss"]))
    return runs, curve


def test_wandb_offline_continues_one_page_in_its_group(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two starts of an arm of a sweep, kept here: one id, one group, and the line that sends both."""
    changes = {"name": "lrs/one", "logger": {"kind": "wandb", "mode": "offline"}, "trainer__log_every": 1}
    said = []
    for steps in (2, 4):
        code, folder = train(**changes, trainer__max_steps=steps)
        assert code == 0
        said.append(capsys.readouterr().out.splitlines()[-1])
    kept = sorted((folder / "wandb").glob("offline-run-*"))
    assert len(kept) == 2 and said[1].endswith(f"wandb sync {kept[0]} {kept[1]}")
    assert said[0].endswith(f"wandb sync {kept[0]}")
    first, second = map(logged, kept)
    assert {run.run_id for run in first[0] + second[0]} == {(folder / ".wandb_id").read_text().strip()}
    assert {(run.run_group, run.display_name) for run in first[0] + second[0]} == {("lrs", "lrs/one")}
    curve = [(record["step"], record["loss"]) for record in records(folder, "train")]
    until = time.monotonic() + 20  # wandb's own process writes, and on a busy machine it is late
    while (found := first[1] + logged(kept[1])[1]) != curve and time.monotonic() < until:
        time.sleep(0.1)
    assert found == curve and len(curve) == 4
    (kept[0] / "run.wandb.synced").touch()
    assert unsent(folder, (folder / ".wandb_id").read_text().strip()) == [kept[1]]


def test_a_service_that_goes_away_is_not_waited_for_at_the_end(tmp_path: Path) -> None:
    class Page:
        id = "1a2b"
        settings = SimpleNamespace(sync_dir="runs/a b/wandb/run-1")

        def define_metric(self, *args: Any, **options: Any) -> None: ...

        def finish(self) -> None:
            raise TimeoutError("still uploading")

    said = WandbSink(Page(), tmp_path).close()
    assert said and said.endswith("wandb sync 'runs/a b/wandb/run-1'")
    import wandb

    limits = _at_the_end(wandb.Settings)
    assert 0 < wandb.Settings(**limits).finish_timeout <= 60 and limits["finish_timeout_raises"]


def test_tensorboard_goes_on_after_a_kill_without_duplicates(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that a killed start had logged past its checkpoint are shown once, as taken again."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    changes = {"logger": {"kind": "tensorboard"}, "trainer__log_every": 1, "trainer__save_every": 3}

    def killed(self: LitLM, micro: Any, labels: int) -> bool:
        if self.state.step == 5:
            raise OSError("the power is gone")
        return real(self, micro, labels)

    real = LitLM.step
    with monkeypatch.context() as patch:
        patch.setattr(LitLM, "step", killed)
        with pytest.raises(OSError, match="power"):
            train(**changes)
    code, folder = train(**changes)
    assert code == 0
    events = list((folder / "tensorboard").glob("events.*"))
    assert len(events) == 2 and b"train/loss" in events[0].read_bytes()
    shown = EventAccumulator(str(folder / "tensorboard"))
    shown.Reload()
    curve = [(event.step, event.value) for event in shown.Scalars("train/loss")]
    expected = [(record["step"], record["loss"]) for record in records(folder, "train")]
    assert [step for step, _ in curve] == [step for step, _ in expected] == list(range(1, 9))
    assert [value for _, value in curve] == pytest.approx([value for _, value in expected])


def test_commands_to_type_next_are_found_by_the_shell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from ssmtrain.train import report

    tool = tmp_path / "env" / "bin" / "ssmtrain"
    tool.parent.mkdir(parents=True)
    monkeypatch.setattr(report.sys, "executable", str(tool.parent / "python"))
    monkeypatch.setenv("PATH", "")
    assert report.program() == f"{tool.parent / 'python'} -m ssmtrain"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    assert report.program() == "env/bin/ssmtrain"
    monkeypatch.chdir(tool.parent)
    assert report.program() == "./ssmtrain"
    monkeypatch.setenv("PATH", str(tool.parent))
    assert report.program() == "ssmtrain"

"""fit --multirun: the arms, their processes, the signals they get, and the table at the end."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ssmtrain.cli import main
from ssmtrain.config.arms import arm_names, plan
from ssmtrain.config.load import load
from ssmtrain.sweep.local import _Children, _forwarding, table

PAGE = """\
model:
  d_model: 16
  layout: M4AM5
  blocks: {M: {mixer: {kind: mamba2, d_state: 8, head_dim: 8}}, A: {mixer: {kind: attention, n_heads: 2}}}
trainer: {max_steps: 2, global_batch: 64, accelerator: cpu, val_tokens: 64, threads: 1}
data: {kind: text, train: text.txt, seq_len: 32}
generate: {max_tokens: 4}
"""

STUB = """\
#!{python}
# Stands in for `python -m ssmtrain fit …`: one report per arm, or the exit code that the page of arms says.
import json, pathlib, sys
assert sys.argv[1:4] == ["-m", "ssmtrain", "fit"], sys.argv
words = dict(word.split("=", 1) for word in sys.argv[4:])
code = {codes}.get(words["model.layout"], 0)
pathlib.Path("started").open("a").write(words["name"] + "\\n")
print("training", words["name"])
if code == 0:
    folder = pathlib.Path("runs", words["name"])
    folder.mkdir(parents=True)
    report = {{"val_loss": 1.5, "val_bpb": 2.0 + len(words["model.layout"]), "params": 1234567, "steps": 2}}
    (folder / "report.json").write_text(json.dumps(report))
sys.exit(code)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.yaml").write_text(PAGE)
    return tmp_path


def stub(folder: Path, monkeypatch: pytest.MonkeyPatch, codes: dict[str, int]) -> None:
    fake = folder / "python"
    fake.write_text(STUB.format(python=sys.executable, codes=codes))
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))


def test_arms_are_named_after_their_values(folder: Path) -> None:
    arms = plan(
        ["config=page.yaml", "optim.lr=1e-3,2e-3", "model.layout=M4AM5,ratio(10,2)", "seed=7", "name=mine"]
    )
    assert [arm.name for arm in arms] == [
        "mine/lr-0.001_layout-M4AM5",
        "mine/lr-0.001_layout-ratio-10-2",
        "mine/lr-0.002_layout-M4AM5",
        "mine/lr-0.002_layout-ratio-10-2",
    ]
    assert arms[3].folder == Path("runs/mine/lr-0.002_layout-ratio-10-2")
    config = load(list(arms[3].line))
    assert config == arms[3].config
    assert (config.optim.lr, config.model.layout, config.seed, config.name) == (
        0.002,
        "ratio(10,2)",
        7,
        arms[3].name,
    )


def test_without_a_name_the_same_line_finds_its_arms_again(folder: Path) -> None:
    line = ["config=page.yaml", "model.layout=M4AM5,M5AM4"]
    first, again = plan(line), plan([*line, "trainer.max_steps=3"])
    assert [arm.name for arm in first] == [arm.name for arm in again]
    assert first[0].name.startswith("page-")
    assert plan([*line, "seed=1"])[0].name != first[0].name


def test_names_that_collide_are_numbered() -> None:
    assert arm_names(["a.x"], [["1"], ["2"]]) == ["x-1", "x-2"]
    assert arm_names(["x"], [["a/b"], ["a:b"]]) == ["0-x-a-b", "1-x-a-b"]
    assert arm_names(["x"], [["a"], ["A"]]) == ["0-x-a", "1-x-A"]
    long = arm_names(["x"], [["v" * 200]])[0]
    assert len(long) <= 100


def test_arms_run_one_after_another_and_end_in_a_table(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stub(folder, monkeypatch, {"M4AM5": 3})
    line = ["fit", "config=page.yaml", "model.layout=M4AM5,M8AM,M5AM4", "name=mine", "--multirun"]
    assert main(line) == 3
    assert (folder / "started").read_text().split() == [
        "mine/layout-M4AM5",
        "mine/layout-M8AM",
        "mine/layout-M5AM4",
    ]
    out, err = capfd.readouterr()
    assert "[2/3] model.layout=M8AM" in err
    rows = [row.split() for row in out.splitlines()[-3:]]
    assert rows[0][:2] == ["mine/layout-M8AM", "finished"] and "1,234,567" in rows[0] and "6.0000" in rows[0]
    assert rows[1][:2] == ["mine/layout-M5AM4", "finished"]
    assert rows[2][:3] == ["mine/layout-M4AM5", "non-finite", "-"]


def test_the_table_as_json(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stub(folder, monkeypatch, {})
    assert main(["fit", "config=page.yaml", "model.layout=M4AM5,M5AM4", "name=mine", "-m", "--json"]) == 0
    out, err = capfd.readouterr()
    rows = json.loads(out)
    assert [row["arm"] for row in rows] == ["mine/layout-M4AM5", "mine/layout-M5AM4"]
    assert rows[0]["choices"] == ["model.layout=M4AM5"] and rows[0]["val_bpb"] == 7.0 and rows[0]["exit"] == 0
    assert "training" in err


def test_a_stopped_arm_stops_the_rest(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stub(folder, monkeypatch, {"M4AM5": 75})
    assert main(["fit", "config=page.yaml", "model.layout=M4AM5,M5AM4", "-m"]) == 75
    out, err = capfd.readouterr()
    assert len((folder / "started").read_text().split()) == 1
    assert "not started" in out and "goes on where it stopped" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_reach_the_arm(number: signal.Signals, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    child = (
        "import pathlib, signal, sys, time\n"
        f"signal.signal({int(number)}, lambda *_: sys.exit(75))\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "time.sleep(30)"
    )

    def stop() -> None:
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    thread = threading.Thread(target=stop)
    with _forwarding() as children:
        thread.start()
        assert children.run([sys.executable, "-c", child], quiet=False) == 75
        assert children.stopped
    thread.join()
    assert signal.getsignal(number) is before


def test_an_arm_killed_by_a_signal_has_the_shells_code() -> None:
    line = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    assert _Children().run(line, quiet=False) == 137


def test_the_table_lines_up() -> None:
    blank: dict[str, Any] = dict.fromkeys(
        ("val_bpb", "val_loss", "params", "tokens_per_s", "steps", "seconds")
    )
    rows = [
        {"arm": "a", "status": "lost", **blank},
        {
            "arm": "long-name",
            "status": "finished",
            **blank,
            "val_bpb": 1.9,
            "tokens_per_s": 12345.6,
            "steps": 50,
        },
    ]
    lines = table(rows)
    assert lines[1].split() == ["long-name", "finished", "1.9000", "-", "-", "12,346", "50", "-"]
    assert lines[2].split() == ["a", "lost", "-", "-", "-", "-", "-", "-"]
    assert len({line.index(word) for line, word in zip(lines, ("status", "finished", "lost"))}) == 1


def test_arms_on_a_task_show_what_is_right() -> None:
    blank: dict[str, Any] = dict.fromkeys(("val_bpb", "params", "tokens_per_s", "steps", "seconds"))
    rows = [
        {
            "arm": arm,
            "status": "finished",
            **blank,
            "val_loss": loss,
            "val_accuracy": right,
            "val_row_accuracy": whole,
        }
        for arm, loss, right, whole in (("a", 0.5, 0.75, 0.5), ("b", 0.1, 0.99, 0.9))
    ]
    lines = table(rows)
    assert lines[0].split()[:6] == ["arm", "status", "right", "rows", "right", "val"]
    assert lines[1].split()[:6] == ["b", "finished", "99.00", "%", "90.00", "%"]
    assert "bits/byte" in table([{**rows[0], "val_bpb": 2.0}, rows[1]])[0]


def test_two_real_arms(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "src"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (folder / "text.txt").write_text("It is a truth universally acknowledged. " * 100)
    line = ["fit", "config=page.yaml", "model.layout=M4AM5,M5AM4", "name=two", "-m", "--json"]
    assert main(line) == 0
    rows = json.loads(capfd.readouterr().out)
    assert [row["status"] for row in rows] == ["finished", "finished"]
    assert all(row["val_bpb"] > 0 and row["steps"] == 2 and row["params"] > 0 for row in rows)
    assert rows[0]["params"] == rows[1]["params"]

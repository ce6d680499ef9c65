"""Runs seen from outside: their states, ls, show and diff, and that looking is quick and changes nothing."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runs.conftest import MakeRun, train_record, val_record
from ssmtrain.checkpoint import lock
from ssmtrain.cli import main
from ssmtrain.runs.folder import limits, look, state_of
from ssmtrain.runs.lines import Follower, backwards, latest, records
from ssmtrain.runs.words import size, table
from ssmtrain.train import attempts


def test_a_run_is_in_one_of_seven_states(make_run: MakeRun, dead_owner: str) -> None:
    assert state_of(make_run("done", 20, "finished", "finished")) == ("finished", "")
    assert state_of(make_run("halted")) == ("stopped", "SIGTERM")
    assert state_of(make_run("broken", end="failed: NonFinite: layer 3")) == ("failed", "NonFinite: layer 3")
    assert state_of(make_run("gone", end=None))[0] == "killed"
    killed = make_run("killed", end=None)
    (killed / "lock").write_text(dead_owner)
    state, why = state_of(killed)
    assert state == "killed" and "is gone" in why and str(json.loads(dead_owner)["pid"]) in why
    with (killed / "lock").open() as left:  # a process that the dead one started still has its file
        fcntl.flock(left, fcntl.LOCK_EX)
        assert state_of(killed) == (state, why)
    (killed / "attempts.jsonl").unlink()
    assert state_of(killed)[0] == "new"
    running = make_run("running", end=None)
    held = lock.acquire(running / "lock")
    state, why = state_of(running)
    assert state == "running" and f"process {os.getpid()} on " in why
    held.release()
    assert state_of(running)[0] == "killed"
    old = make_run("old")
    (old / "attempts.jsonl").write_text('{"attempt": 1, "begin": 0, "step": 4, "time": {"step": 1.0}}\n')
    assert state_of(old) == ("stopped", "")


def test_a_run_that_stalled_says_for_whom_it_waited(
    make_run: MakeRun, dead_owner: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A watcher ended the process that held the lock, which could not give it back."""
    run = make_run("still", 5, end=None)
    (run / "lock").write_text(dead_owner)
    where = "rank 1 (process 7 on there) is behind the others; after step 5, in train/module.py:3 step"
    attempts.leave_word(run / attempts.FILE, f"stalled: {where}")
    assert state_of(run) == ("stalled", where)
    assert main(["runs", "ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:2] == ["still", "stalled"] and lines[-1] == f"still stalled: {where}"
    assert main(["runs", "show", "still"]) == 0
    assert where in capsys.readouterr().out
    times = (run / attempts.FILE).stat()
    os.utime(
        run / "lock", ns=(times.st_atime_ns, times.st_mtime_ns + 1)
    )  # of a later start, which was killed
    assert state_of(run)[0] == "killed"


def test_looking_takes_nothing(make_run: MakeRun) -> None:
    folder = make_run("mine")
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    look(folder, Path("runs"))
    assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before
    assert lock.look(folder / "lock") is None and lock.look(folder / "absent") is None
    held = lock.acquire(folder / "lock")  # while and after it is looked at, a start gets it
    seen = lock.look(folder / "lock")
    assert seen is not None and seen.lives
    with pytest.raises(lock.Held):
        lock.acquire(folder / "lock")
    held.release()
    assert lock.look(folder / "lock") is None


def test_runs_answer_without_torch(make_run: MakeRun) -> None:
    folder = make_run("mine")
    make_run("other", words=("optim.lr=0.5",))
    code = (
        "import sys; from ssmtrain.cli import main;"
        "assert not any([main(['runs', 'ls']), main(['runs', 'show', 'mine']),"
        "main(['runs', 'tail', 'mine']),"
        "main(['runs', 'diff', 'mine', 'other']), main(['runs', 'rm', 'mine', '--yes'])]);"
        "heavy = {'torch', 'lightning', 'pydantic', 'hydra', 'numpy', 'matplotlib'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert not folder.exists()


def test_ls_nests_arms_and_sorts(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    make_run("b-alone", 4, records=[train_record(4), val_record(4, 1.0)])
    make_run("b/lr-2", 8, records=[train_record(8), val_record(8, 3.0)])
    make_run("b/lr-1", 9, records=[train_record(9), val_record(9, 2.0)])
    make_run("fresh", 0, records=[], end=None)
    assert main(["runs", "ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["run", "b/", "lr-1", "lr-2", "b-alone", "fresh"]
    assert lines[2].startswith("  lr-1  ") and " 9/20 " in lines[2] and "2.8986" in lines[2]
    for order, first in (("val", "b-alone"), ("step", "b/lr-1"), ("loss", "b/lr-1"), ("state", "b/lr-1")):
        assert main(["runs", "ls", f"sort={order}"]) == 0
        assert capsys.readouterr().out.splitlines()[1].startswith(f"{first} ")
    assert main(["runs", "ls", "b/*", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(run["name"], run["step"], run["max_steps"]) for run in found] == [
        ("b/lr-1", 9, 20),
        ("b/lr-2", 8, 20),
    ]
    assert found[0]["progress"] == 0.45 and found[0]["val_loss"] == 2.0
    assert main(["runs", "ls", "sort=weight"]) == 2
    assert "expected one of name, state" in capsys.readouterr().err
    assert main(["runs", "ls", "runs_dir=nowhere"]) == 0
    assert "there are no runs in nowhere" in capsys.readouterr().out


def test_damaged_runs_are_listed_and_shown(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    torn = make_run("torn", 3)
    with (torn / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\xfe[]\n{"kind": "val", "step": NaN, "bpb": "x"}\n{"kind": "train", "st')
    empty = make_run("empty")
    for file_ in empty.iterdir():
        if file_.is_file():
            file_.write_bytes(b"")
    bare = make_run("bare")
    for name in ("metrics.jsonl", "status.json", "attempts.jsonl", "lock"):
        (bare / name).unlink()
    (bare / "checkpoints").rmdir()
    (bare / "config.yaml").write_bytes(b"\x00\xff: [")
    assert main(["runs", "ls", "--json"]) == 0
    found = {run["name"]: run for run in json.loads(capsys.readouterr().out)}
    assert found["torn"]["loss"] == pytest.approx(5.0 / 3**0.2) and found["torn"]["val_bpb"] is None
    assert found["bare"]["state"] == found["empty"]["state"] == "new"
    for name in ("torn", "empty", "bare"):
        assert main(["runs", "show", name]) == 0
        assert main(["runs", "tail", name]) == 0
    assert "config.yaml cannot be read" in capsys.readouterr().out


def test_show_says_how_each_start_ended(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [train_record(1), val_record(1, 3.5), {"kind": "sample", "step": 1, "text": "\x1b[2J"}]
    folder = make_run("mine", 12, end="failed: NonFinite: loss \x1b[31m token=hf_" + "a" * 20, records=lines)
    saved = folder / "checkpoints" / "step-00000001"
    saved.mkdir()
    (saved / "model.safetensors").write_bytes(bytes(2000))
    (folder / "best").symlink_to("checkpoints/step-00000001")
    assert main(["runs", "show", "runs/mine"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("mine: failed (NonFinite: loss")
    for said in (
        "M2AM4AM2, d_model 160; M = mamba2, A = attention",
        "step       12 of 20 (60.0 %)",
        "steps 0 to 12  12 s  failed: NonFinite: loss",
        "goodput: 66.7 % of 12 s in 1 start",
        "@step-1  2 kB  validation loss 3.5000  best",
        "ssmtrain fit config=",
        "ssmtrain runs rm mine",
    ):
        assert said in told
    assert "\x1b" not in told and "hf_a" not in told
    assert main(["runs", "show", "mine", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["checkpoints"][0]["best"] is True and found["attempts"][0]["step"] == 12
    assert main(["runs", "show", "mien"]) == 2
    assert "mien: there is no such run" in (said := capsys.readouterr().err) and "runs in runs: mine" in said


def test_diff_puts_runs_beside_each_other(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    make_run("a", records=[train_record(10), val_record(10, 2.0)], words=("trainer.log_every=3",))
    make_run("b", records=[train_record(9), val_record(9, 1.0)], words=("optim.lr=0.5",))
    make_run("c", words=("optim.lr=0.5", "seed=4"))
    assert main(["runs", "diff", "a", "b", "run=c"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["a", "b", "c"]
    assert lines[1].split() == ["seed", "0", "0", "4"] and lines[2].split() == [
        "optim.lr",
        "0.004",
        "0.5",
        "0.5",
    ]
    assert lines[3].split() == ["trainer.log_every", "3", "20", "20"] and lines[4] == ""
    assert ["val_loss", "2.0000", "1.0000", "-"] in [line.split() for line in lines]
    assert main(["runs", "diff", "b", "c", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["config"] == {"seed": {"b": 0, "c": 4}} and found["results"]["b"]["val_loss"] == 1.0
    assert main(["runs", "diff", "a"]) == 2
    assert "takes two runs or more" in capsys.readouterr().err


def test_the_limits_are_those_of_the_page(make_run: MakeRun) -> None:
    assert limits(make_run("steps")) == (20, None)
    page = make_run("tokens") / "config.yaml"
    text = page.read_text().replace("max_steps: 20", "max_steps: null")
    page.write_text(text.replace("max_tokens: null", "max_tokens: 65536") + "  max_steps: 3\n")
    assert limits(page.parent) == (None, 65536)


def test_lines_are_read_from_both_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        json.dumps({"kind": "train" if i % 3 else "val", "step": i, "pad": "é" * (i % 40)})
        for i in range(200)
    ]
    path.write_text("\n".join(lines[:100]) + "\nnull\n{\n" + "\n".join(lines[100:]) + '\n{"kind": "va')
    forward = list(records(path))
    assert [one["step"] for one in forward] == list(range(200))
    for block in (7, 64, 5000, 10**6):
        monkeypatch.setattr("ssmtrain.runs.lines.BLOCK", block)
        assert list(backwards(path)) == forward[::-1]
        assert {kind: one["step"] for kind, one in latest(path, "val", "train").items()} == {
            "val": 198,
            "train": 199,
        }
    monkeypatch.setattr("ssmtrain.runs.lines.FURTHEST", 500)
    assert 0 < len(list(backwards(path))) < 20
    assert latest(tmp_path / "absent", "val") == {} == latest(path, "health")


def test_a_follower_reads_each_line_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path)
    assert follower.read() == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"step"')
    assert [one["step"] for one in follower.read()] == [1, 2]
    with path.open("a") as file:
        file.write(': 3}\n{"step": 4, "first": 1}\n')
    assert [one["step"] for one in follower.read()] == [3, 4]
    # A resumed run keeps steps 1 and 2 in a new file and does the others again.
    again = tmp_path / "again"
    again.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "again": 1}\n')
    os.replace(again, path)
    assert [one["step"] for one in follower.read()] == [3]
    with path.open("a") as file:
        file.write('{"step": 4, "again": 1}\n')
    assert [one["step"] for one in follower.read()] == [4]
    assert [one["step"] for one in Follower(path).read(last=2)] == [3, 4]
    again.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "again": 1}\n{"step": 4, "again": 2}\n')
    os.replace(again, path)
    assert [one["again"] for one in follower.read()] == [2]


def test_figures_are_written_short() -> None:
    assert [size(n) for n in (0, 999, 1000, 23_100_000)] == ["0 B", "999 B", "1 kB", "23.1 MB"]
    assert table([("a", "bb"), ("ccc", "d")]) == ["a    bb", "ccc   d"]

"""`runs rm`: what goes, what never does, and that a half-deleted run can be deleted again."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from runs.conftest import MakeRun
from ssmtrain.checkpoint import lock
from ssmtrain.cli import main
from ssmtrain.config.errors import UserError
from ssmtrain.config.origin import Origin
from ssmtrain.runs import rm


def test_rm_deletes_what_it_listed(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    kept, gone = make_run("kept"), make_run("gone")
    outside = tmp_path / "precious"
    outside.mkdir()
    (outside / "file").write_text("x")
    (gone / "checkpoints" / "way").symlink_to(outside)
    (gone / "best").symlink_to(outside)
    (gone / "big").write_bytes(bytes(3_000_000))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    for answer in ("", "n", "yess"):
        monkeypatch.setattr("builtins.input", lambda question, answer=answer: answer)
        assert main(["runs", "rm", "gone"]) == 0 and gone.is_dir()
    told = capsys.readouterr().out
    assert f"{Path('runs/gone')}  stopped  3." in told and "nothing is deleted" in told
    monkeypatch.setattr("builtins.input", lambda question: "y" if "1 run, 3." in question else "n")
    assert main(["runs", "rm", "gone"]) == 0
    assert not gone.exists() and kept.is_dir() and (outside / "file").read_text() == "x"
    assert "deleted 1 run, 3." in capsys.readouterr().out


def test_without_a_terminal_it_wants_yes(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run("mine")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    assert main(["runs", "rm", "mine"]) == 2
    assert "add --yes" in capsys.readouterr().err and folder.is_dir()
    assert main(["runs", "rm", "mine", "--yes"]) == 0
    assert not folder.exists() and (folder.parent).is_dir()


def test_a_multirun_goes_with_its_arms(make_run: MakeRun, tmp_path: Path) -> None:
    arms = [make_run("multi/a"), make_run("multi/b")]
    assert main(["runs", "rm", "multi/a", "--yes"]) == 0 and arms[1].is_dir()
    make_run("multi/a")
    assert main(["runs", "rm", "multi", "--yes"]) == 0
    assert not (tmp_path / "runs" / "multi").exists() and (tmp_path / "runs").is_dir()
    arm = make_run("noted/a")
    (arm.parent / "notes.txt").write_text("mine")
    assert main(["runs", "rm", "noted", "--yes"]) == 0
    assert (arm.parent / "notes.txt").is_file() and not arm.exists()


def test_what_is_refused(make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    running, other = make_run("running"), make_run("other")
    held = lock.acquire(running / "lock")
    make_run("above")
    make_run("above/arm")
    (tmp_path / "runs" / "link").symlink_to(other)
    (tmp_path / "runs" / "way").symlink_to(tmp_path / "runs" / "above")
    (tmp_path / "runs" / "notes").mkdir()
    (tmp_path / "precious.txt").write_text("x")
    before = sorted(map(str, tmp_path.rglob("*")))
    for name, said in (
        ("running", f"runs/running is running: process {os.getpid()}"),
        ("link", "is a link to"),
        ("runs/link/", "is a link to"),
        ("way/arm", "runs/way is a link to"),
        ("notes", "runs/notes is not a run: it has no config.yaml"),
        ("precious.txt", "is a file, not a run"),
        ("above", "runs/above holds runs of their own: above/arm"),
        ("absent", "there is no such run"),
        ("x*", "no run is named so"),
        ("..", "not a run"),
    ):
        # One that cannot go keeps the others of the line too.
        assert main(["runs", "rm", "other", name, "--yes"]) == 2, name
        assert said in capsys.readouterr().err
        assert sorted(map(str, tmp_path.rglob("*"))) == before
    assert main(["runs", "rm", "--yes"]) == 2
    # A process that begins between the look and the deletion keeps its run.
    with pytest.raises(UserError, match="in use by process"):
        rm.delete(running)
    assert sorted(map(str, tmp_path.rglob("*"))) == before
    held.release()
    assert main(["runs", "rm", "above", "above/arm", "--yes"]) == 0
    assert not (tmp_path / "runs" / "above").exists()


def test_a_deletion_that_was_cut_short_goes_on(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run("mine")
    unlink = os.unlink

    def fail(path: object, *args: object, **more: object) -> None:
        if str(path).endswith("status.json"):
            raise OSError(5, "Input/output error", str(path))
        unlink(path, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(rm.os, "unlink", fail)
    assert main(["runs", "rm", "mine", "--yes"]) == 2
    assert (folder / "config.yaml").is_file() and not (folder / "metrics.jsonl").exists()
    monkeypatch.undo()
    os.chdir(folder.parents[1])
    assert main(["runs", "rm", "mine", "--yes"]) == 0 and not folder.exists()


def test_a_fork_that_has_saved_nothing_is_named(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    source, fork = make_run("source"), make_run("fork")
    origin = Origin(kind="fork", run=str(source), step=10, sha256="a" * 64)
    page = (fork / "config.yaml").read_text()
    lines = "origin:\n" + "".join(f"  {key}: {value}\n" for key, value in origin.model_dump().items())
    (fork / "config.yaml").write_text(page.replace("origin: null\n", lines))
    assert main(["runs", "rm", "source", "--yes"]) == 0
    assert "fork begins from" in capsys.readouterr().out
    fork.joinpath("checkpoints", "step-00000012").mkdir()
    make_run("source")
    assert main(["runs", "rm", "source", "--yes"]) == 0
    assert "fork begins from" not in capsys.readouterr().out

"""Checkpoints of two ranks, exports and averages: damaged, refused by the disk, or left half written."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest

from checkpoint.test_checkpoint_joint import save
from faults.harness import write_page
from faults.ranks import Pair, Ranks
from ssmtrain.checkpoint import faults, store
from ssmtrain.cli import main

TRIALS = 500
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The tiny hybrid, cut over two ranks, saved at steps 2 and 4; to read only."""
    folder = tmp_path_factory.mktemp("trained")
    write_page(folder, steps=4, every=2)
    story = Pair(folder, "cut", kind="fsdp")
    assert story.run().code == 0, story.starts[-1].output
    return story


def test_no_damage_to_a_checkpoint_of_two_ranks_is_loaded(trained: Pair, tmp_path: Path) -> None:
    """Bits flipped and files cut anywhere in it: each is seen, named by file, and the one before is taken."""
    folder = Path(shutil.copytree(trained.path / "checkpoints", tmp_path / "checkpoints"))
    older, newest = store.checkpoints(folder)
    names = sorted(os.listdir(newest))
    assert {f"{kind}_0000{rank}.safetensors" for kind in ("model", "optim", "rng") for rank in (0, 1)} < {
        *names
    }
    whole = {name: (newest / name).read_bytes() for name in names}
    draw, silent = random.Random(0), []
    for trial in range(TRIALS):
        name = draw.choice(names)
        data = bytearray(whole[name])
        at = draw.randrange(len(data))
        if trial % 2:
            del data[at:]
        else:
            data[at] ^= 1 << draw.randrange(8)
        (newest / name).write_bytes(data)
        problems = store.verify(newest)
        if not problems or (not any(name in problem for problem in problems) and name != store.MANIFEST):
            silent.append((trial, name, at))
        (newest / name).write_bytes(whole[name])
    assert silent == [] and store.verify(newest) == []
    for name in names:
        for spoil in (lambda path: path.unlink(), lambda path: path.write_bytes(b"")):
            spoil(newest / name)
            said: list[str] = []
            assert store.newest_good(folder, said.append) == older
            assert said and all(line.startswith(f"{newest.name} is damaged: {name}") for line in said)
            (newest / name).write_bytes(whole[name])


def written(folder: Path) -> dict[str, int]:
    """The files of a checkpoint of two ranks, and of their notes, with their sizes."""
    sizes: dict[str, int] = {}
    real = os.write

    def counted(descriptor: int, data: memoryview) -> int:
        done = real(descriptor, data)
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        sizes[name] = sizes.get(name, 0) + done
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", counted)
        assert save(folder, 2) == [None, None]
    return sizes


def test_a_disk_that_refuses_any_region_of_any_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first byte, the middle, the last byte and the fsync of every file that either rank writes."""
    sizes = written(tmp_path / "dry")
    assert len(sizes) == 7 and {"manifest.json", "state.json", "note_00001.draft"} < sizes.keys()
    folder = tmp_path / "checkpoints"
    assert save(folder, 2, step=3) == [None, None]
    write, fsync = os.write, os.fsync
    regions = [(name, at) for name, size in sizes.items() for at in (0, size // 2, size - 1, size)]
    for (name, at), code in itertools.product(regions, (errno.ENOSPC, errno.EDQUOT, errno.EIO)):
        left = [at]

        def is_it(descriptor: int, name: str = name) -> bool:
            return os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")) == name

        def failing(descriptor: int, data: memoryview, left: list[int] = left, code: int = code) -> int:
            if not is_it(descriptor):
                return write(descriptor, data)
            if len(data) > left[0]:
                if not left[0]:
                    raise OSError(code, os.strerror(code))
                data = data[: left[0]]
            done = write(descriptor, data)
            left[0] -= done
            return done

        def refusing(descriptor: int, at: int = at, name: str = name, code: int = code) -> None:
            if at == sizes[name] and is_it(descriptor):
                raise OSError(code, os.strerror(code))
            fsync(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", failing)
            patch.setattr(os, "fsync", refusing)
            ended = save(folder, 2, patience=0.2)
        where = f"{os.strerror(code)} at byte {at} of {name}"
        assert isinstance(ended[0], store.SaveFailed), where
        # A rank that cannot even say that it could not is not heard of.
        silent = name.startswith("note_")
        assert (os.strerror(code) in str(ended[0])) or (
            silent and "has not written its part" in str(ended[0])
        )
        assert [path.name for path in folder.iterdir()] == ["step-00000003"], where
        assert store.newest_good(folder, pytest.fail) == folder / "step-00000003", where
    assert save(folder, 2) == [None, None]


@pytest.mark.parametrize("point", faults.EXPORT_POINTS)
def test_an_export_that_was_killed_is_refused(
    point: str, trained: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "exported"
    line = ["convert", f"run={trained.path}", f"out={out}"]
    assert Ranks.begin(line, tmp_path / "log", 1, {0: f"{point}:1"}).wait() == [KILLED]
    page = f"config={trained.folder}/tiny.yaml"
    for words in (
        ["eval", f"run={out}"],
        ["fit", page, f"init={out}", f"runs_dir={tmp_path}/runs", "name=x"],
    ):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert str(out) in said and ("export again with: ssmtrain convert run=" in said or "is no" in said), (
            said
        )
    assert main(line) == 2
    assert "exists already" in (said := capsys.readouterr().err) and "or delete it first" in said
    shutil.rmtree(out)
    assert main(line) == 0 and main(["eval", f"run={out}"]) == 0


@pytest.mark.parametrize("point", ["mid_file", "before_rename", "after_rename"])
def test_an_average_that_was_killed_is_no_run(
    point: str, trained: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "averaged"
    line = ["average", f"run={trained.path}", "last=2", f"out={out}"]
    assert Ranks.begin(line, tmp_path / "log", 1, {0: f"{point}:1"}).wait() == [KILLED]
    assert not (out / "config.yaml").exists()
    assert main(["eval", f"run={out}"]) == 2
    assert str(out) in capsys.readouterr().err
    assert main(line) == 2
    assert "exists already" in (said := capsys.readouterr().err) and "or delete it first" in said
    shutil.rmtree(out)
    assert (
        main(line) == 0 and json.loads((out / "checkpoints/step-00000004/state.json").read_text())["average"]
    )

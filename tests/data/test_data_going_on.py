"""A preparation that is killed goes on from what is on disk, and ends with the bytes of one that was not."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest

from ssmtrain.config.data import TextData
from ssmtrain.config.errors import UserError
from ssmtrain.data import encode, making, units
from ssmtrain.data import prepare as prepare_module
from ssmtrain.data.prepare import Prepared, prepare
from ssmtrain.data.shards import SplitWriter

SRC = Path(prepare_module.__file__).parents[2]


@pytest.fixture
def config(page, write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Many units: small files, a long one, lines that are divided; some bad, some twice."""
    monkeypatch.setattr(units, "UNIT", 4000)
    monkeypatch.setattr(units, "LONG", 5000)
    monkeypatch.setattr("ssmtrain.data.spans.PIECE", 300)
    monkeypatch.setattr(prepare_module, "SHARD_TOKENS", 4000)
    for i in range(40):
        write(f"t/{i:02d}.txt", b"\xff" if i == 9 else f"document {i % 30} " * 40)
    write("t/long.txt", "a long one, of many words. " * 600)
    write("t/a.jsonl", "".join(json.dumps({"text": f"line {i % 90} " * 9}) + "\n" for i in range(120)))
    return page(train=str(tmp_path / "t"), skip_bad=True, drop_duplicates=True)


def files(prepared: Prepared) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in prepared.folder.iterdir() if p.name != "verified.json"}


class Stop(BaseException):
    """What a kill is to a test in this process: nothing catches it."""


def test_stopped_again_and_again(config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Stopped after every second unit, with more on disk than was noted, it goes on each time."""
    expected = files(prepare(config))
    assert len(expected) > 8
    take = making.Maker._take

    def noted(self, unit, encoded):
        take(self, unit, encoded)
        # The note waits for the disk; then more is written, which nobody noted.
        if self.units % 2 == 1:
            self.units += 1
            with ThreadPoolExecutor(1) as pool:
                self._note(pool, None).result()
            self.units -= 1
            for writer in self.writers.values():
                writer.write(np.full(50, 7, "<u2"))
                [os.close(handle) for handle in writer.handles()]
            raise Stop

    monkeypatch.setattr(making.Maker, "_take", noted)
    monkeypatch.setattr("shutil.rmtree", lambda *a, **k: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "again"))
    starts = 0
    while starts < 60:
        starts += 1
        try:
            made = prepare(config)
            break
        except Stop:
            continue
    assert starts >= 5 and made.made
    assert files(made) == expected
    assert made.manifest.splits["train"].duplicates and made.manifest.splits["train"].skipped == 1


@pytest.mark.parametrize(
    "harm", ["note", "counts", "digests", "shard", "bit of a shard", "count", "unit size"]
)
def test_what_was_left_may_be_damaged(
    config, own_cache: Path, monkeypatch, tmp_path: Path, harm: str
) -> None:
    expected = files(prepare(config))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "again"))
    monkeypatch.setattr(making, "EVERY", -1.0)
    closed = SplitWriter.close

    def die(self):
        raise Stop

    monkeypatch.setattr(SplitWriter, "close", die)
    with monkeypatch.context() as keeping:
        keeping.setattr("shutil.rmtree", lambda *a, **k: None)
        with pytest.raises(Stop):
            prepare(config)
    monkeypatch.setattr(SplitWriter, "close", closed)
    work = next((tmp_path / "again/ssmtrain").glob("*.part"))
    if harm == "note":
        (work / "progress.json").write_text("{")
    elif harm == "count":
        page = json.loads((work / "progress.json").read_text())
        page["units"] -= 1
        (work / "progress.json").write_text(json.dumps(page))
    elif harm == "bit of a shard":
        path = max(work.glob("train-0*.bin"))
        data = bytearray(path.read_bytes())
        data[0] ^= 1
        path.write_bytes(data)
    elif harm == "unit size":
        note = json.loads((work / "progress.json").read_text())
        (work / "progress.json").write_text(json.dumps(note | {"unit_bytes": 99, "units": 10**6}))
    else:
        name = {"counts": "counts-*.bin", "digests": "digests.bin", "shard": "train-documents.bin"}[harm]
        path = next(work.glob(name))
        path.write_bytes(path.read_bytes()[:20])
    assert files(prepare(config)) == expected


def test_a_changed_shard_is_found(config, own_cache: Path, monkeypatch, tmp_path: Path) -> None:
    """What an earlier start wrote is read again at the end."""
    monkeypatch.setattr(making, "EVERY", -1.0)
    with monkeypatch.context() as keeping:
        keeping.setattr("shutil.rmtree", lambda *a, **k: None)
        keeping.setattr(SplitWriter, "close", lambda self: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            prepare(config)
    path = next(own_cache.glob("*.part")) / "train-00000.bin"
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"damaged: .*train-00000\.bin"):
        prepare(config)


KILLED = """
import os, sys
from types import SimpleNamespace as Page
from ssmtrain.config.data import BytesTokenizer, FileTokenizer, TextData
from ssmtrain.data import encode, making, prepare as room, units
if __name__ == "__main__":
    train, val, bpe = sys.argv[1:4]
    units.UNIT, encode.ALONE, making.EVERY = 2000, 1, -1.0
    take, done = making.Maker._take, []
    def slow(self, unit, encoded):
        take(self, unit, encoded)
        done.append(unit)
        if len(done) == 12 and len(sys.argv) > 4:
            os.kill(os.getpid(), 9)
    making.Maker._take = slow
    config = Page(data=TextData(train=train, val=val), tokenizer=FileTokenizer(path=bpe))
    prepared = room.prepare(config, workers=2)
    print(len(done), prepared.folder)
"""


def test_sigkill_with_processes(write, bpe: Path, tmp_path: Path, own_cache: Path) -> None:
    """Its processes end with it; what it had done is not done again; the bytes are those of another."""
    script = write("killed.py", KILLED)
    for i in range(60):
        write(f"t/{i:02d}.txt", f"document {i} of many words, " * 40)
    val = str(write("v.txt", "to validate"))

    def start(home: str, *more: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"PYTHONPATH": str(SRC), "XDG_CACHE_HOME": str(tmp_path / home)}
        argv = [sys.executable, str(script), str(tmp_path / "t"), val, str(bpe), *more]
        return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=100)

    assert start("killed", "kill").returncode == -signal.SIGKILL
    went_on, whole = start("killed"), start("whole")
    again, folder = went_on.stdout.split()
    every, other = whole.stdout.split()
    assert 0 < int(again) < int(every)
    for path in Path(other).iterdir():
        assert path.name == "verified.json" or path.read_bytes() == (Path(folder) / path.name).read_bytes()


def test_a_lost_worker(config, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    class Pool:
        def __init__(self, *args) -> None: ...

        def submit(self, *args):
            raise BrokenProcessPool

        def shutdown(self, **kwargs) -> None: ...

    monkeypatch.setattr(encode, "ProcessPoolExecutor", Pool)
    with pytest.raises(UserError, match="was killed") as error:
        prepare(config, workers=2)
    assert "run again: it goes on from there" in error.value.lines[1]
    assert list(own_cache.glob("*.part"))


def test_a_folder_of_another_tokenizer_is_refused(config, page, bpe: Path) -> None:
    """Tokens of two tokenizers are never mixed, whatever was copied where."""
    made = prepare(config)
    data = config.data.model_dump() | {"kind": "text"}
    other = prepare(page(tokenizer=bpe, **{k: v for k, v in data.items() if k in TextData.model_fields}))
    assert other.folder != made.folder
    manifest = json.loads((other.folder / "manifest.json").read_text())
    for path in made.folder.iterdir():
        path.unlink()
    for path in other.folder.iterdir():
        (made.folder / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="is of another tokenizer than its name says"):
        prepare(config)
    manifest |= {"tokenizer": made.manifest.tokenizer, "source": "x"}
    (made.folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is of another source than its name says"):
        prepare(config)

"""The table of bad checkpoints: each is given to the command line and ends with exit 2, its cause and a way on.

Every folder here is the copy of a run that was really trained, with one thing wrong. What a stranger would
do has true hashes: only the reader of the file itself stands between it and the program.
"""

# One case a line, however long.
# ruff: noqa: E501

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from ssmtrain.checkpoint import store
from ssmtrain.checkpoint.runs import resolve
from ssmtrain.cli import main
from ssmtrain.train.fit import fit
from train.conftest import page

SECONDS = 4.0

MODEL, OPTIM, RNG, STATE, MANIFEST = (
    "model.safetensors",
    "optim.safetensors",
    "rng.safetensors",
    "state.json",
    "manifest.json",
)


@dataclass
class Case:
    """One wrong checkpoint: its number in the catalogue, what makes it, the verb, what the message must say."""

    number: str
    spoil: Callable[[Path], Any]
    """Given the newest checkpoint of a run; may return what the line names in its place."""
    says: tuple[str, ...]
    verb: str = "generate"
    words: tuple[str, ...] = ()


def case(number: str, spoil: Callable[[Path], Any], *says: str, words: tuple[str, ...] = ()) -> Case:
    """Read with generate."""
    return Case(number, spoil, says, "generate", words)


def resumed(number: str, spoil: Callable[[Path], Any], *says: str, words: tuple[str, ...] = ()) -> Case:
    """Continued with fit."""
    return Case(number, spoil, says, "fit", words)


# How a checkpoint is spoiled.


def write(name: str, content: bytes | str) -> Callable[[Path], None]:
    """Other bytes in a file, which the manifest does not know of."""

    def spoil(at: Path) -> None:
        (at / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def forge(name: str, content: bytes | Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Other bytes in a file, and their size and hash in the manifest."""

    def spoil(at: Path) -> None:
        data = content(at.joinpath(name).read_bytes()) if callable(content) else content
        (at / name).write_bytes(data)
        entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        edit(lambda manifest: manifest["files"].update({name: entry}))(at)

    return spoil


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A manifest that says something else."""

    def spoil(at: Path) -> None:
        manifest = json.loads((at / MANIFEST).read_text())
        change(manifest)
        (at / MANIFEST).write_text(json.dumps(manifest) + "\n")

    return spoil


def state(**changes: Any) -> Callable[[Path], None]:
    """Another state.json, truly hashed; `run__step` is the step in its run."""

    def change(text: bytes) -> bytes:
        data = json.loads(text)
        for key, value in changes.items():
            *above, last = key.split("__")
            (data[above[0]] if above else data)[last] = value
        return (json.dumps(data) + "\n").encode()

    return forge(STATE, change)


def tensors(name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Other tensors in a shard, truly hashed."""

    def spoil(at: Path) -> None:
        found = dict(load_file(at / name))
        change(found)
        forge(name, save(found))(at)

    return spoil


def one(key: str, value: Any) -> Callable[[dict[str, torch.Tensor]], None]:
    """One element of one tensor set."""

    def change(found: dict[str, torch.Tensor]) -> None:
        found[key].view(-1)[1] = value

    return change


def put(**named: Any) -> Callable[[dict[str, torch.Tensor]], None]:
    """Tensors replaced: each value is made of the old one; names have __ for dots."""

    def change(found: dict[str, torch.Tensor]) -> None:
        for key, make in named.items():
            name = key.replace("__", ".")
            found[name] = make(found.get(name))

    return change


def header(entries: str, data: bytes = b"\0" * 64, length: int | None = None) -> Callable[[Path], None]:
    """A shard of the model whose header is this text."""
    text = entries.encode()
    return forge(MODEL, (len(text) if length is None else length).to_bytes(8, "little") + text + data)


class Payload:
    """What unpickles to a call that leaves a file behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("owned",)


def pickled(at: Path) -> Path:
    path = at.parents[3] / "model.pt"
    path.write_bytes(pickle.dumps(Payload()))
    return path


def zip_bomb(at: Path) -> Path:
    path = at.parents[3] / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", pickle.dumps(Payload()))
        file.writestr("archive/data/0", b"\0" * 2**24)
    return path


def renamed(name: str) -> Callable[[Path], Path]:
    return lambda at: at.rename(at.with_name(name))


def run_of(at: Path) -> Path:
    return at.parents[1]


def emptied(at: Path) -> None:
    shutil.rmtree(at)
    at.mkdir()


def only_temporary(at: Path) -> Path:
    for path in store.checkpoints(at.parent):
        path.rename(path.with_name(f"{path.name}.tmp-{'0' * 32}"))
    return run_of(at)


def loop(at: Path) -> Path:
    path = at.with_name("step-00000009")
    path.symlink_to(path)
    return path


def linked_shard(at: Path) -> None:
    shutil.move(at / MODEL, at.parents[3] / "elsewhere")
    (at / MODEL).symlink_to(at.parents[3] / "elsewhere")


def config(change: Callable[[str], str], back: Callable[[Path], Path] = run_of) -> Callable[[Path], Path]:
    def spoil(at: Path) -> Path:
        file = run_of(at) / "config.yaml"
        file.write_text(change(file.read_text()))
        return back(at)

    return spoil


def taken(at: Path) -> Path:
    """Another run deletes the checkpoint between the look at it and the reading."""
    (at / MODEL).unlink()
    return at


F32 = '"dtype":"F32","shape":[16],"data_offsets":[0,64]'
A_LOG = "blocks.0.mixer.A_log"
WEIGHT = "blocks.1.ffn.in_proj.weight"

CASES = [
    case("98 empty folder", lambda at: emptied(at.parent) or run_of(at), "no good checkpoint yet", "ssmtrain fit config="),
    case("98 empty checkpoint", emptied, "step-00000004 is damaged", "manifest.json is missing", "the newest good one: run="),
    case("98 a folder that is no run", lambda at: at.parents[2], "there is no such run", "tiny"),
    case("99 only temporary folders", only_temporary, "no good checkpoint yet", "ssmtrain fit config="),
    case("100 no manifest", lambda at: (at / MANIFEST).unlink(), "manifest.json is missing"),
    case("100 not JSON", write(MANIFEST, "{,}\n"), "manifest.json cannot be used: it is not JSON"),
    case("100 cut JSON", write(MANIFEST, '{"format": 1'), "manifest.json cannot be used: its end is missing"),
    case("100 deep JSON", write(MANIFEST, "[" * 10**5 + "\n"), "manifest.json cannot be used: it is not JSON"),
    case("100 future format", edit(lambda m: m.update(format=9)), "format 9 is not one this version reads (1)", "pip install -U"),
    case("100 path above", edit(lambda m: m["files"].update({"../x.json": m["files"][STATE]})), "'../x.json' is not a file name"),
    case("100 absolute path", edit(lambda m: m["files"].update({"/etc/passwd": m["files"][STATE]})), "'/etc/passwd' is not a file name"),
    case("100 link", linked_shard, "model.safetensors cannot be used"),
    case("101 shard missing", lambda at: (at / MODEL).unlink(), "model.safetensors is missing"),
    case("103 cut", lambda at: os.truncate(at / MODEL, 1000), "model.safetensors has 1,000 bytes, the manifest says"),
    case("103 empty", write(MODEL, b""), "model.safetensors has 0 bytes"),
    case("104 one bit", lambda at: flip(at / MODEL), "model.safetensors has sha256", "the manifest says"),
    case("105 another hash", edit(lambda m: m["files"][MODEL].update(sha256="0" * 64)), "the manifest says 000000000000"),
    case("106 header of 2^63", header("{}", length=2**63), "model.safetensors cannot be used", "header too large"),
    case("107 header of 101 MB", header("{}", length=101 * 10**6), "header too large"),
    case("108 overlap", header(f'{{"a":{{{F32}}},"b":{{"dtype":"F32","shape":[8],"data_offsets":[32,64]}}}}'), "invalid offset for tensor"),
    case("108 hole", header('{"a":{"dtype":"F32","shape":[8],"data_offsets":[0,32]},"b":{"dtype":"F32","shape":[4],"data_offsets":[48,64]}}'), "invalid offset for tensor"),
    case("109 dtype", header('{"a":{"dtype":"F99","shape":[16],"data_offsets":[0,64]}}'), "unknown variant `F99`"),
    case("109 dtype of no checkpoint", header('{"a":{"dtype":"F8_E4M3","shape":[64],"data_offsets":[0,64]}}'), "'a' is torch.float8_e4m3fn, which no checkpoint holds"),
    case("110 product of shape", header('{"a":{"dtype":"F32","shape":[1099511627776,1099511627776],"data_offsets":[0,64]}}'), "overflow"),
    case("110 empty and huge", header('{"a":{"dtype":"F32","shape":[0,9223372036854775808],"data_offsets":[0,0]}}', b""), "model.safetensors cannot be used"),
    case("111 name twice", header(f'{{"a":{{{F32}}},"a":{{{F32}}}}}'), "'a' stands twice in its header"),
    case("112 NaN", tensors(MODEL, one(WEIGHT, float("nan"))), f"{WEIGHT}: 1 of ", "not finite, the first at [0, 1]", "trainer.load_nonfinite=true"),
    resumed("112 NaN continued", tensors(MODEL, one(WEIGHT, float("inf"))), f"{WEIGHT}: 1 of ", "resume=", "trainer.load_nonfinite=true"),
    resumed("112 NaN in the optimizer", tensors(OPTIM, one(f"{WEIGHT}/exp_avg", float("nan"))), f"{WEIGHT}/exp_avg: 1 of "),
    case("113 A_log of +inf", tensors(MODEL, one(A_LOG, float("inf"))), f"{A_LOG}: 1 of 4 values", "the first at [1]"),
    case("113 A_log in bf16", tensors(MODEL, put(**{A_LOG.replace(".", "__"): lambda t: t.bfloat16()})), f"{A_LOG} is (4,) torch.bfloat16, the model has (4,) torch.float32", "cast after it was saved"),
    case("114 pickle", pickled, ".pt files are pickles, which run code when opened"),
    resumed("114 pickle continued", pickled, "not a checkpoint folder: .pt files are pickles", "runs/<name>/checkpoints/step-"),
    case("115 pickle named safetensors", forge(MODEL, pickle.dumps(Payload())), "model.safetensors cannot be used: it is not a safetensors file"),
    case("115 single file", lambda at: at / MODEL, "model.yaml, the config of these weights, is not beside them", "ssmtrain convert run="),
    case("116 zip bomb", zip_bomb, ".pt files are pickles"),
    case("117 other architecture", tensors(MODEL, lambda t: [t.pop(WEIGHT), t.update({f"layers.{i}.w": torch.zeros(1) for i in range(12)})]), "1 tensors are missing, 12 are not in the model", f"{WEIGHT} is missing", "layers.6.w is not in the model", "… and 3 more", "tiny/config.yaml"),
    case("117 names with a terminal's codes", tensors(MODEL, lambda t: t.update({"\x1b[2Jw\n": torch.zeros(1)})), "\\x1b[2Jw\\n is not in the model"),
    case("118 other pattern", lambda at: at, "trained with another model", "model.layout: 'MA' in the run, 'AM' now", words=("model.layout=AM",)),
    resumed("118 other pattern continued", lambda at: at, "another config", "model.layout", words=("model.layout=AM",)),
    resumed("119 no optimizer state", tensors(OPTIM, dict.clear), "it holds no optimizer state", "take another checkpoint"),
    resumed("119 part of it", tensors(OPTIM, lambda t: t.pop(f"{WEIGHT}/exp_avg_sq")), f"{WEIGHT}/exp_avg_sq: not in the file"),
    resumed("119 other optimizer", tensors(OPTIM, lambda t: t.update({f"{WEIGHT}/momentum_buffer": t.pop(f"{WEIGHT}/exp_avg")})), "AdamW keeps no momentum_buffer"),
    resumed("119 other shape", tensors(OPTIM, lambda t: t.update({f"{WEIGHT}/exp_avg": torch.zeros(3)})), f"{WEIGHT}/exp_avg: (3,)"),
    case("120 step of the folder", renamed("step-00000005"), "it is of step 4, but the folder is step-00000005"),
    resumed("120 step of the state", state(run__step=7), "state.json is of step 7"),
    resumed("120 no counters", state(run=None), "state.json is of step 0"),
    resumed("120 counters of text", state(run__rows="16"), "state.json: its run.rows is '16', expected int"),
    resumed("120 negative tokens", state(tokens=-1), "state.json: its tokens are '-1'"),
    case("122 short number", renamed("step-100"), "not a checkpoint's name (step- and eight digits)"),
    case("122 suffix", renamed("step-00000004-bak"), "not a checkpoint's name"),
    resumed("122 zero less", renamed("step-0100"), "not a checkpoint's name"),
    resumed("122 negative", renamed("step--1"), "not a checkpoint's name"),
    case("123 link loop", loop, "there is no such run"),
    resumed("123 link loop continued", loop, "resume: ", "is a link that leads back to itself", "rm "),
    case("124 config with a target", config(lambda text: f"{text}_target_: os.mkdir\n"), "_target_", "never names code"),
    case("124 config with a tag", config(lambda text: f"{text}x: !!python/object/apply:os.mkdir [owned]\n"), "config.yaml", "the tag", "refused"),
    case("124 beside the checkpoint", config(lambda text: text.replace("optim:\n", "optim:\n  _target_: os.mkdir\n"), lambda at: at), "optim._target_", "never names code"),
    case("125 deleted while read", taken, "model.safetensors is missing"),
    case("126 part of the weights", tensors(MODEL, lambda t: [t.pop(n) for n in list(t) if n.startswith("blocks.1.")]), "tensors are missing", "blocks.1.", "tiny/config.yaml"),
    case("126 no weights at all", lambda at: [edit(lambda m: m["files"].pop(MODEL))(at), (at / MODEL).unlink()], "the manifest lists no model.safetensors"),
    resumed("random states of another size", tensors(RNG, lambda t: t.update({"rank0/torch": torch.zeros(3, dtype=torch.uint8)})), "the random states of rank 0"),
    resumed("random states of another kind", tensors(RNG, lambda t: t.pop("rank0/numpy_rest")), "the random states of rank 0"),
    resumed("97 tokenizer swapped", state(tokenizer="0" * 64), "tokenizer: its content has changed since the run started", "put the former file back"),
    resumed("88 text added", state(text={"sha256": "0", "tokens": 1, "rows": 1}), "the text or the tokenizer has changed"),
]  # fmt: skip


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `runs` of a run of four steps."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("SSMTRAIN_RUN", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
            patch.delenv(variable, raising=False)
        settings = page(folder, trainer__max_steps=4, trainer__save_every=2)
        run = resolve(settings)
        try:
            assert fit(settings, run) == 0
        finally:
            run.close()
    return folder / "runs"


@pytest.fixture
def newest(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The newest checkpoint of a copy of that run."""
    monkeypatch.chdir(tmp_path)
    for variable in ("SSMTRAIN_RUN", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "2000")  # or every line would first look whether the CPU is busy
    shutil.copytree(trained, tmp_path / "runs")
    config = tmp_path / "runs" / "tiny" / "config.yaml"
    config.write_text(config.read_text().replace(f"runs_dir: {trained}", f"runs_dir: {tmp_path / 'runs'}"))
    return tmp_path / "runs" / "tiny" / "checkpoints" / "step-00000004"


def line(verb: str, at: Path, *words: str) -> list[str]:
    """The command line that reads a checkpoint, or goes on from it."""
    if verb == "generate":
        return ["generate", f"run={at}", "--prompt", "it", "generate.max_tokens=1", *words]
    config = next(path for path in at.absolute().parents[0].rglob("config.yaml")) if at.suffix else None
    page = config or at.parents[1] / "config.yaml"
    return ["fit", f"config={page}", f"resume={at}", "trainer.max_steps=6", *words]


@pytest.mark.parametrize("one", CASES, ids=lambda one: one.number)
def test_a_bad_checkpoint_is_told(one: Case, newest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = one.spoil(newest)
    words = line(one.verb, found if isinstance(found, Path) else newest, *one.words)
    before = time.process_time()
    code = main(words)
    spent = time.process_time() - before
    told = capsys.readouterr().err
    assert code == 2, told
    assert told.startswith("error: ") and "Traceback" not in told
    for part in one.says:
        assert part in told, told
    assert all(len(text) < 500 for text in told.splitlines())
    assert not os.path.exists("owned") and "\x1b" not in told
    assert spent < SECONDS


def test_the_good_checkpoint_is_good(newest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line("generate", newest)) == 0
    assert main(line("fit", newest)) == 0
    assert (newest.parent / "step-00000006").is_dir()


def test_102_what_the_manifest_does_not_list_is_named_and_ignored(
    newest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (newest / "model.pt").write_bytes(pickle.dumps(Payload()))
    assert main(line("generate", run_of(newest))) == 0
    assert "model.pt is not in its manifest and is ignored" in capsys.readouterr().err
    assert not os.path.exists("owned")


def test_112_what_is_not_finite_is_loaded_when_asked_for(
    newest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors(MODEL, one(WEIGHT, float("nan")))(newest)
    assert main(line("generate", newest, "trainer.load_nonfinite=true")) == 3
    assert "the model's logits are not finite" in capsys.readouterr().err
    # The steps that follow are skipped: that they are tried at all is what the key asks for.
    assert main(line("fit", newest, "trainer.load_nonfinite=true")) == 0
    assert "skipped: the loss is not finite" in capsys.readouterr().out


def test_121_states_of_eight_ranks_serve_one(newest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The number of ranks is not part of a checkpoint's meaning: rank 0 takes its own, new ones draw theirs."""

    def eight(found: dict[str, torch.Tensor]) -> None:
        for name in list(found):
            found.update({name.replace("rank0/", f"rank{rank}/"): found[name].clone() for rank in range(8)})

    tensors(RNG, eight)(newest)
    state(world=8)(newest)
    assert main(line("fit", newest)) == 0
    assert (newest.parent / "step-00000006").is_dir()


def test_125_a_run_that_is_being_written_can_be_read(
    newest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(newest, newest.with_name(f"step-00000005.tmp-{'1' * 32}"))
    with store.writing(newest.with_name(f"step-00000005.tmp-{'1' * 32}")):
        assert main(line("generate", run_of(newest), "--json")) == 0
    assert json.loads(capsys.readouterr().out)["checkpoint"] == "step-00000004"


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints", "report.md", "tensorboard", ".wandb_id"])
def test_a_run_folder_with_links_is_neither_written_nor_pruned(
    name: str, newest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder from a stranger cannot make a run append to, replace or delete what lies elsewhere."""
    mine, victim = run_of(newest) / name, newest.parents[3] / "victim"
    if mine.exists():
        mine.rename(victim)
    elif name == "tensorboard":
        victim.mkdir()
    mine.symlink_to(victim)
    before = sorted(path.name for path in victim.iterdir()) if victim.is_dir() else None
    assert main(["fit", f"config={run_of(newest)}/config.yaml", "trainer.max_steps=6"]) == 2
    assert f"{name} is a link" in capsys.readouterr().err
    assert before is None or sorted(path.name for path in victim.iterdir()) == before


def test_deleting_does_not_follow_a_link(newest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even one that takes the checkpoint's place at the last moment."""
    victim = newest.parents[3] / "victim"
    shutil.copytree(newest, victim)
    replace = os.replace

    def swapped(source: Any, target: Any) -> None:
        shutil.rmtree(source)
        os.symlink(victim, source)
        replace(source, target)

    monkeypatch.setattr(os, "replace", swapped)
    assert store._delete(newest)
    assert not newest.exists() and len(list(victim.iterdir())) == 5
    assert [path.name for path in newest.parent.iterdir()] == ["step-00000002"]


def test_what_a_run_writes_is_the_owners(newest: Path) -> None:
    assert main(["fit", f"config={run_of(newest)}/config.yaml", "trainer.max_steps=6"]) == 0
    open_to_all = [
        path for path in run_of(newest).rglob("*") if path.is_file() and path.stat().st_mode & 0o077
    ]
    assert not [
        path
        for path in open_to_all
        if "step-00000004" not in path.parts and "step-00000002" not in path.parts
    ]

"""The table of bad command lines and surroundings: exit 2, the cause, what to type, and nothing made on disk.

A reader that leaves, closed streams, other locales and a deleted folder are in test_cli_process.py.
"""

# One case a line, however long.
# ruff: noqa: E501

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from ssmtrain.checkpoint import store
from ssmtrain.checkpoint.runs import resolve
from ssmtrain.cli import main
from ssmtrain.config.load import load

SRC = str(Path(__file__).parents[2] / "src")
TESTS = str(Path(__file__).parents[1])
SECONDS = 4.0

PAGE = """\
name: tiny
model:
  d_model: 16
  layout: MA
  blocks:
    M: {mixer: {kind: mamba2, d_state: 8, head_dim: 8}}
    A: {mixer: {kind: attention, n_heads: 2}}
trainer: {max_steps: 4, global_batch: 128, val_every: 0, threads: 1}
data: {kind: text, train: text.txt, seq_len: 32, cache_dir: cache}
"""

LAUNCH = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_PORT",
    "NODE_RANK",
    "SLURM_PROCID",
    "SSMTRAIN_RUN",
    "TORCHELASTIC_USE_AGENT_STORE",
)


@dataclass
class Case:
    """One wrong line: its number in the catalogue, words, environment, what the message must say."""

    number: str
    words: list[str]
    says: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)


def case(number: str, words: str, *says: str, **env: str) -> Case:
    return Case(number, words.split(), says, env)


FIT = "fit config=page.yaml"
BY_HAND = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}

CASES = [
    case("127 no command", "", "a verb is missing", "ssmtrain fit config=quickstart", "continue a prompt with a trained run"),
    case("128 unknown command", "fti config=page.yaml", "'fti' is not a verb; did you mean `ssmtrain fit`?"),
    case("128 unknown flag", f"{FIT} --mutlirun", "fit has no such flag; did you mean --multirun?"),
    case("128 setting as a flag", f"{FIT} --optim.lr=1", "settings have no dashes; type optim.lr=1"),
    case("128 short flag", f"{FIT} -x", "'-x' is not key=value", "not a flag"),
    case("129 no config", "fit optim.lr=1", "config= is missing"),
    case("129 two configs", f"{FIT} config=quickstart", "config= is given twice"),
    case("129 config of nowhere", "fit config=nowhere.yaml", "config=nowhere.yaml: no such file"),
    case("130 no equals sign", f"{FIT} optim.lr", "'optim.lr' is not key=value; did you mean optim.lr=…?"),
    case("131 unknown key", f"{FIT} optim.lrr=1", "optim.lrr = 1", "did you mean `lr`?"),
    case("132 open quote", f"{FIT} name='tiny", "name='tiny", "a ' is not closed"),
    case("132 open brace", f"{FIT} optim={{lr:1", "optim={lr:1", "{ and } do not match"),
    case("133 what * became", f"{FIT} data.train=a.txt b.txt", "'b.txt' is not key=value"),
    case("133 * that found nothing", f"{FIT} *.txt", "'*.txt' is not key=value", "put quotes around values with *"),
    case("134 resume from nowhere", f"{FIT} resume=runs/tiny/checkpoints/step-00000009", "resume: runs/tiny/checkpoints/step-00000009 is not a checkpoint folder: no such folder", "expected auto, never, or a folder"),
    case("134 flag", f"{FIT} --resume auto", "--resume: fit has no such flag"),
    case("136 no GPU", f"{FIT} trainer.accelerator=gpu", "gpu asked for and none found", "set trainer.accelerator=cpu"),
    case("138 rank beyond", FIT, "RANK=5 with WORLD_SIZE=2: expected a rank from 0 to 1", "torchrun", RANK="5", WORLD_SIZE="2"),
    case("138 rank alone", FIT, "RANK=1 without WORLD_SIZE", "unset RANK", RANK="1"),
    case("138 world alone", FIT, "WORLD_SIZE=2 without RANK", "unset RANK", WORLD_SIZE="2"),
    case("138 no number", FIT, "WORLD_SIZE='two' in the environment: expected a whole number", RANK="0", WORLD_SIZE="two"),
    case("138 negative", FIT, "RANK='-1' in the environment: expected a whole number", RANK="-1", WORLD_SIZE="2"),
    case("138 local rank beyond", FIT, "LOCAL_RANK=2 with LOCAL_WORLD_SIZE=2", RANK="2", WORLD_SIZE="4", LOCAL_RANK="2", LOCAL_WORLD_SIZE="2"),
    case("138 other devices", f"{FIT} trainer.devices=4", "trainer.devices = 4: 2 processes were started on this node", "leave it out, or start as many", LOCAL_WORLD_SIZE="2", **BY_HAND),
    case("139 no port", f"{FIT} trainer.devices=2", "MASTER_PORT=70000: expected a port", MASTER_PORT="70000", **BY_HAND),
    case("143 a cache that cannot be", f"{FIT} data.cache_dir=/proc/cache", "data.cache_dir: cannot write /proc/cache", "set data.cache_dir="),
    case("143 runs that cannot be", f"{FIT} runs_dir=/proc/runs", "cannot write in /proc/runs/tiny", "set runs_dir="),
    case("secret that is misspelt", f"{FIT} logger.password='hunter2", "logger.password=[redacted]", "is not closed"),
    case("escape codes", f"{FIT} \x1b[31m=1", "is not a key", "\\x1b[31m"),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A page and a text, and none of the launchers' variables."""
    monkeypatch.chdir(tmp_path)
    for variable in LAUNCH:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "2000")  # or every line would first look whether the CPU is busy
    (tmp_path / "page.yaml").write_text(PAGE)
    (tmp_path / "text.txt").write_text("it is a truth universally acknowledged\n" * 200)
    return tmp_path


@pytest.mark.parametrize("one", CASES, ids=lambda one: one.number)
def test_a_bad_line_is_told(
    one: Case, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name, value in one.env.items():
        monkeypatch.setenv(name, value)
    before = time.process_time()
    assert main(one.words) == 2
    spent = time.process_time() - before
    told = capsys.readouterr().err
    assert told.startswith("error: ") and "Traceback" not in told and "hunter2" not in told
    for part in one.says:
        assert part in told, told
    assert "\x1b" not in told and all(len(line) < 500 for line in told.splitlines())
    left = {"page.yaml", "text.txt"} | (
        {"runs"} if one.number.startswith(("134 resume", "143 a cache")) else set()
    )
    assert set(os.listdir(folder)) <= left
    assert spent < SECONDS


def test_136_more_devices_than_there_are(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert main([*FIT.split(), "trainer.devices=3", "trainer.global_batch=96"]) == 2
    told = capsys.readouterr().err
    assert "trainer.devices: 3 asked for, this machine has 2 GPUs" in told and "set trainer.devices=2" in told
    assert set(os.listdir(folder)) == {"page.yaml", "text.txt"}


def test_135_a_run_keeps_its_config(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = resolve(load(["config=page.yaml"]))
    store.save(run.checkpoints, 2, {"model": {"w": torch.ones(3)}}, {"tokens": 256})
    run.close()
    assert main([*FIT.split(), "optim.lr=0.5", "seed=3", "trainer.log_every=5"]) == 2
    told = capsys.readouterr().err
    assert "optim.lr: 0.001 in the run, 0.5 now" in told and "seed: 0 in the run, 3 now" in told
    assert "log_every" not in told.replace("(not global_batch", "")
    assert "may change: trainer" in told and "name=…" in told and "config=runs/tiny/config.yaml" in told


def test_134_nothing_to_resume_is_said(folder: Path) -> None:
    resolve(load(["config=page.yaml"])).close()
    run = resolve(load(["config=page.yaml", "resume=auto"]))
    run.close()
    assert run.notices == ["run tiny has no checkpoint yet: starting from the beginning"]


def test_139_a_port_that_is_taken(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in {**BY_HAND, "MASTER_PORT": str(port)}.items():
            monkeypatch.setenv(name, value)
        assert main([*FIT.split(), "trainer.devices=2", "trainer.accelerator=cpu"]) == 2
        told = capsys.readouterr().err
        assert f"MASTER_PORT={port}: rank 0 cannot listen there: Address already in use" in told
        assert "set another MASTER_PORT" in told
        # Under torchrun its agent listens there, for the ranks.
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        from ssmtrain.parallel.agreement import check_launch

        check_launch()


# Those about processes.


def started(*words: str, cwd: Path, **env: str) -> subprocess.Popen[str]:
    clean = {name: value for name, value in os.environ.items() if name not in LAUNCH}
    return subprocess.Popen(
        [sys.executable, "-m", "ssmtrain", *words],
        cwd=cwd,
        env={**clean, "PYTHONPATH": SRC, "OMP_NUM_THREADS": "1", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_137_hidden_gpus(folder: Path) -> None:
    process = started(*FIT.split(), "trainer.accelerator=gpu", cwd=folder, CUDA_VISIBLE_DEVICES="")
    _, told = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "none found (CUDA_VISIBLE_DEVICES hides them all)" in told and "Traceback" not in told
    assert "unset CUDA_VISIBLE_DEVICES, or set trainer.accelerator=cpu" in told


def test_143_a_home_that_cannot_be_written(folder: Path) -> None:
    (folder / "spare").mkdir()
    page = PAGE.replace(", cache_dir: cache", "")
    (folder / "page.yaml").write_text(page)
    env = {"HOME": "/proc", "XDG_CACHE_HOME": "", "TMPDIR": str(folder / "spare")}
    process = started("prepare", "config=page.yaml", cwd=folder, **env)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 0, told
    assert "prepared data goes to" in told and list((folder / "spare").rglob("manifest.json"))


WITHOUT_ASSERTIONS = """
import os, sys, tempfile
from pathlib import Path
assert False, "assertions are off"
from config.test_config_bad_input import CASES
from ssmtrain.config.errors import UserError
from ssmtrain.config.load import load
os.chdir(tempfile.mkdtemp(dir=sys.argv[1]))
missed = []
pages = [one for one in CASES if not one.words]
for one in pages:
    Path("page.yaml").write_bytes(one.page if isinstance(one.page, bytes) else one.page.encode())
    try:
        load(["config=page.yaml"])
        missed.append(one.number)
    except UserError as error:
        if not all(part in "\\n".join(error.lines) for part in one.says):
            missed.append(one.number)
print(len(pages), "cases, missed:", missed)
sys.exit(bool(missed))
"""


def test_144_without_assertions(folder: Path) -> None:
    """`python -O` takes assert statements away: no page is refused by one of ours; Hydra needs its own."""
    env = {**os.environ, "PYTHONPATH": f"{SRC}:{TESTS}", "AWS_SECRET_ACCESS_KEY": "canary-of-aws-0"}
    line = [sys.executable, "-O", "-c", WITHOUT_ASSERTIONS, str(folder)]
    done = subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "missed: []" in done.stdout and not done.stdout.startswith("0 ")
    process = started(*FIT.split(), cwd=folder, PYTHONOPTIMIZE="1")
    _, told = process.communicate(timeout=60)
    assert process.returncode == 2 and "run without -O, and unset PYTHONOPTIMIZE" in told
    assert started("help", cwd=folder, PYTHONOPTIMIZE="1").wait(timeout=60) == 0


@pytest.fixture
def ranks(folder: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Two ranks as torchrun starts them, each with a line of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "by-hand",
    }
    words = [*FIT.split(), "trainer.devices=2", "trainer.accelerator=cpu"]
    found = [
        started(*words, own, cwd=folder, **common, RANK=rank, LOCAL_RANK=rank)
        for rank, own in (("0", "optim.lr=0.001"), ("1", "optim.lr=0.002"))
    ]
    yield found
    for process in found:
        process.kill()
        process.wait()


def test_145_ranks_with_different_configs(ranks: list[subprocess.Popen[str]], folder: Path) -> None:
    for process in ranks:
        _, told = process.communicate(timeout=120)
        assert process.returncode == 2, told
        assert "the ranks were started with different configs" in told
        assert "optim.lr: 0.001 on rank 0, 0.002 on rank 1" in told
        assert "give every rank the same line" in told and "Traceback" not in told
    assert not list(folder.glob("runs/*/checkpoints/step-*"))

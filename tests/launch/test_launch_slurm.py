"""Jobs of a real Slurm on this machine: submitted, told to save, requeued, finished with the same bits."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.cluster import Cluster, Missing, start
from ssmtrain.cli import main

SRC = Path(__file__).parents[2] / "src"

STUB = """\
# Stands in for ssmtrain in a job: what a rank does by the word in STUB, and on which turn.
import os, signal, sys, time
turn, rank = int(os.environ.get("SLURM_RESTART_COUNT", "0")), os.environ["SLURM_PROCID"]
got = []
signal.signal(signal.SIGUSR1, lambda number, frame: got.append(number))
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("turn", turn, "rank", rank, *sys.argv[1:], flush=True)
if os.environ["STUB"] == "too early" and turn == 0:
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGUSR1)
if os.environ["STUB"] == "never finished":
    sys.exit(75)
if os.environ["STUB"] == "one fails" and rank == "1":
    sys.exit(3)
if turn == 0:
    for _ in range(1200):
        time.sleep(0.05)
        if got:
            print("rank", rank, "saves", flush=True)
            sys.exit(75)
"""

TOO_EARLY = """\
# Ends the third arm's first turn with SIGUSR1 before submitit's process has a handler for it.
import os, signal, sys
name = os.environ.get("SLURM_ARRAY_TASK_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
if name == ("2", "0") and "submitit.core._submit" in sys.orig_argv:
    os.kill(os.getpid(), signal.SIGUSR1)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A running Slurm, the same for all tests of this file."""
    try:
        running = start()
    except Missing as reason:
        pytest.skip(str(reason))
    yield running
    running.stop()


@pytest.fixture
def here(cluster: Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with the tiny recipe, where the commands of the cluster are found."""
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, cluster.environment[name])
    monkeypatch.setenv("PYTHONPATH", str(SRC))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (folder / "stub.py").write_text(STUB)
    return folder


Launch = Callable[..., dict[str, Any]]


@pytest.fixture
def launch(here: Path, capfd: pytest.CaptureFixture[str]) -> Launch:
    """`launch slurm config=page.yaml … --json` in this process."""

    def run(*words: str) -> dict[str, Any]:
        assert main(["launch", "slurm", "config=page.yaml", *words, "--json"]) == 0, capfd.readouterr().err
        return dict(json.loads(capfd.readouterr().out))

    return run


def has(state: str, restarts: int) -> Callable[[dict[str, str]], bool]:
    return lambda job: job["JobState"] == state and job["Restarts"] == str(restarts)


def appears(text: str, log: str | Path) -> None:
    """Wait until a job has said something."""
    limit, path = time.monotonic() + 60, Path(log)
    while text not in (path.read_text() if path.exists() else ""):
        assert time.monotonic() < limit, f"{path}: no {text!r}"
        time.sleep(0.1)


def whole_lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def bits(run: Path) -> dict[str, str]:
    """Hashes of what the last checkpoint holds; state.json has the seconds in it."""
    manifest = json.loads((run / "checkpoints" / "step-00000120" / "manifest.json").read_text())
    return {name: one["sha256"] for name, one in manifest["files"].items() if name.endswith(".safetensors")}


def test_a_preempted_job_goes_on_to_the_same_bits(
    cluster: Cluster, here: Path, launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSMTRAIN_LEDGER", "1")
    words = ["trainer.max_steps=120", "trainer.log_every=50"]
    told = launch("name=job", "launch.time=30", *words)
    number, run = told["job"], here / "runs" / "job"
    limit = time.monotonic() + 120
    while len(whole_lines(run / "ledger.jsonl")) < 3:
        assert time.monotonic() < limit, cluster.job(number)
        time.sleep(0.05)
    cluster.call("scancel", "--signal=USR1", number)
    cluster.wait(number, lambda job: job["Restarts"] == "1")
    log = Path(told["log"]).read_text()
    assert "SIGUSR1: finishing this step" in log and "back to the queue" in log
    assert json.loads((run / "status.json").read_text())["status"] == "unfinished"
    # Both at once: the unbroken run starts its two ranks itself.
    line = [sys.executable, "-m", "ssmtrain", "fit", "config=page.yaml", "name=whole", "trainer.devices=2"]
    whole = subprocess.run([*line, "trainer.accelerator=cpu", *words], capture_output=True, text=True)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    cluster.wait(number, has("COMPLETED", 1))
    assert "continuing run job from step" in Path(told["log"]).read_text()
    assert json.loads((run / "status.json").read_text()) | {"time": 0} == json.loads(
        (here / "runs" / "whole" / "status.json").read_text()
    ) | {"time": 0}
    # To the bit: every step's loss and rows, the weights, the moments and the generators.
    assert whole_lines(run / "ledger.jsonl") == whole_lines(here / "runs" / "whole" / "ledger.jsonl")
    assert len(whole_lines(run / "ledger.jsonl")) == 120
    assert bits(run) == bits(here / "runs" / "whole") and len(bits(run)) == 6  # three files of each rank


def test_which_ends_ask_for_another_turn(
    cluster: Cluster, here: Path, launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = f"launch.program={sys.executable} {here}/stub.py"

    def submit(behaviour: str, name: str, *words: str) -> dict[str, Any]:
        monkeypatch.setenv("STUB", behaviour)
        return launch(program, f"name={name}", *words)

    # Slurm tells a job up to a minute early: this one at once, as its limit is a minute.
    late = submit("waits", "late", "launch.time=1", "launch.grace=50")
    second = submit("waits", "late", "launch.time=15")
    cancelled = submit("waits", "cancelled", "launch.time=15", "launch.setup=[touch set-up]")
    fails = submit("one fails", "fails", "launch.time=15")
    early = submit("too early", "early", "launch.time=15")
    endless = submit("never finished", "endless", "launch.requeues=1")
    appears("rank 1 fit config=", cancelled["log"])
    assert (here / "set-up").exists()
    cluster.call("scancel", cancelled["job"])
    # One job at a time works in a run's folder, also between the turns of the first.
    cluster.wait(late["job"], has("PENDING", 1))
    assert cluster.job(second["job"])["Reason"] == "Dependency"
    cluster.call("scancel", second["job"])
    cluster.wait(fails["job"], has("FAILED", 0), 60)
    assert cluster.wait(endless["job"], has("FAILED", 1))["ExitCode"] == "75:0"
    cluster.wait(early["job"], has("COMPLETED", 1))
    cluster.wait(late["job"], has("COMPLETED", 1))
    said = Path(late["log"]).read_text()
    for rank in "01":
        assert f"turn 0 rank {rank} fit config={here}/runs/late/launch/config.yaml" in said
        assert f"rank {rank} saves" in said and f"turn 1 rank {rank} fit" in said
    cluster.wait(cancelled["job"], has("CANCELLED", 0))


def test_an_array_through_submitit(
    cluster: Cluster, here: Path, launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB", "waits")
    monkeypatch.setenv("PYTHONPATH", f"{SRC}:{here}")
    (here / "sitecustomize.py").write_text(TOO_EARLY)
    told = launch(
        f"launch.program={sys.executable} {here}/stub.py",
        "name=arms",
        "optim.lr=1e-3,2e-3,3e-3",
        "launch.time=15",
        "launch.processes_per_node=1",
        "--multirun",
    )
    arms = ["lr-0.001", "lr-0.002", "lr-0.003"]
    assert told["arms"] == [f"arms/{arm}" for arm in arms]
    number, place = told["job"], here / "runs" / "arms" / "launch"
    logs = [place / f"{number}_{index}_0_log.out" for index in range(3)]
    for log in logs[:2]:
        appears("rank 0 fit config=", log)
    for index in "01":
        cluster.call("scancel", "--signal=USR1", f"{number}_{index}")
    for index, arm in enumerate(arms):
        cluster.wait(f"{number}_{index}", has("COMPLETED", 1))
        said = logs[index].read_text()
        assert f"turn 1 rank 0 fit config={here}/runs/arms/{arm}/launch/config.yaml" in said
        assert ("turn 0 rank 0 fit" in said and "rank 0 saves" in said) == (arm != "lr-0.003")
        assert (here / "runs" / "arms" / arm / "launch" / "config.yaml").is_file()


def test_what_sbatch_refuses(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for arms in ([], ["optim.lr=1e-3,2e-3", "launch.time=15", "--multirun"]):
        line = ["launch", "slurm", "config=page.yaml", "launch.partition=nowhere", *arms]
        assert main(line) == 2
        said = capfd.readouterr().err
        assert "sbatch refused the job" in said and "Invalid partition" in said
        assert "`sinfo -s` lists the partitions; set launch.partition=…" in said

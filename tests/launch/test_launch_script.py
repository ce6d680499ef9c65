"""launch slurm: the script's text, what is refused before anything is made, a dry run that makes nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ssmtrain.cli import main
from ssmtrain.config.load import load
from ssmtrain.config.manual import page as help_page
from ssmtrain.launch.array import turn
from ssmtrain.launch.slurm import refusal

GPUS = ["launch.nodes=4", "launch.gpus_per_node=8", "launch.processes_per_node=null"]
LARGE = [*GPUS, "trainer.global_batch=8192"]


def script(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The script of a dry run, which bash reads without complaint and which leaves the folder as it was."""
    before = sorted(Path().rglob("*"))
    assert main(["launch", "slurm", "config=page.yaml", *words, "--dry-run"]) == 0
    assert sorted(Path().rglob("*")) == before
    text = capsys.readouterr().out
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    return text


def options(text: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    return dict(line.partition("=")[::2] for line in lines)


def test_gpus_of_several_nodes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = script(
        capsys,
        *LARGE,
        "name=mine",
        "launch.gpu_type=h100",
        "launch.cpus_per_task=12",
        "launch.memory=0",
        "launch.time=1-12:00:00",
        "launch.partition=gpu",
        "launch.account=us",
        "launch.qos=high",
        "launch.constraint='a100|h100'",
        "launch.exclude='n[1-3],n9'",
        "launch.grace=600",
        "launch.requeues=7",
        'launch.setup=["module load cuda/12","export NCCL_DEBUG=WARN"]',
        'launch.extra=["--reservation=night shift","--exclusive","--open-mode=truncate"]',
    )
    assert options(text) == {
        "job-name": "mine",
        "chdir": str(folder),
        "nodes": "4",
        "ntasks-per-node": "8",
        "gpus-per-node": "h100:8",
        "cpus-per-task": "12",
        "mem": "0",
        "time": "1-12:00:00",
        "partition": "gpu",
        "account": "us",
        "qos": "high",
        "constraint": "a100|h100",
        "exclude": "n[1-3],n9",
        "open-mode": "truncate",
        "signal": "USR1@600",
        "requeue": "",
        "output": f"{folder}/runs/mine/launch/%j.log",
        "dependency": "singleton",
        "reservation": '"night shift"',
        "exclusive": "",
    }
    body = text[text.index("set -e") :]
    lines = ["set -e", "module load cuda/12", "export NCCL_DEBUG=WARN", "set +e", ""]
    assert body.splitlines()[:5] == lines
    page = folder / "runs" / "mine" / "launch" / "config.yaml"
    assert f"--cpus-per-task=12 \\\n  {sys.executable} -m ssmtrain fit config={page}\ncode=$?" in body
    assert '"${SLURM_RESTART_COUNT:-0}" -lt 7' in body and 'scontrol requeue "$SLURM_JOB_ID"' in body


def test_what_is_not_asked_is_left_to_the_cluster(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = script(capsys, "launch.requeues=0")
    assert {"gpus-per-node", "mem", "time", "partition", "cpus-per-task"}.isdisjoint(options(text))
    script(capsys, "launch.time=0", "launch.grace=9000")  # no limit at all
    assert options(text)["ntasks-per-node"] == "2" and "no-requeue" in options(text)
    assert "set -e" not in text


def test_containers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["name=mine", "launch.container.image=a b.sif", 'launch.container.mounts=["/data:/data"]']
    pyxis = script(capsys, *LARGE, "launch.container.kind=pyxis", *words)
    assert "'--container-image=a b.sif'" in pyxis and f"--container-workdir={folder}" in pyxis
    assert f"--container-mounts={folder}:{folder},/data:/data" in pyxis
    assert "\n  ssmtrain fit config=" in pyxis
    apptainer = script(capsys, *LARGE, "launch.container.kind=apptainer", *words, "runs_dir=/elsewhere")
    mounts = f"{folder}:{folder},/elsewhere:/elsewhere,/data:/data"
    assert f"apptainer exec --nv --pwd {folder} --bind {mounts} 'a b.sif' ssmtrain fit config=" in apptainer
    assert "--nv" not in script(capsys, "launch.container.kind=apptainer", *words)


def test_folders_with_odd_names(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = folder / 'my "runs" 100%'
    odd.mkdir()
    (odd / "page.yaml").write_text((folder / "page.yaml").read_text())
    monkeypatch.chdir(odd)
    text = script(capsys, "name=mine")
    assert options(text)["chdir"] == f'"{folder}/my \\"runs\\" 100%"'
    assert options(text)["output"] == f'"{folder}/my \\"runs\\" 100%%/runs/mine/launch/%j.log"'
    assert f"config='{odd}/runs/mine/launch/config.yaml'" in text


def test_an_array(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["name=arms", "optim.lr=1e-3,2e-3,3e-3", "launch.time=9:00:00", "launch.arms=2", "--multirun"]
    text = script(capsys, *LARGE, *words, 'launch.setup=["module load cuda"]')
    found = options(text)
    assert found["array"] == "0-2%2" and found["signal"] == "USR1@300" and "requeue" in found
    assert found["time"] == "9:00:00" and found["gpus-per-node"] == "8" and found["nodes"] == "4"
    assert "dependency" not in found and "wckey" not in found and "module load cuda\n" in text
    assert "--kill-on-bad-exit=1" in text and "-m submitit.core._submit" in text
    assert f"# 2: {sys.executable} -m ssmtrain fit config={folder}/runs/arms/lr-0.003/launch" in text


REFUSED = [
    (["launch.nodes=3"], "trainer.global_batch: its 4 rows do not divide by 6 devices"),
    (["launch.nodes=2", "trainer.micro_batch=2"], "4 devices x trainer.micro_batch=2"),
    (["trainer.devices=4"], "trainer.devices = 4: the job has 2 processes on each node"),
    (["trainer.accelerator=gpu"], "launch.gpus_per_node is 0; set launch.gpus_per_node=1"),
    (["launch.gpus_per_node=2", "trainer.accelerator=cpu"], "is 2; set launch.gpus_per_node=0"),
    (["launch.gpus_per_node=4"], "launch.processes_per_node = 2: a process has one GPU"),
    (["launch.gpu_type=h100"], "launch.gpu_type = h100: no effect"),
    (["parallel=fsdp", "parallel.replicas=3"], "parallel.replicas = 3: 2 devices"),
    (["trainer.cuda_graphs=true"], "trainer.cuda_graphs: it takes one GPU"),
    (["resume=runs/other/checkpoints/step-00000010"], "set resume=auto, or launch.requeues=0"),
    (["launch.time=soon"], "launch.time = 'soon': expected text such as 12:00:00 or null"),
    (["launch.time=5"], "launch.time = 5: 300 seconds, and launch.grace = 300 of them are for saving"),
    *(
        ([f"launch.time={time}", "launch.grace=60000"], f"launch.time = {time}: {seconds} seconds")
        for time, seconds in {"5:30": 330, "2:00:10": 7210, "0-16": 57600, "0-16:30": 59400, "1": 60}.items()
    ),
    (["launch.memory=64GB"], "expected text such as 64G"),
    (["launch.partition='a b'"], "launch.partition = 'a b'"),
    (["launch.partition='$(reboot)'"], "launch.partition = '$(reboot)'"),
    (["launch.partition=-x"], "launch.partition = '-x'"),
    (['launch.extra=["-p gpu"]'], "expected text such as --reservation=night"),
    (["launch.partitions=a"], "did you mean `partition`?"),
    (["trainer.num_nodes=2"], "did you mean `launch.nodes`?"),
    (["launch.container.kind=docker"], "expected one of apptainer, pyxis"),
    (["optim.lr=1,2", "--multirun"], "launch.time: an array needs a time limit"),
    (["launch.qos=a,b", "launch.time=50", "--multirun"], "the jobs of an array are alike"),
]


@pytest.mark.parametrize(("words", "said"), REFUSED)
def test_what_is_refused(
    words: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(Path().rglob("*"))
    assert main(["launch", "slurm", "config=page.yaml", *words]) == 2
    told = capsys.readouterr()
    assert said in told.err and told.out == "" and sorted(Path().rglob("*")) == before


def test_another_config_of_a_run_is_refused_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ssmtrain.config.load import to_yaml

    run = folder / "runs" / "mine"
    (run / "checkpoints" / "step-00000004").mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(load(["config=page.yaml", "name=mine", "optim.lr=0.5"])))
    assert main(["launch", "slurm", "config=page.yaml", "name=mine"]) == 2
    told = capsys.readouterr().err
    assert "run mine was started with another config" in told and "optim.lr: 0.5 -> 0.001" in told
    # What may change between starts may change here too.
    words = ["optim.lr=0.5", "launch.partition=other", "trainer.max_steps=9"]
    assert main(["launch", "slurm", "config=page.yaml", "name=mine", *words, "--dry-run"]) == 0


def test_without_slurm(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(folder))
    for words in ([], ["optim.lr=1,2", "launch.time=50", "--multirun"]):
        assert main(["launch", "slurm", "config=page.yaml", *words]) == 2
        told = capsys.readouterr().err
        assert "ubmit from a login node of the cluster" in told and "--dry-run" in told


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ("sbatch: error: Batch job submission failed: Invalid account or account/partition", "sinfo -s"),
        ("sbatch: error: Invalid account\nsbatch: error: more", "launch.account=…"),
        ("sbatch: error: Invalid qos specification", "launch.qos=…"),
        ("sbatch: error: Requested time limit is invalid", "launch.time=…"),
        ("sbatch: error: Invalid feature specification", "launch.constraint=…"),
        ("sbatch: error: Requested node configuration is not available", "launch.nodes"),
        ("sbatch: error: Unable to contact slurm controller (connect failure)", "scontrol ping"),
        ("sbatch: fatal: Unable to process configuration file", "login node"),
        ("", "--dry-run"),
    ],
)
def test_why_sbatch_refuses(said: str, hint: str) -> None:
    first, second = refusal(said)
    assert first.startswith("sbatch refused the job: ") and "sbatch: error" not in first
    assert hint in second


def test_help() -> None:
    assert "launch.nodes (slurm): a whole number above 0; default 1" in help_page("launch.nodes")[0]
    assert any("--dry-run" in line for line in help_page("launch slurm"))
    assert load(["config=quickstart", "launch=slurm"]).launch.kind == "slurm"


@pytest.mark.parametrize("many", [[], ["optim.lr=1,2", "launch.time=9", "launch.grace=60", "--multirun"]])
@pytest.mark.parametrize(("code", "ends", "requeued"), [
    (0, 0, False), (3, 3, False), (75, 75, True), (138, 75, True), (137, 137, False),
])  # fmt: skip
def test_what_the_code_of_srun_means(
    code: int,
    ends: int,
    requeued: bool,
    many: list[str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = script(capsys, "launch.requeues=2", *many)
    (folder / "bin").mkdir()
    for name, line in {"srun": f"exit {code}", "scontrol": f'echo "$@" >> {folder}/said'}.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")
    for name, value in {"JOB_ID": "77", "ARRAY_JOB_ID": "70", "ARRAY_TASK_ID": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    said = folder / "said"
    assert subprocess.run(["bash"], input=text, text=True).returncode == ends
    assert (said.read_text() if said.exists() else "") == (
        f"requeue {'70_1' if many else '77'}\n" if requeued else ""
    )
    said.unlink(missing_ok=True)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")  # as often as it may
    assert subprocess.run(["bash"], input=text, text=True).returncode == ends and not said.exists()


@pytest.mark.parametrize(("behaviour", "code"), [
    ("exit 0", 0), ("exit 3", 3), ("exit 75", 75), ("kill -USR1 $$", 138), ("kill -KILL $$", 137),
])  # fmt: skip
def test_a_turn_of_an_arm(behaviour: str, code: int) -> None:
    assert ended(f"sh -c '{behaviour}'") == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_turn_hands_on_signals(number: signal.Signals, folder: Path) -> None:
    (folder / "child.py").write_text(
        f"import pathlib, signal, sys, time\nsignal.signal({int(number)}, lambda *_: sys.exit(75))\n"
        "pathlib.Path('ready').touch()\ntime.sleep(30)\n"
    )

    def stop() -> None:
        while not (folder / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=stop)
    thread.start()
    assert ended(f"{sys.executable} child.py") == 75
    thread.join()


def ended(line: str) -> int:
    """A turn's exit code; the handlers as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        turn(line)
    except SystemExit as end:
        return int(str(end.code))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0

"""Several processes: the same losses as one, signals and resume across world sizes, a rank that is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults.ranks import Ranks
from ssmtrain.checkpoint import faults
from ssmtrain.checkpoint.records import write_config
from ssmtrain.checkpoint.runs import resolve
from ssmtrain.cli import main
from ssmtrain.config import launched
from ssmtrain.config.errors import UserError
from ssmtrain.train.fit import fit, place
from ssmtrain.train.forks import load_from
from train.conftest import ledger, losses, norms, page, weights

SRC = Path(__file__).parents[2] / "src"
Train = Callable[..., tuple[int, Path]]

SCRIPT = """
import sys
from ssmtrain.checkpoint import faults
from ssmtrain.checkpoint.records import read_config
from ssmtrain.config.request import Request
from ssmtrain.config.errors import Stop
from ssmtrain.train.fit import command
from pathlib import Path
import os
if len(sys.argv) > 2 and os.environ.get("LOCAL_RANK", "0") == sys.argv[2]:
    faults.arm(sys.argv[3])
try:
    sys.exit(command(Request("fit", read_config(Path(sys.argv[1])))))
except Stop as stop:
    print(*stop.lines, sep="\\n")
    sys.exit(stop.code)
"""


SLOW_END = """
import os, time
from ssmtrain.train import report
if os.environ["SLURM_PROCID"] == "0":
    shown = report.how_to_continue
    report.how_to_continue = lambda run: time.sleep(4) or shown(run)
"""


def two_ranks(folder: Path, *fault: str, **changes: Any) -> tuple[int, Path, str]:
    """Run fit on two gloo ranks; `fault` is a rank and what happens to it. Code, run folder, output."""
    config = page(folder, trainer__devices=2, trainer__threads=1, **changes)
    write_config(folder, config)
    script = folder / "script.py"
    script.write_text(SCRIPT)
    env = {**os.environ, "SSMTRAIN_LEDGER": "1", "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    env.pop("SSMTRAIN_RUN", None)
    done = subprocess.run(
        [sys.executable, str(script), str(folder), *fault],
        env=env,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert config.name is not None
    return done.returncode, Path(config.runs_dir) / config.name, done.stdout + done.stderr


def two_forked(folder: Path, *fault: str, **changes: Any) -> tuple[int, Path, str]:
    """As two_ranks, in a quarter of the time, its ranks started as torchrun starts them: the lowest code."""
    config = page(folder, trainer__devices=2, trainer__threads=1, **changes)
    write_config(folder, config)
    plans = {int(fault[0]): fault[1]} if fault else {}
    ranks = Ranks.begin(["fit", f"config={folder}/config.yaml"], folder / "log", 2, plans)
    code = min(ranks.wait())
    return code, Path(config.runs_dir) / str(config.name), ranks.output


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_one_two_and_one_ranks_train_as_one(
    kind: str,
    train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One process for two steps, two for some, one to the end: the tokens and losses of an unbroken run."""
    _, whole = train(name="whole", ema__decay=0.5)
    faults.arm("after_optimizer:1:TERM")
    assert train(name="parts", ema__decay=0.5)[0] == 75
    faults.arm()
    # One rank only is told to stop: both finish the step, save once, and end with 75.
    changes = {"name": "parts", "ema__decay": 0.5}
    code, folder, said = two_forked(tmp_path, "1", "after_optimizer:3:TERM", parallel__kind=kind, **changes)
    assert code == 75, said
    assert said.count("saved at step") == 1
    assert 4 <= len(ledger(folder)) < 8
    assert train(**changes)[0] == 0
    assert [e["samples"] for e in ledger(folder)] == [e["samples"] for e in ledger(whole)]
    assert losses(folder) == pytest.approx(losses(whole), rel=2e-6)
    assert norms(folder) == pytest.approx(norms(whole), rel=1e-5)
    for stem in ("model", "ema"):
        one, two = weights(whole, 8, stem), weights(folder, 8, stem)
        for name, tensor in one.items():
            assert tensor.allclose(two[name], rtol=1e-3, atol=1e-4), (stem, name)
    replayed_alone(folder, capsys)


def replayed_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Step 4 was taken by two ranks: one process takes it again, with their figures but for rounding."""
    capsys.readouterr()
    assert main(["replay", f"run={folder}", "step=4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["verdict"]
    assert found["differ"] == [] and found["steps"][-1] == 4 and not found["exact"]


def test_ranks_fork_what_rank_0_chose(parent: Path, tmp_path: Path) -> None:
    """The newest checkpoint, which only rank 0 looks for, on two ranks that hold parts of the model."""
    words = ["trainer.max_steps=10", "schedule=decay", f"runs_dir={tmp_path}/runs", "trainer.threads=1"]
    single = load_from({"from": str(parent)}, [*words, "name=single"])
    run = resolve(single)
    assert fit(single, run) == 0
    run.close()
    line = ["fit", f"from={parent}", *words, "name=double", "trainer.devices=2", "parallel=fsdp"]
    env = {**os.environ, "SSMTRAIN_LEDGER": "1", "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    for inherited in ("SSMTRAIN_RUN", "SSMTRAIN_ORIGIN"):
        env.pop(inherited, None)
    done = subprocess.run(
        [sys.executable, "-m", "ssmtrain", *line], env=env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    double = tmp_path / "runs" / "double"
    assert [e["samples"] for e in ledger(double)] == [e["samples"] for e in ledger(run.folder)]
    assert losses(double) == pytest.approx(losses(run.folder), rel=2e-6)
    assert [e["step"] for e in ledger(double)] == [9, 10]


def test_replicas_divide_the_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = page(tmp_path, trainer__devices=2, parallel={"kind": "fsdp", "replicas": 4})
    with pytest.raises(UserError, match=r"parallel\.replicas = 4: 2 devices"):
        place(config)
    # Under a launcher all its ranks count.
    for name, value in {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert place(config) == ("cpu", 2)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "start with torchrun --nproc-per-node"),
        ({"RANK": "0", "WORLD_SIZE": "5", "LOCAL_WORLD_SIZE": "2"}, "every node must have as many"),
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, "trainer.devices = 2: 4 processes"),
        ({"RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "2"}, "4 rows do not divide by 8 devices"),
    ],
)
def test_what_cannot_be_joined(
    told: dict[str, str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        place(page(tmp_path, trainer__devices=2))


def test_a_batch_script_starts_its_ranks_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    from ssmtrain.parallel.processes import environment

    for name, value in {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    assert not environment().creates_processes_externally
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert environment().creates_processes_externally and environment().global_rank() == 1


def test_two_nodes_train_as_one_process(train: Train, tmp_path: Path) -> None:
    """Two tasks of srun, on what they take for two nodes, until one gets a signal: both save and say so."""
    _, whole = train(name="whole")
    config = page(tmp_path, name="nodes", trainer__threads=1)
    write_config(tmp_path, config)
    (tmp_path / "script.py").write_text(SLOW_END + SCRIPT)
    env = {key: value for key, value in os.environ.items() if key not in (*launched.NAMES, "SSMTRAIN_RUN")}
    env |= {"SSMTRAIN_LEDGER": "1", "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    env |= {"SLURM_STEP_NODELIST": "localhost,other", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    env |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0", "SLURM_JOB_ID": str(os.getpid())}
    tasks = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "script.py"), str(tmp_path), *fault],
            env={**env, "SLURM_PROCID": rank, "SLURM_NODEID": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, fault in (("0", []), ("1", ["0", "after_optimizer:5:TERM"]))
    ]
    tasks[1].wait(200)
    second = time.monotonic()
    said = [task.communicate(timeout=200)[0] for task in tasks]
    # srun ends the other ranks once one has gone with a code: rank 1 must not go before rank 0 has done all.
    assert time.monotonic() - second < 3
    assert [task.returncode for task in tasks] == [75, 75], said
    assert said[0].count("saved at step") == 1 and said[1] == "", said
    folder = Path(config.runs_dir) / "nodes"
    done = len(ledger(folder))
    assert 5 <= done < 8
    assert [e["samples"] for e in ledger(folder)] == [e["samples"] for e in ledger(whole)][:done]
    assert losses(folder) == pytest.approx(losses(whole)[:done], rel=2e-6)
    assert '"world": 2' in (folder / "checkpoints" / f"step-{done:08}" / "state.json").read_text()


def test_a_lost_rank_ends_the_others(tmp_path: Path) -> None:
    begin = time.monotonic()
    code, _, said = two_ranks(tmp_path, "1", "after_forward:2", name="lost")
    assert code == 4, said
    assert "lost" in said and "ssmtrain fit config=" in said
    assert time.monotonic() - begin < 100

"""Which rank a process is: torchrun's variables, srun's, those of a process that rank 0 started, or none."""

from __future__ import annotations

import os

import pytest

from ssmtrain.config import launched

TASK = {
    "SLURM_JOB_ID": "4711",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_STEP_NODELIST": "gpu[007-009,3]-ib,cpu1",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_NODEID": "1",
}


@pytest.fixture(autouse=True)
def nobody_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*launched.NAMES, *TASK, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def seen() -> tuple[int, int, int]:
    return launched.rank(), launched.world(), launched.local_world()


def test_nobody() -> None:
    assert seen() == (0, 0, 0)


def test_a_task_of_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, TASK)
    assert seen() == (11, 16, 8)
    launched.adopt()
    assert seen() == (11, 16, 8)
    assert {name: os.environ.pop(name) for name in (*launched.OWN, "MASTER_ADDR") if name in os.environ} == {
        "RANK": "11",
        "LOCAL_RANK": "3",
        "WORLD_SIZE": "16",
        "LOCAL_WORLD_SIZE": "8",
        "GROUP_RANK": "1",
        "GROUP_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu007-ib",
    }
    assert 10000 <= int(os.environ.pop("MASTER_PORT")) < 30000


def test_the_port_is_the_steps_own() -> None:
    ports = {
        launched.from_srun({**TASK, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})["MASTER_PORT"]
        for job in range(4711, 4731)
        for step in range(3)
    }
    assert len(ports) == 60


def test_one_node_needs_no_name() -> None:
    one = {**TASK, "SLURM_STEP_TASKS_PER_NODE": "16", "SLURM_NODEID": "0"}
    assert launched.from_srun(one)["MASTER_ADDR"] == "127.0.0.1"


def test_who_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    # The batch script itself, a step of one task, and the ranks that one started or torchrun did in it.
    batch = {name: value for name, value in TASK.items() if "STEP" not in name}
    assert launched.from_srun(batch) == {}
    assert launched.from_srun({**TASK, "SLURM_STEP_NUM_TASKS": "1"}) == {}
    set_all(monkeypatch, {**TASK, "LOCAL_RANK": "1", "WORLD_SIZE": "2"})
    assert seen() == (1, 2, 0)
    assert launched.from_srun(os.environ) == {}
    set_all(monkeypatch, {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"})
    assert seen() == (5, 8, 4)


@pytest.mark.parametrize(
    ("names", "first"),
    [("vm", "vm"), ("a,b", "a"), ("n[3-5]", "n3"), ("n[07,9],a", "n07"), ("r[0-1]n[3-4],x", "r0n3")],
)
def test_the_first_node(names: str, first: str) -> None:
    assert launched._first_host(names) == first


def test_uneven_nodes() -> None:
    assert launched._per_node("8(x3),4") == [8, 8, 8, 4]

"""Ranks started as torchrun starts them, by the real command line, and ended as its agent ends them.

A start costs seconds of imports, and a fault test needs many starts, so ranks are forked from a process that
has imported torch, Lightning and the program, and has done nothing else.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import connection, forkserver
from pathlib import Path

import ssmtrain
from faults.harness import Killed, Story
from ssmtrain.check.starts import INHERITED
from ssmtrain.checkpoint import faults, store

SERVER = multiprocessing.get_context("forkserver")
WARM = (
    "hydra._internal.config_loader_impl",
    "hydra.core.override_parser.overrides_parser",
    "lightning.pytorch",
    "matplotlib.figure",
    "omegaconf.grammar_parser",
    "torch.distributed.fsdp",
    "ssmtrain.checkpoint.average",
    "ssmtrain.checkpoint.convert",
    "ssmtrain.config.load",
    "ssmtrain.parallel.processes",
    *(["deepspeed"] if find_spec("deepspeed") else []),
    "ssmtrain.train.fit",
    *(f"ssmtrain.train.callbacks.{name}" for name in ("ending", "health", "ledger", "saving", "sinks")),
)
"""What the first process imports."""

AGENT = 0.8
"""Seconds that the other ranks get to end by themselves once one is gone; torchrun's agent gives none."""
LIMIT = 150.0
"""Seconds of a start, after which its ranks are ended."""


@dataclass
class Ranks:
    """A start of one process or more, whose output is in `log`."""

    processes: list[multiprocessing.process.BaseProcess]
    log: Path

    @classmethod
    def begin(
        cls,
        words: list[str],
        log: Path,
        world: int = 2,
        plans: Mapping[int, str] | None = None,
        before: Mapping[int, Callable[[], None]] | None = None,
        **environment: str,
    ) -> Ranks:
        """Start `ssmtrain <words>` on so many ranks; `plans` are faults, `before` hooks, by rank."""
        _serve()
        log.write_text("")
        told = {key: value for key, value in os.environ.items() if key not in INHERITED}
        told |= {"SSMTRAIN_LEDGER": "1", "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "2000", **environment}
        if world > 1:
            told |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "GROUP_RANK": "0"}
            told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
        processes: list[multiprocessing.process.BaseProcess] = []
        for rank in range(world):
            own = {faults.VARIABLE: (plans or {}).get(rank, "")}
            if world > 1:
                own |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            args = (words, told | own, log, (before or {}).get(rank))
            processes.append(SERVER.Process(target=_rank, args=args, daemon=True))
            processes[-1].start()
        return cls(processes, log)

    def wait(self, grace: float = AGENT, limit: float | None = None) -> list[int]:
        """Exit codes in the order of ranks (-9: SIGKILL), also of those that had to be ended."""
        alive = [process.sentinel for process in self.processes]
        try:
            end = time.monotonic() + (limit or LIMIT)
            while alive and (left := end - time.monotonic()) > 0:
                gone = connection.wait(alive, left)
                alive = [sentinel for sentinel in alive if sentinel not in gone]
                if any(process.exitcode not in (None, 0, 75) for process in self.processes):
                    end = min(end, time.monotonic() + grace)
        finally:
            for process in self.processes:
                process.kill()
        for process in self.processes:
            process.join()
        return [process.exitcode for process in self.processes]  # type: ignore[misc]  # all have ended

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to a rank that may have ended meanwhile."""
        process = self.processes[rank]
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, number)

    @property
    def output(self) -> str:
        """What all ranks have printed so far."""
        return self.log.read_text(errors="replace")


def together(function: Callable[..., None], world: int, folder: Path, *args: object) -> str:
    """Call an importable function on so many new ranks; what they print, AssertionError when one fails."""
    _serve()
    log = folder / "ranks.log"
    log.write_text("")
    told = {key: value for key, value in os.environ.items() if key not in INHERITED}
    told |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    told |= {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "2000"}
    processes: list[multiprocessing.process.BaseProcess] = []
    for rank in map(str, range(world)):
        own = {**told, "RANK": rank, "LOCAL_RANK": rank}
        processes.append(SERVER.Process(target=_call, args=(own, log, function, args), daemon=True))
        processes[-1].start()
    codes = Ranks(processes, log).wait(grace=5)
    assert codes == [0] * world, f"{codes}\n{log.read_text(errors='replace')}"
    return log.read_text(errors="replace")


@dataclass
class Pair(Story):
    """A story whose starts are of two ranks, or of `world`."""

    kind: str = "ddp"
    world: int = 2
    limit: float = LIMIT

    def go(
        self,
        plans: Mapping[int, str] | None = None,
        *words: str,
        before: Mapping[int, Callable[[], None]] | None = None,
    ) -> Ranks:
        """Start `ssmtrain fit` and return at once."""
        line = ["fit", f"config={self.folder}/tiny.yaml", f"name={self.name}", f"runs_dir={self.folder}/runs"]
        line += [f"parallel={self.kind}", f"trainer.devices={self.world}"] if self.world > 1 else []
        return Ranks.begin([*line, *words], self.folder / f"{self.name}.log", self.world, plans, before)

    def done(self, ranks: Ranks, grace: float = AGENT) -> Killed:
        """Wait for the ranks and note how it went; the code is the lowest, which a SIGKILL's is."""
        codes = ranks.wait(grace, self.limit)
        newest = store.newest_good(self.path / "checkpoints", lambda line: None)
        saved = store.step_of(newest) if newest else 0
        self.starts.append(Killed(min(codes), f"{codes}\n{ranks.output}", saved))
        return self.starts[-1]

    def run(self, plans: Mapping[int, str] | None = None, *words: str) -> Killed:
        """One start to its end, which may be a planned fault."""
        return self.done(self.go(plans, *words))

    def start(self, fault: str = "", *words: str) -> Killed:
        """One start to its end, which may be a planned fault of rank 0."""
        return self.run({0: fault}, *words)

    def start_and_signal(self, number: signal.Signals, when: Callable[[], bool], *words: str) -> Killed:
        """One start whose rank 0 gets a signal as soon as `when()` is true."""
        ranks = self.go(None, *words)
        while ranks.processes[0].is_alive() and not when():
            time.sleep(0.005)
        ranks.signal(0, number)
        return self.done(ranks, grace=self.limit)

    def kill(self, draw: random.Random, how: str, victim: int, count: int) -> Killed:
        """One start whose rank `victim` is killed at a point's passing `count`, or at a random moment."""
        if how == "while starting":
            ranks = self.go()
            time.sleep(draw.uniform(0.05, 1.5))
        elif how == "while training":
            enough = self.has_done(count)
            ranks = self.go()
            while ranks.processes[0].is_alive() and not enough():
                time.sleep(0.02)
            time.sleep(draw.uniform(0, 0.1))
        else:
            return self.run({victim: f"{how}:{count}"})
        ranks.signal(victim, signal.SIGKILL)
        return self.done(ranks)


def _rank(
    words: list[str], environment: dict[str, str], log: Path, before: Callable[[], None] | None
) -> None:
    """What a forked process does: become that command line."""
    _become(environment, log)
    faults.arm(environment[faults.VARIABLE])
    sys.argv = ["ssmtrain", *words]
    if before is not None:
        before()
    from ssmtrain.cli import main

    sys.exit(main(words))


def _call(
    environment: dict[str, str], log: Path, function: Callable[..., None], args: tuple[object, ...]
) -> None:
    """What a forked process does to be a rank of a test's own."""
    _become(environment, log)
    function(*args)


def _become(environment: dict[str, str], log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(environment)


def _serve() -> None:
    """Start the process that ranks are forked from, with this program first on its path."""
    SERVER.set_forkserver_preload(list(WARM))
    source = str(Path(ssmtrain.__file__).parents[1])
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS", "DS_ACCELERATOR")}
    os.environ |= {"PYTHONPATH": source, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])

"""The real command line on a tiny hybrid, started, watched and killed from outside."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import ssmtrain
from ssmtrain.check.starts import INHERITED
from ssmtrain.checkpoint import faults, store
from ssmtrain.checkpoint.runs import Run, open_run

PAGE = """
model:
  d_model: 16
  layout: MSA
  blocks:
    M: {{mixer: {{kind: mamba2, d_state: 8, head_dim: 8}}, ffn: {moe}}}
    S: {{mixer: {{kind: mamba1, d_state: 4}}}}
    A: {{mixer: {{kind: attention, n_heads: 2}}, ffn: {{kind: mlp, hidden: 32}}}}
data: {{kind: text, train: {folder}/text.txt, seq_len: 32, cache_dir: {folder}/cache}}
optim: {{kind: adamw, lr: 0.01}}
trainer:
  max_steps: {steps}
  global_batch: {batch}
  save_every: {every}
  log_every: 5
  val_every: 7
  val_tokens: 64
  health_every: 11
  threads: 1
  accelerator: cpu
generate: {{max_tokens: 4}}
"""
MOE = "{kind: moe, n_experts: 4, top_k: 2, hidden: 16, router: sigmoid_bias}"
WORDS = "it was the house of a lady and she said to him that there is no other"


@dataclass
class Killed:
    """How one start ended: exit code (-9: SIGKILL), what was printed, the newest good step after it."""

    code: int
    output: str
    saved: int


@dataclass
class Story:
    """A run of the tiny recipe below `folder`, started again and again until it is finished."""

    folder: Path
    name: str
    starts: list[Killed] = field(default_factory=list)

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.folder / "runs" / self.name

    def open(self) -> Run:
        """The run, at its newest good checkpoint."""
        return open_run(str(self.path))

    def ledger(self) -> list[dict]:
        """One line per step so far."""
        return whole_lines(self.path / "ledger.jsonl")

    def begin(self, fault: str = "", *words: str) -> subprocess.Popen:
        """Start `ssmtrain fit` and return at once."""
        environment = {key: value for key, value in os.environ.items() if key not in INHERITED}
        environment |= {faults.VARIABLE: fault, "SSMTRAIN_LEDGER": "1", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = str(Path(ssmtrain.__file__).parents[1])
        line = ["fit", f"config={self.folder}/tiny.yaml", f"name={self.name}", f"runs_dir={self.folder}/runs"]
        return subprocess.Popen(
            [sys.executable, "-m", "ssmtrain", *line, *words],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def end(self, process: subprocess.Popen) -> Killed:
        """Wait for the process, end what it left running, and note how it went."""
        try:
            output, _ = process.communicate(timeout=250)
        finally:
            _kill_group(process)
        newest = store.newest_good(self.path / "checkpoints", lambda line: None)
        self.starts.append(Killed(process.returncode, output, store.step_of(newest) if newest else 0))
        return self.starts[-1]

    def start(self, fault: str = "", *words: str) -> Killed:
        """One start to its end, which may be a planned fault."""
        return self.end(self.begin(fault, *words))

    def start_and_signal(self, number: signal.Signals, when: Callable[[], bool], *words: str) -> Killed:
        """One start that gets a signal from outside as soon as `when()` is true."""
        process = self.begin("", *words)
        while process.poll() is None and not when():
            time.sleep(0.01)
        process.send_signal(number)
        return self.end(process)

    def has_done(self, more: int) -> Callable[[], bool]:
        """Whether this many steps were done since now, by the ledger."""
        before = self.ledger()
        saved = self.starts[-1].saved if self.starts else 0
        return lambda: len(self.ledger()) >= saved + more and self.ledger() != before


def write_page(folder: Path, steps: int, every: int, rows: int = 4) -> None:
    """The recipe page, with so many rows a step, and a few KB of text."""
    draw = random.Random(0)
    (folder / "text.txt").write_text(" ".join(draw.choice(WORDS.split()) for _ in range(2000)))
    (folder / "tiny.yaml").write_text(
        PAGE.format(folder=folder, steps=steps, every=every, moe=MOE, batch=32 * rows)
    )


def whole_lines(path: Path) -> list[dict]:
    """The ledger's whole lines, also while it is being written or has been torn by a kill."""
    whole = path.read_text().rpartition("\n")[0] if path.is_file() else ""
    return [json.loads(line) for line in whole.splitlines()]


def _kill_group(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()

"""trainer.profile: a Chrome trace of some steps, and where their time goes by kind of layer and by op."""

from __future__ import annotations

import gzip
import json
import logging
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch.profiler import ProfilerActivity, profile, record_function

from ssmtrain.checkpoint.durable import replace_file
from ssmtrain.parallel import ranks
from ssmtrain.train.kinds import BETWEEN, PREFIX, Spent, by_kind, named
from ssmtrain.train.module import LitLM

log = logging.getLogger(__name__)

OPS = 15
"""Ops in the table."""


class Profile(Callback):
    """Profiles rank 0 from the first step to the last, and writes profile/ into the run's folder."""

    def __init__(self, folder: Path, steps: str) -> None:
        self.folder = folder / "profile"
        first, last = steps.split(":")
        self.first, self.last = int(first), int(last)
        self.stack: ExitStack | None = None
        self.between: Any = None
        self.began = 0.0
        self.seconds: list[float] = []
        """Of each profiled step."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Say so when the steps are over already."""
        lit: LitLM = pl_module
        if ranks.rank() == 0 and lit.state.step >= self.first:
            log.warning(
                "trainer.profile: step %s was taken before this start: nothing is profiled", f"{self.first:,}"
            )

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Begin at the first of the steps."""
        lit: LitLM = pl_module
        if ranks.rank() == 0 and self.stack is None and lit.state.step + 1 == self.first:
            on = [ProfilerActivity.CPU]
            on += [ProfilerActivity.CUDA] if lit.device.type == "cuda" else []
            self.stack = ExitStack()
            self.profiler = self.stack.enter_context(profile(activities=on))
            self.stack.enter_context(named(lit))
        elif self.between is not None:
            self.between.__exit__(None, None, None)
            self.between = None
        if self.stack is not None:
            self.began = self._now(lit)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Write everything after the last; what other callbacks do until the next step has a name."""
        lit: LitLM = pl_module
        if self.stack is None:
            return
        self.seconds.append(self._now(lit) - self.began)
        if lit.state.step >= self.last or lit.stop:
            self._finish(lit)
        else:
            self.between = record_function(BETWEEN)
            self.between.__enter__()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Let go of the profiler; a run that fails says why by other means."""
        if self.stack is not None:
            self.stack.close()
            self.stack = None

    @staticmethod
    def _now(lit: LitLM) -> float:
        if lit.device.type == "cuda":
            torch.cuda.synchronize(lit.device)
        return time.perf_counter()

    def _finish(self, lit: LitLM) -> None:
        assert self.stack is not None
        self.stack.close()
        self.stack = None
        try:
            with lit.clock("profile"):
                self._write(lit)
        except OSError as error:
            log.warning("the profile could not be written: %s", error)

    def _write(self, lit: LitLM) -> None:
        """The trace, the tables as text and as JSON; the tables are printed too."""
        self.folder.mkdir(exist_ok=True)
        stem = f"steps-{self.first}-{self.first + len(self.seconds) - 1}"
        trace, plain = self.folder / f"{stem}.trace.json.gz", self.folder / f".{stem}.json"
        self.profiler.export_chrome_trace(str(plain))
        packed = self.folder / f".{stem}.gz"
        with plain.open("rb") as source, gzip.GzipFile(packed, "wb", compresslevel=3) as target:
            shutil.copyfileobj(source, target)
        plain.unlink()
        packed.replace(trace)
        gpu = lit.device.type == "cuda"
        kinds = by_kind(self.profiler.events(), gpu)
        ops = by_op(self.profiler, gpu)
        lines = table(kinds, ops, self.seconds, gpu)
        figures = {
            "steps": [self.first, self.first + len(self.seconds) - 1],
            "seconds": self.seconds,
            "of": "gpu" if gpu else "cpu",
            "kinds_ms": {k: {"forward": s.forward, "backward": s.backward} for k, s in kinds.items()},
            "ops_ms": [{"name": name, "calls": calls, "ms": ms} for name, calls, ms in ops],
        }
        replace_file(self.folder / f"{stem}.txt", ("\n".join(lines) + "\n").encode())
        replace_file(self.folder / f"{stem}.json", (json.dumps(figures, indent=1) + "\n").encode())
        print("\n".join([*lines, f"trace: {trace} (open it in https://ui.perfetto.dev)"]), flush=True)


def by_op(profiler: profile, gpu: bool) -> list[tuple[str, int, float]]:
    """(name, calls, ms of its own) of the ops that took longest."""
    found = []
    for event in profiler.key_averages():
        own = event.self_device_time_total if gpu else event.self_cpu_time_total
        if not event.key.startswith(PREFIX) and "CPU" in str(event.device_type):
            found.append((event.key, event.count, own / 1000))
    return sorted(found, key=lambda op: -op[2])[:OPS]


def table(
    kinds: dict[str, Spent], ops: list[tuple[str, int, float]], seconds: list[float], gpu: bool
) -> list[str]:
    """Milliseconds a step, by kind and by op."""
    steps = len(seconds)
    total = sum(spent.total for spent in kinds.values()) or 1.0
    of = "GPU" if gpu else "CPU"
    lines = [
        f"profile of {steps} steps, {1000 * sum(seconds) / steps:.1f} ms each; {of} time a step:",
        f"  {'kind':<16}{'forward ms':>12}{'backward ms':>13}{'share':>8}",
    ]
    for kind, spent in kinds.items():
        forward, backward = spent.forward / steps, spent.backward / steps
        lines.append(f"  {kind:<16}{forward:>12.2f}{backward:>13.2f}{100 * spent.total / total:>7.1f}%")
    lines.append(f"  {'op':<54}{'calls':>8}{'ms':>10}")
    lines += [f"  {name[:53]:<54}{calls / steps:>8.0f}{ms / steps:>10.2f}" for name, calls, ms in ops]
    return lines

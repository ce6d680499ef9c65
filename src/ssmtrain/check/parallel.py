"""The verb check parallel: a recipe's losses on several devices beside those of one process.

Both runs go through the real command line, with the same seed, global batch and order of rows, in a folder
that is removed afterwards. Sums are added up in another order, so the curves part by rounding and no more.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from ssmtrain.check.compare import read_ledger
from ssmtrain.check.starts import refuse, start, tell, write_page
from ssmtrain.config.errors import BUG, FINISHED, UNFINISHED, UserError
from ssmtrain.config.parallel import AutoParallel
from ssmtrain.config.request import Request
from ssmtrain.config.schema import RunConfig

STEPS = 50
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""Largest difference of two losses over the loss: rounding, and what training makes of it in 50 steps."""


@dataclass
class Comparison:
    """Two runs' losses, nats a label, step by step."""

    kind: str
    devices: int
    tolerance: float
    one: list[float]
    several: list[float]
    rows_differ: int
    """Steps that did not train on the same rows in the same order."""

    @property
    def gaps(self) -> list[float]:
        """Differences over the loss of one process."""
        return [abs(a - b) / max(abs(a), 1e-9) for a, b in zip(self.one, self.several, strict=True)]

    @property
    def ok(self) -> bool:
        """Whether no step is further off than rounding allows; a loss that is not a number is."""
        return not self.rows_differ and all(gap <= self.tolerance for gap in self.gaps)


def command(request: Request) -> int:
    """`ssmtrain check parallel config=… parallel=fsdp trainer.devices=2`: 0 when the losses agree, else 1."""
    config = request.config
    assert config is not None
    if (config.trainer.devices or 1) < 2:
        raise UserError(
            "trainer.devices: check parallel compares several devices with one process",
            f"try: ssmtrain check parallel config={config.recipe} parallel=fsdp trainer.devices=2",
        )
    given = {word.lstrip("+").partition("=")[0] for word in request.overrides}
    limit = config.trainer.max_steps
    steps = limit if limit and "trainer.max_steps" in given else min(STEPS, limit or STEPS)
    folder = Path(tempfile.mkdtemp(prefix="ssmtrain-check-"))
    try:
        found = compare(config, folder, steps)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(as_dict(found), indent=2) if request.as_json else "\n".join(table(config, found)))
    return FINISHED if found.ok else BUG


def compare(config: RunConfig, folder: Path, steps: int) -> Comparison:
    """Run the recipe below `folder` on one process and as given; UserError when one of them cannot run."""
    trainer, devices = config.trainer, config.trainer.devices or 1
    kind = "ddp" if config.parallel.kind == "auto" else config.parallel.kind
    tell(f"{steps} steps on one process", 1, 2)
    one = ledger(alone(config), folder, "one", steps)
    tell(f"{steps} steps on {devices} devices, {kind}", 2, 2)
    several = ledger(config, folder, "several", steps)
    differ = sum(a["samples"] != b["samples"] for a, b in zip(one, several, strict=True))
    left, right = ([float.fromhex(line["loss_hex"]) for line in lines] for lines in (one, several))
    return Comparison(kind, devices, TOLERANCE[trainer.precision], left, right, differ)


def alone(config: RunConfig) -> RunConfig:
    """The same for one process, which takes in turn what each device takes at once."""
    trainer = config.trainer
    rows = trainer.micro_rows or trainer.global_batch // config.data.seq_len // (trainer.devices or 1)
    changes = {"devices": 1, "micro_batch": rows}
    return config.model_copy(
        update={"trainer": trainer.model_copy(update=changes), "parallel": AutoParallel()}
    )


def ledger(config: RunConfig, folder: Path, name: str, steps: int) -> list[dict]:
    """The ledger of the recipe's first steps, run below `folder`; UserError when it cannot run so far."""
    # A signal at the beginning of a step is obeyed at its end.
    done = start(write_page(config, folder, name, steps + 1), folder / name, f"step_start:{steps}:TERM")
    if done.code not in (FINISHED, UNFINISHED):
        refuse(done)
    lines = read_ledger(folder / name / "ledger.jsonl")
    if len(lines) != steps:
        raise UserError(f"{name}: the run took {len(lines)} steps, not {steps}")
    return lines


def as_dict(found: Comparison) -> dict[str, object]:
    """The comparison as plain data."""
    return {"ok": found.ok, **asdict(found), "largest": max(found.gaps)}


def table(config: RunConfig, found: Comparison) -> list[str]:
    """The comparison for a reader."""
    steps = len(found.one)
    lines = [
        f"{config.recipe}: {steps} steps, {found.kind} on {found.devices} devices beside one process",
        "",
    ]
    lines.append(f"{'step':>6}{'one':>12}{found.kind:>12}{'difference':>12}")
    for step in sorted({1, 2, 5, 10, 20, steps // 2, steps} & set(range(1, steps + 1))):
        a, b, gap = found.one[step - 1], found.several[step - 1], found.gaps[step - 1]
        lines.append(f"{step:>6}{a:>12.6f}{b:>12.6f}{gap:>12.1e}")
    lines.append("")
    if found.rows_differ:
        lines.append(f"differs    rows of {found.rows_differ} steps")
    verdict = "OK: the losses agree" if found.ok else "FAILED"
    lines.append(f"{verdict}; largest difference {max(found.gaps):.1e}, allowed {found.tolerance:.0e}")
    return lines

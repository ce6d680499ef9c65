"""`ssmtrain replay`: a step of a run once more, to the bit, and what its loss and gradient are made of."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmtrain.checkpoint import store
from ssmtrain.checkpoint.origins import open_origin
from ssmtrain.checkpoint.runs import Run
from ssmtrain.config.errors import FINISHED, UserError
from ssmtrain.config.reference import parse
from ssmtrain.config.request import Request
from ssmtrain.config.schema import RunConfig
from ssmtrain.data.module import open_data
from ssmtrain.data.tokenizer import tokenizer_of
from ssmtrain.explain.insight import Insight, RowFigures
from ssmtrain.explain.reads import Reads
from ssmtrain.explain.rows import Row, described, rows_of
from ssmtrain.explain.subject import Subject, open_subject, records, step_of
from ssmtrain.train.journal import finite

if TYPE_CHECKING:
    from ssmtrain.train.replay import Replay

WORST = 3
"""Rows whose documents are shown."""
LIMIT = 240
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""Largest difference over the value where several ranks' sums are added up in another order."""


@dataclass
class Verdict:
    """How what was replayed compares with what the run wrote down."""

    exact: bool
    """Whether the same bits are to be expected: one process took the steps."""
    tolerance: float
    equal: int = 0
    """Figures that are equal to the bit."""
    within: int = 0
    """Others within the tolerance."""
    differ: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    """Steps that were compared."""

    def compare(self, step: int, what: str, then: float | None, now: float) -> None:
        """Count one figure; None is how JSON has what is not finite."""
        if step not in self.steps:
            self.steps.append(step)
        if then is None or not math.isfinite(then):
            same = not math.isfinite(now)
        else:
            same = then == now
        if same:
            self.equal += 1
        elif then is not None and not self.exact and abs(then - now) <= self.tolerance * abs(then):
            self.within += 1
        else:
            self.differ.append(f"{what} of step {step:,}: {then!r} then, {now!r} now")

    def said(self, step: int) -> list[str]:
        """The verdict for a reader."""
        if not self.steps:
            return ["the run wrote no figures of these steps: there is nothing to compare with"]
        which = f"step {step:,}" if step in self.steps else f"steps {self.steps[0]:,} to {self.steps[-1]:,}"
        if self.differ:
            lines = [f"DIFFERS from what the run recorded: {self.differ[0]}", *self.differ[1:3]]
            return [
                *lines,
                "the same tokens were read; another machine, version or number of threads gives other last "
                "bits, and a trainer.max_steps that was changed since gives another learning rate",
            ]
        count = f"{len(self.steps)} recorded steps compared"
        if not self.within:
            return [f"equal to the bit to what the run recorded ({which}; {count})"]
        return [
            f"equal within {self.tolerance:.0e} of what the run recorded ({which}; {count}): "
            "several processes took the steps, whose sums are added up in another order"
        ]


def command(request: Request) -> int:
    """Replay step=N of run=…, print what was found; the run's folder is only read."""
    from ssmtrain.train.replay import Replay, alone, run_again

    subject = open_subject(request)
    assert subject.folder is not None
    step = step_of(request)
    subject.numbers(step)
    run = start_of(subject, request, step)
    train = {r["step"]: r for r in records(run.metrics, "train")}
    ledger = {r["step"]: r for r in records(run.ledger)}
    world, kind = ranks_of(run, step, ledger), subject.config.parallel.kind
    config = alone(subject.config, world)
    tokenizer = tokenizer_of(config, subject.folder)
    data = open_data(config, tokenizer)
    insight = Insight()
    begin, until = run.begins_at, last_step(step, set(train), set(ledger))
    replay = Replay(step, until, set(train), subject.numbers(begin + 1).start, insight.look, world)
    if not request.as_json:
        how_many = replay.until - begin
        print(f"from step {begin:,} ({run.checkpoint or 'the start'}), {how_many:,} steps", flush=True)
    run_again(config, data, run, replay)
    others = {len(ledger[one.step]["params"]) for one in replay.taken if one.step in ledger}
    exact = kind in ("auto", "ddp") and {world} | others == {1}
    verdict = compared(replay, train, ledger, exact, config)
    rows = rows_of(data, Reads(data, tokenizer), insight.numbers, insight.length)
    worst = [rows[one.index] for one in insight.worst(WORST)]
    if request.as_json:
        print(json.dumps(finite(plain(subject, step, replay, insight, verdict, worst)), indent=2))
        return FINISHED
    print("\n".join(page(step, replay, insight, verdict)))
    for row in worst:
        print("\n".join(["", *described(row, None if request.flags.get("full") else LIMIT)]))
    return FINISHED


def plain(
    subject: Subject, step: int, replay: Replay, insight: Insight, verdict: Verdict, worst: list[Row]
) -> dict[str, Any]:
    """Everything found, for JSON."""
    found = next((one for one in replay.taken if one.step == step), None)
    return {
        "run": str(subject.folder),
        "step": step,
        "taken": asdict(found) if found else None,
        "verdict": asdict(verdict),
        "nonfinite": replay.nonfinite,
        **asdict(insight),
        "numbers": [insight.numbers.start, insight.numbers.stop],
        "worst": [row.plain(full=False) for row in worst],
    }


def start_of(subject: Subject, request: Request, step: int) -> Run:
    """The run at its newest good checkpoint before the step (or the one that @ names), else at its start."""
    folder, config = subject.folder, subject.config
    assert folder is not None
    run = Run(folder.name, folder, config)
    given = Path(request.run or "")
    named = store.step_of(given) if store.is_name(given.name) else parse(request.run or "").step
    found = [path for path in store.checkpoints(folder / "checkpoints") if store.step_of(path) < step]
    if named is not None:
        found = [path for path in found if store.step_of(path) == named]
        if not found:
            raise UserError(f"run={request.run}: there is no such checkpoint before step {step:,}")
    for path in reversed(found):
        if not store.verify(path):
            run.checkpoint = path
            return run
    if config.origin is not None:
        run.origin = open_origin(config)
    return run


def ranks_of(run: Run, step: int, ledger: dict[int, Any]) -> int:
    """How many ranks took the step, by the ledger, else by the next checkpoint, else by the one before."""
    if step in ledger:
        return len(ledger[step]["params"])
    saved = store.checkpoints(run.checkpoints)
    later = next((path for path in saved if store.step_of(path) >= step), run.checkpoint)
    if later is None:
        return run.config.trainer.devices or 1
    return int(store.load_state(later).get("world") or 1)


def last_step(step: int, train: set[int], ledger: set[int]) -> int:
    """The step itself where its figures are recorded, else the next that has a record: it proves both."""
    if step in train or step in ledger:
        return step
    return min((other for other in train | ledger if other > step), default=step)


def compared(
    replay: Replay, train: dict[int, Any], ledger: dict[int, Any], exact: bool, config: RunConfig
) -> Verdict:
    """All replayed steps that the run wrote figures of, beside those."""
    verdict = Verdict(exact, TOLERANCE[config.trainer.precision])
    for one in replay.taken:
        if one.step in ledger:
            line = ledger[one.step]
            verdict.compare(one.step, "loss", float.fromhex(line["loss_hex"]), one.loss)
            verdict.compare(one.step, "gradient norm", float.fromhex(line["grad_norm_hex"]), one.grad_norm)
            if line["samples"] != one.samples:
                verdict.differ.append(f"rows of step {one.step:,}: {line['samples']} then, {one.samples} now")
        elif one.step in train:
            record = train[one.step]
            verdict.compare(one.step, "loss", record["loss"], one.mean)
            verdict.compare(one.step, "gradient norm", record["grad_norm"], one.grad_norm)
    return verdict


def page(step: int, replay: Replay, insight: Insight, verdict: Verdict) -> list[str]:
    """What was found, for a reader."""
    lines = [""]
    found = next((one for one in replay.taken if one.step == step), None)
    if found is not None:
        skipped = ", left out by the run" if found.skipped else ""
        figures = f"loss {found.loss!r}, gradient norm {found.grad_norm!r}, lr {found.lr:.3e}"
        lines.append(f"step {step:,}: {figures}{skipped}")
    lines += [*replay.nonfinite, *verdict.said(step)]
    shown = [(row, _sample(row)) for row in insight.worst(16)]
    wide = max([10, *(2 + len(sample) for _, sample in shown)])
    lines += ["", f"{'row':>5}{'of split':>{wide}}{'labels':>8}{'loss':>10}{'gradient':>12}{'largest':>11}"]
    for row, sample in shown:
        lines.append(
            f"{row.index:>5}{sample:>{wide}}{row.labels:>8,}{row.loss:>10.4f}{row.grad_norm:>12.4g}"
            f"{row.largest:>11.4g}  {row.largest_at}"
        )
    if len(insight.rows) > 16:
        lines.append(f"  … and {len(insight.rows) - 16} rows with smaller losses (--json has all)")
    lines += ["", "gradient norm by kind"]
    lines += [f"  {name:<34}{norm:>12.4g}" for name, norm in insight.kinds.items()]
    lines += ["", "gradient norm by part, and its largest activation"]
    for name, norm in insight.parts.items():
        pair = next((pair for at, pair in insight.activations.items() if name.startswith(at)), None)
        largest = f"{pair[0]:>12.4g} (row {pair[1]})" if pair is not None else ""
        lines.append(f"  {name:<34}{norm:>12.4g}{largest}")
    return lines


def _sample(row: RowFigures) -> str:
    """Which row of the data, and from which of its tokens on."""
    sample = f"{row.source}:{row.row}" if row.source else f"{row.row:,}"
    return f"{sample}+{row.begin:,}" if row.begin else sample

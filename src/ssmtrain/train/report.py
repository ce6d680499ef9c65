"""The end of a run: the whole validation, yardsticks, a sample, the curve, and what to type next."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from ssmtrain.checkpoint.durable import replace_file
from ssmtrain.checkpoint.runs import Run
from ssmtrain.config.origin import describe
from ssmtrain.config.redact import redact, redacted
from ssmtrain.config.schema import RunConfig
from ssmtrain.config.task_rules import tasks
from ssmtrain.data.sources import cost, open_source, pages, split_text
from ssmtrain.data.yardsticks import yardsticks
from ssmtrain.train.attempts import line
from ssmtrain.train.callbacks.words import duration, scored, si
from ssmtrain.train.curve import TASK, TEXT, draw, picture, read, read_sets
from ssmtrain.train.journal import finite

YARDSTICK_LIMIT = 64 * 2**20
"""Bytes of validation text beyond which compressors would take longer than they tell."""


def measure(config: RunConfig, n_bytes: int) -> dict[str, float]:
    """Bits per byte of the validation text under gzip, xz and bz2, computed now; empty for large texts
    and for tasks."""
    if not 0 < n_bytes <= YARDSTICK_LIMIT:
        return {}
    sources = [open_source(page) for page in pages(config.data).values()]
    if sum(cost(source, split) for source in sources for split in source.splits if split != "train") > (
        16 * YARDSTICK_LIMIT
    ):
        return {}
    return yardsticks(split_text(config.data, "val"))


def write(run: Run, figures: dict[str, Any], sample: str) -> str:
    """Write report.json, report.md and loss.png into the run's folder; returns the text for the console."""
    figures, sample = redacted(figures), redact(sample)
    train, val = read(run.metrics)
    unit = TASK if figures["val_bpb"] is None else TEXT
    marks, sets = figures.get("yardsticks", {}), read_sets(run.metrics)
    drawn = picture(run.folder / "loss.png", train, val, marks, unit, sets)
    replace_file(run.folder / "report.json", (json.dumps(finite(figures), indent=2) + "\n").encode())
    curve = draw([bpb for _, bpb in train], unit=unit)
    scores = score_lines(figures)
    commands = next_commands(run)
    page = [
        f"# {run.name}",
        "",
        summary(figures),
        *describe(run.config.origin),
        "",
        *(f"- {line}" for line in scores),
        "",
        *(["![Loss](loss.png)", ""] if drawn else []),
        "## Sample",
        "",
        *(f"> {line}" for line in sample.splitlines()),
        "",
        "## Next",
        "",
        *(f"- {what}: `{command}`" for what, command in commands),
        "",
    ]
    replace_file(run.folder / "report.md", "\n".join(page).encode())
    width = max(len(what) for what, _ in commands)
    return "\n".join(
        [
            "",
            *curve,
            "",
            summary(figures),
            *describe(run.config.origin),
            *scores,
            "",
            "Sample:",
            *(f"  {line}" for line in sample.splitlines()),
            "",
            f"Run      {run.folder}",
            *([f"Picture  {run.folder / 'loss.png'}"] if drawn else []),
            f"Report   {run.folder / 'report.md'}",
            "",
            "Next:",
            *(f"  {what:<{width}}  {command}" for what, command in commands),
        ]
    )


def summary(figures: dict[str, Any]) -> str:
    """One line: how much was trained, how long it took."""
    text = (
        f"{figures['params']:,} parameters, {figures['steps']:,} steps, {si(figures['tokens'])} tokens "
        f"in {duration(figures['seconds'])} ({si(figures['tokens_per_s'])} tokens/s)"
    )
    skipped = figures["nonfinite"]
    text += f", {skipped} steps skipped as not finite" if skipped else ""
    leaps, turns = figures.get("spikes"), figures.get("rollbacks")
    text += f", {leaps} left out as spikes" if leaps else ""
    return text + (f", {turns} times back to a checkpoint" if turns else "")


def score_lines(figures: dict[str, Any]) -> list[str]:
    """The validation score beside what compressors need for the same text; what the time went into."""
    if figures["val_bpb"] is None:
        lines = [
            f"validation: {100 * figures['val_accuracy']:.2f} % of the answers right, and "
            f"{100 * figures['val_row_accuracy']:.2f} % of all {figures['val_rows']:,} rows "
            f"(loss {figures['val_loss']:.4f})"
        ]
    else:
        lines = [
            f"validation: {figures['val_bpb']:.3f} bits per byte (loss {figures['val_loss']:.4f}, "
            f"perplexity {figures['val_perplexity']:.4g}) on all of {figures['val_bytes']:,} bytes"
        ]
    sets = figures.get("val_sets") or {}
    if figures["val_bpb"] is None:
        lines += [f"{name}: {scored(one)}" for name, one in sets.items()]
    elif sets:
        each = [f"{name} {one['bpb']:.3f} (loss {one['loss']:.4f})" for name, one in sets.items()]
        lines.append(f"bits per byte of {', '.join(each)}")
    for n, found in figures.get("val_lengths", {}).items():
        lines.append(f"in rows of {n}: {scored(found)}")
    lines += [f"check {name}: {scored(found)}" for name, found in figures.get("checks", {}).items()]
    found = figures.get("yardsticks") or {}
    if found:
        lines.append(
            "the same text compressed: " + ", ".join(f"{name} {bits:.3f}" for name, bits in found.items())
        )
    if figures.get("goodput"):
        lines.append(line(figures["goodput"]))
    return lines


def program() -> str:
    """How this program is called from here: `ssmtrain` where the shell finds it, else its path."""
    beside = Path(sys.executable).parent / "ssmtrain"
    found = shutil.which("ssmtrain")
    if found is not None and (not beside.exists() or Path(found).resolve() == beside.resolve()):
        return "ssmtrain"
    if not beside.exists():
        return f"{shlex.quote(sys.executable)} -m ssmtrain"
    if not beside.is_relative_to(Path.cwd()):
        return shlex.quote(str(beside))
    here = os.path.relpath(beside)
    return shlex.quote(here if os.sep in here else f"./{here}")


def next_commands(run: Run) -> list[tuple[str, str]]:
    """What to type next, ready to paste."""
    page = shlex.quote(str(run.folder / "config.yaml"))
    folder = shlex.quote(str(run.folder))
    steps = run.config.trainer.max_steps
    longer = (
        f"trainer.max_steps={2 * steps}"
        if steps
        else f"trainer.max_tokens={2 * (run.config.trainer.max_tokens or 0)}"
    )
    call, recipe = program(), run.config.recipe
    if tasks(run.config.data):
        prompt = "'1 2 3'"
        text = ("score it again", f"{call} eval run={folder}")
    else:
        prompt = shlex.quote("It is a truth")
        text = ("your own text", f"{call} fit config={recipe} data=text data.train=path/to/texts")
    return [
        ("write more", f"{call} generate run={folder} --prompt {prompt}"),
        ("resume longer", f"{call} fit config={page} {longer}"),
        ("look inside", f"{call} show config={page}"),
        text,
    ]


def how_to_continue(run: Run) -> str:
    """The command that continues a run that was stopped."""
    return f"{program()} fit config={shlex.quote(str(run.folder / 'config.yaml'))}"

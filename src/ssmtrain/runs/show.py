"""`runs show`: one run: its config in short, how far it is, its starts and checkpoints, what to type next."""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmtrain.config.errors import FINISHED
from ssmtrain.runs.find import RUNS_DIR, one
from ssmtrain.runs.folder import METRICS, Saved, Seen, checkpoints, figure, goodput, look, page_of
from ssmtrain.runs.lines import backwards
from ssmtrain.runs.ls import as_json
from ssmtrain.runs.words import ago, number, plain, size, speed, table
from ssmtrain.train import attempts
from ssmtrain.train.callbacks.words import duration, si

if TYPE_CHECKING:
    from ssmtrain.config.request import Request


def command(request: Request) -> int:
    """Print what there is to say about a run."""
    runs_dir = Path(request.words.get("runs_dir", RUNS_DIR))
    folder = one(request.overrides, runs_dir, "runs show")
    run, page = look(folder, runs_dir), page_of(folder)
    starts = attempts.read(folder / attempts.FILE)
    saved = checkpoints(folder, scores(folder))
    if request.as_json:
        found = {
            **as_json(run),
            "config": short(page),
            "origin": page.get("origin"),
            "attempts": [asdict(start) for start in starts],
            "goodput": goodput(folder),
            "checkpoints": [{**asdict(each), "path": str(each.path)} for each in saved],
            "next": dict(next_commands(run)),
        }
        print(json.dumps(found, indent=2))
        return FINISHED
    print("\n".join(plain(line) for line in lines(run, page, starts, saved)))
    return FINISHED


def lines(run: Seen, page: dict[str, Any], starts: list[attempts.Attempt], saved: list[Saved]) -> list[str]:
    """The page that `runs show` prints."""
    why = f" ({run.why})" if run.why else ""
    found = [f"{run.name}: {run.state}{why}", ""]
    found += table([("folder", str(run.folder)), *((key, text) for key, text in short(page).items())], 2)
    found += ["", *_progress(run)]
    if starts:
        found += ["", "starts:", *_starts(starts, run.state), attempts.line(attempts.account(starts))]
    if saved:
        found += ["", "checkpoints:", *_saved(saved)]
    commands = next_commands(run)
    width = max(len(what) for what, _ in commands)
    return [*found, "", "next:", *(f"  {what:<{width}}  {text}" for what, text in commands)]


def short(page: dict[str, Any]) -> dict[str, str]:
    """A config in a few lines."""

    def at(path: str) -> Any:
        value: Any = page
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    if not page:
        return {"config": "config.yaml cannot be read; see: ssmtrain config show run=…"}
    blocks = at("model.blocks") if isinstance(at("model.blocks"), dict) else {}
    kinds = [
        f"{name} = {'+'.join(str(part['kind']) for part in _parts(block))}" for name, block in blocks.items()
    ]
    depth = f" tiled to {at('model.n_layers')}" if at("model.n_layers") else ""
    origin = at("origin")
    found = {
        "recipe": f"{at('recipe')}, seed {at('seed')}",
        "model": f"{at('model.layout')}{depth}, d_model {at('model.d_model')}; {', '.join(kinds)}",
        "data": f"{at('data.kind')}, rows of {at('data.seq_len')} tokens; tokenizer {at('tokenizer.kind')}",
        "training": f"{at('optim.kind')} lr {at('optim.lr')}, {at('schedule.kind')}, "
        f"{at('trainer.global_batch')} tokens a step, {at('trainer.precision')}",
    }
    if isinstance(origin, dict):
        what = "forked from" if origin.get("kind") == "fork" else "weights from"
        found["origin"] = f"{what} {origin.get('run')} at step {origin.get('step')}"
    return found


def scores(folder: Path) -> dict[int, float]:
    """Validation losses by step, of the latest validations."""
    found: dict[int, float] = {}
    for record in backwards(folder / METRICS):
        loss = figure(record.get("loss"))
        if record.get("kind") == "val" and loss is not None and type(record.get("step")) is int:
            found.setdefault(record["step"], loss)
    return found


def next_commands(run: Seen) -> list[tuple[str, str]]:
    """What to type next, ready to paste."""
    name, folder = shlex.quote(run.name), shlex.quote(str(run.folder))
    page = shlex.quote(str(run.folder / "config.yaml"))
    report = ("look at its curves", f"ssmtrain report {folder}")
    if run.state == "running":
        return [("watch it", f"ssmtrain runs tail {folder}"), report]
    if run.state == "finished":
        longer = f"trainer.max_steps={2 * run.max_steps}" if run.max_steps else "trainer.max_tokens=…"
        return [
            ("write with it", f"ssmtrain generate run={folder} --prompt 'It is a truth'"),
            ("train it longer", f"ssmtrain fit config={page} {longer}"),
            report,
        ]
    return [("continue", f"ssmtrain fit config={page}"), report, ("delete it", f"ssmtrain runs rm {name}")]


def _parts(block: Any) -> list[dict[str, Any]]:
    parts = [block.get(part) for part in ("mixer", "ffn")] if isinstance(block, dict) else []
    return [part for part in parts if isinstance(part, dict) and "kind" in part]


def _progress(run: Seen) -> list[str]:
    goal = f" of {run.max_steps:,}" if run.max_steps else ""
    share = f" ({100 * run.progress:.1f} %)" if run.progress is not None else ""
    rows = [
        ("step", f"{run.step:,}{goal}{share}, {si(run.tokens)} tokens"),
        ("loss", f"{number(run.loss)} in training, {number(run.val_loss)} in validation"),
        ("bits/byte", f"{number(run.val_bpb)} in validation"),
        ("speed", f"{speed(run.tokens_per_s)} tokens/s"),
        ("changed", ago(time.time() - run.changed)),
        ("size", size(run.size)),
    ]
    return table(rows, left=2)


def _starts(starts: list[attempts.Attempt], state: str) -> list[str]:
    rows = []
    for number_, start in enumerate(starts, 1):
        at = time.strftime("%Y-%m-%d %H:%M", time.localtime(start.since)) if start.since else "-"
        spent = duration(sum(start.time.values()))
        last = number_ == len(starts)
        silent = "running" if last and state == "running" else "killed" if start.since else "not noted"
        steps = f"steps {start.begin:,} to {start.step:,}"
        rows.append((f"  {number_}", at, steps, spent, start.end or silent))
    return table(rows, left=5)


def _saved(saved: list[Saved]) -> list[str]:
    rows = []
    for each in saved:
        loss = f"validation loss {number(each.val_loss)}" if each.val_loss is not None else ""
        rows.append((f"  @step-{each.step}", size(each.size), loss, "best" if each.best else ""))
    return table(rows, left=4)

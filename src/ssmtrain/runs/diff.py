"""`runs diff`: what sets runs apart, and what each of them came to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmtrain.config.errors import FINISHED, UserError
from ssmtrain.config.identity import flat, may_change
from ssmtrain.runs.find import RUNS_DIR, known, named
from ssmtrain.runs.folder import Seen, json_of, look, page_of
from ssmtrain.runs.words import number, plain, speed, table

if TYPE_CHECKING:
    from ssmtrain.config.request import Request

ABSENT = "-"
NEVER = ("name", "resume", "runs_dir")
"""Keys that differ, or may, between any two runs."""


def command(request: Request) -> int:
    """Print the keys whose values differ between runs, and the runs' results beside each other."""
    runs_dir = Path(request.words.get("runs_dir", RUNS_DIR))
    folders = named(request.overrides, runs_dir)
    if len(folders) < 2:
        raise UserError("runs diff takes two runs or more: ssmtrain runs diff <run> <run>", known(runs_dir))
    runs = [look(folder, runs_dir) for folder in folders]
    keys, results = changed([page_of(folder) for folder in folders]), [result(run) for run in runs]
    if request.as_json:
        shown = {key: dict(zip([run.name for run in runs], values)) for key, values in keys.items()}
        scores = {run.name: found for run, found in zip(runs, results)}
        print(json.dumps({"config": shown, "results": scores}, indent=2))
        return FINISHED
    print("\n".join(lines([run.name for run in runs], keys, results)))
    return FINISHED


def changed(pages: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """The keys that differ between pages, those first that decide what is learned; None: not on that page."""
    flats = [dict(flat(page)) for page in pages]
    keys = [key for key in dict.fromkeys(key for page in flats for key in page) if key not in NEVER]
    found = {key: [page.get(key) for page in flats] for key in keys}
    differ = [key for key, values in found.items() if any(value != values[0] for value in values)]
    return {key: found[key] for key in sorted(differ, key=may_change)}


def result(run: Seen) -> dict[str, Any]:
    """What a run came to."""
    report = json_of(run.folder / "report.json") if run.state == "finished" else {}
    return {
        "state": run.state,
        "step": run.step,
        "tokens": run.tokens,
        "loss": run.loss,
        "val_loss": run.val_loss,
        "val_bpb": run.val_bpb,
        "tokens_per_s": run.tokens_per_s,
        "params": report.get("params"),
        "seconds": report.get("seconds"),
    }


def lines(
    names: Sequence[str], keys: Mapping[str, Sequence[Any]], results: Sequence[Mapping[str, Any]]
) -> list[str]:
    """The two tables."""
    found = [("", *map(plain, names))]
    found += [(key, *(value(one) for one in values)) for key, values in keys.items()]
    told = table(found) if keys else ["no difference in the configs"]
    rows = [("", *map(plain, names))]
    rows += [(key, *(_result(key, one[key]) for one in results)) for key in results[0]]
    return [*told, "", *table(rows)]


def value(of: Any) -> str:
    """A setting, shortened."""
    text = ABSENT if of is None else "true" if of is True else "false" if of is False else str(of)
    text = plain(text)
    return text if len(text) <= 40 else f"{text[:39]}…"


def _result(key: str, of: Any) -> str:
    if isinstance(of, str):
        return of
    if key == "tokens_per_s":
        return speed(of)
    if isinstance(of, float):
        return number(of, 0 if key == "seconds" else 4)
    return ABSENT if of is None else f"{of:,}"

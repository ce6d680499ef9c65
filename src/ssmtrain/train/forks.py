"""`fit from=…` and `fit init=…`: the config of a run that begins from another one's checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssmtrain.checkpoint import store
from ssmtrain.checkpoint.exported import is_export
from ssmtrain.checkpoint.origins import Source, config_of, of_checkpoint, of_export, refuse_changes
from ssmtrain.checkpoint.records import CONFIG
from ssmtrain.checkpoint.runs import open_run
from ssmtrain.config import launched
from ssmtrain.config.errors import UserError
from ssmtrain.config.growth import batches
from ssmtrain.config.identity import default_name
from ssmtrain.config.load import load, load_run_config, typed
from ssmtrain.config.origin import Origin
from ssmtrain.config.reference import Reference, parse
from ssmtrain.config.schema import RunConfig, dump
from ssmtrain.config.yaml_reader import read_yaml
from ssmtrain.train.schedule import factor_at, horizon

DECISION = "SSMTRAIN_ORIGIN"
"""Environment variable by which rank 0 hands the origin it chose to the ranks that it starts."""

KINDS = {"from": "fork", "init": "weights"}


def load_from(own: Mapping[str, str], words: Sequence[str]) -> RunConfig:
    """The config of a line with from= or init=; UserError before anything is made.

    `own` has those words, `words` the others. Without config= the page is that of the run begun from, its
    name left out; what the line says goes on top.
    """
    if len(own) != 1:
        raise UserError("from= forks a run, init= takes weights alone: give one of them")
    word, text = next(iter(own.items()))
    origin, page = _origin(word, text, words)
    named = any(one.lstrip("+").startswith("config=") for one in words)
    config = load(words) if named else load_run_config(page, words)
    tree = dump(config) | {"origin": dump(origin)}
    said = {one.lstrip("+").partition("=")[0] for one in words}
    if "name" not in said and (not named or config.name == default_name(config)):
        tree["name"] = None
    if origin.kind == "fork":
        _fill_decay(tree, config, page, origin, said, named)
    made = typed(tree, training=True)
    refuse_changes(config_of(page), made)
    if origin.kind == "fork" and made.trainer.max_steps is not None:
        _refuse_short(made, origin)
    return made


def _origin(word: str, text: str, words: Sequence[str]) -> tuple[Origin, Path]:
    """The origin that a word names, and the page of its config."""
    started = os.environ.get("LOCAL_RANK", "0") != "0"
    chosen = json.loads(os.environ.get(DECISION, "{}")) if started else {}
    if chosen.get("text") == text:
        return Origin.model_validate(chosen["origin"]), Path(chosen["page"])
    runs_dir = next((one.partition("=")[2] for one in words if one.startswith("runs_dir=")), "runs")
    where = Path(os.path.expanduser(text))
    if is_export(where):
        if word == "from":
            raise UserError(
                f"from={text}: these are weights alone; a fork needs a run's checkpoint",
                f"begin a run from them with init={text}",
            )
        source = of_export(where, word)
    else:
        named = parse(text, word)
        _refuse_unnamed(word, text, named)
        recorded = _recorded(named, runs_dir)
        if recorded is not None:
            return recorded, Path(recorded.run) / CONFIG
        run = open_run(text, runs_dir, word)
        assert run.checkpoint is not None
        source = of_checkpoint(run.folder, run.checkpoint)
    _hand_on(text, source, origin := source.origin(KINDS[word]))
    return origin, source.page


def _hand_on(text: str, source: Source, origin: Origin) -> None:
    os.environ[DECISION] = json.dumps({"text": text, "origin": dump(origin), "page": str(source.page)})


def _refuse_unnamed(word: str, text: str, named: Reference) -> None:
    """Ranks that a scheduler starts look for themselves: the newest must not move between their looks."""
    if launched.world() > 1 and named.step is None and not store.is_name(Path(text).name):
        raise UserError(f"{word}={text}: under a launcher name the step, as in {word}={text}@step-1000")


def _recorded(named: Reference, runs_dir: str) -> Origin | None:
    """The origin as a run began from it wrote it down, when the checkpoint itself has been deleted since.

    So that the line that began a fork also continues it.
    """
    if named.step is None:
        return None
    folder = next(
        (p for p in (Path(named.where), Path(runs_dir) / named.where) if (p / CONFIG).is_file()), None
    )
    if folder is None or (folder / "checkpoints" / store.step_name(named.step)).exists():
        return None
    for page in sorted([*Path(runs_dir).glob(f"*/{CONFIG}"), *Path(runs_dir).glob(f"*/*/{CONFIG}")]):
        try:
            found = Origin.model_validate(read_yaml(page).get("origin"))
        except (UserError, ValueError):
            continue
        same = Path(found.run).absolute() == folder.absolute() and found.step == named.step
        if same and store.checkpoints(page.parent / "checkpoints"):
            return found
    return None


def _fill_decay(
    tree: dict[str, Any], config: RunConfig, page: Path, origin: Origin, said: set[str], named: bool
) -> None:
    """Let schedule=decay begin at the fork, from the rate there; a branch of a branch keeps its own."""
    schedule = config.schedule
    if schedule.kind != "decay":
        return
    asked = named or bool(said & {"schedule", "schedule.kind"})
    if "schedule.start" not in said and (asked or schedule.start is None):
        tokens = batches(config.trainer).tokens_after(origin.step)
        tree["schedule"]["start"] = origin.step if schedule.unit == "steps" else tokens
    if "schedule.share" in said or not (asked or schedule.share is None):
        return
    source = config_of(page)
    share = factor_at(source.schedule, origin.step, horizon(source.trainer))
    if share <= schedule.floor:
        raise UserError(
            f"schedule=decay: at step {origin.step:,} the rate of {origin.run} is down to {share:.3g} of its "
            "peak already",
            f"fork an earlier step ({origin.run}@step-<number>), or set schedule.share=1.0",
        )
    tree["schedule"]["share"] = share


def _refuse_short(config: RunConfig, origin: Origin) -> None:
    steps = config.trainer.max_steps or 0
    if steps <= origin.step:
        raise UserError(
            f"trainer.max_steps = {steps}: the fork begins at step {origin.step:,} and counts on",
            f"set more, as in trainer.max_steps={origin.step + max(1, origin.step // 5)}",
        )

"""What another run leaves for a new one: a checkpoint or exported weights, found, verified and compared."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from ssmtrain.checkpoint import store
from ssmtrain.checkpoint.choose import choose
from ssmtrain.checkpoint.exported import is_export, open_export
from ssmtrain.checkpoint.records import CONFIG
from ssmtrain.config.errors import UserError
from ssmtrain.config.expect import show_value
from ssmtrain.config.growth import batches
from ssmtrain.config.identity import differences
from ssmtrain.config.load import typed
from ssmtrain.config.origin import Origin
from ssmtrain.config.reference import Reference
from ssmtrain.config.schema import RunConfig
from ssmtrain.config.yaml_reader import read_yaml

KEPT = {
    "fork": ("model.", "tokenizer.", "optim.kind", "seed"),
    "weights": ("model.",),
}
"""Keys, or groups of them, that a run shares with the one that it began from, by the origin's kind."""

_verified: dict[Path, str] = {}
"""Checkpoints that this process has read through: to do so twice would take minutes."""


@dataclass(frozen=True)
class Source:
    """A checkpoint, or a file of weights, with the config that made it."""

    folder: Path
    """The run's, or the export's own path."""
    page: Path
    """Its config.yaml."""
    path: Path
    """The checkpoint's folder, or the file."""
    step: int
    sha256: str

    def origin(self, kind: str) -> Origin:
        """The record of it in the config of a run that begins from it."""
        return Origin.model_validate(
            {"kind": kind, "run": str(self.folder), "step": self.step, "sha256": self.sha256}
        )


def of_checkpoint(folder: Path, checkpoint: Path) -> Source:
    """A run's checkpoint that has been verified."""
    digest = _digest(checkpoint)
    _verified[checkpoint] = digest
    return Source(folder, folder / CONFIG, checkpoint, store.step_of(checkpoint), digest)


def of_export(path: Path, word: str) -> Source:
    """Exported weights; UserError when they are not whole."""
    found = open_export(path, word)
    return Source(path, found.page, found.file, found.step, found.sha256)


def open_origin(config: RunConfig) -> Path:
    """The verified checkpoint, or file of weights, that the config's run begins from.

    UserError when it is gone (with what is there), is another than the run was made for, or does not fit it.
    """
    origin = config.origin
    assert origin is not None
    where = Path(origin.run)
    if is_export(where):
        source = of_export(where, "origin.run")
    else:
        source = of_checkpoint(where, _checkpoint(where, origin))
    if source.sha256 != origin.sha256:
        raise UserError(
            f"origin: {source.path} is no longer what this run began from (sha256 {source.sha256[:12]}…, "
            f"then {origin.sha256[:12]}…)",
            "put it back from a copy, or begin again with another name=…",
        )
    refuse_changes(config_of(source.page), config)
    return source.path


def config_of(page: Path) -> RunConfig:
    """The config that a run or an export has written down; UserError if it is none of this version."""
    try:
        return typed(read_yaml(page))
    except UserError as error:
        raise UserError(f"{page} is not a config of this version:", *error.lines) from None


def refuse_changes(source: RunConfig, config: RunConfig) -> None:
    """UserError, with the differences, when the config changes what its origin does not allow to change."""
    assert config.origin is not None
    kept = KEPT[config.origin.kind]
    changed = {
        key: pair
        for key, pair in differences(source, config).items()
        if key.startswith(kept) and not key.startswith("model.init.")
    }
    lines = [
        f"  {key}: {show_value(old)} there, {show_value(new)} here"
        for key, (old, new) in list(changed.items())[:3]
    ]
    more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
    if config.origin.kind == "weights" and changed:
        raise UserError(
            f"init={config.origin.run}: its weights are of another model{more}:",
            *lines,
            "leave the model as it is there: without config= it is taken from there",
        )
    if any(key.startswith("model.") for key in changed):
        raise UserError(
            f"from={config.origin.run}: a fork has the model of the run it is forked from{more}:",
            *lines,
            "change data, optim, schedule and trainer; another model is another run",
        )
    if changed:
        raise UserError(
            f"from={config.origin.run}: a fork keeps tokenizer, optimiser and order of the data{more}:",
            *lines,
            f"init={config.origin.run} begins a run from its weights alone, where these may change",
        )
    _refuse_batch(source, config)


def _refuse_batch(source: RunConfig, config: RunConfig) -> None:
    """Another global batch is fine where the run is counted in steps: tokens so far are no multiple of it."""
    trainer, counted = config.trainer, config.schedule.unit == "steps"
    if batches(trainer) == batches(source.trainer):
        return
    if any(phase.from_step for phase in getattr(config.data, "phases", None) or ()):
        raise UserError(
            "data.phases: a fork that changes trainer.global_batch counts them in tokens",
            "set from_tokens in place of from_step",
        )
    if trainer.max_steps is not None and counted:
        return
    raise UserError(
        f"trainer.global_batch: {source.trainer.global_batch} there, {trainer.global_batch} here: a fork "
        "that changes it counts in steps",
        "set trainer.max_steps=… and schedule.unit=steps",
    )


def _checkpoint(folder: Path, origin: Origin) -> Path:
    path = folder / "checkpoints" / store.step_name(origin.step)
    if path in _verified:
        return path
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"origin: this run began from {origin.run} at step {origin.step:,} and has saved nothing since, "
            "but that run is gone"
        )
    return choose(folder, Reference(origin.run, step=origin.step), "from", lambda line: None)


def _digest(checkpoint: Path) -> str:
    return hashlib.sha256((checkpoint / store.MANIFEST).read_bytes()).hexdigest()

"""What a recipe or a run will need of this machine: room for its next checkpoint, memory, quick paths."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmtrain.checkpoint import store
from ssmtrain.checkpoint.runs import locate
from ssmtrain.config.errors import UserError
from ssmtrain.config.load import load, load_run_config
from ssmtrain.data.tokenizer import vocab_rows
from ssmtrain.model.count import count
from ssmtrain.model.show import human_bytes

if TYPE_CHECKING:
    from ssmtrain.config.schema import RunConfig


def needs(words: dict[str, str], overrides: list[str]) -> dict[str, Any]:
    """The needs of config= or run= as plain data; UserError where the line names no such thing."""
    if len(words) > 1:
        raise UserError("doctor takes one run= or one config=, not both")
    if "run" in words:
        config = load_run_config(words["run"], overrides)
    else:
        config = load([f"config={words['config']}", *overrides])
    folder = locate(config)[1]
    counts = count(config, vocab_rows(config))
    saved = store.checkpoints(folder / "checkpoints")
    size = counts.training.weights + counts.training.optimizer
    if saved:
        size = max(size, sum(file.stat().st_size for file in saved[-1].iterdir()))
    return {
        "folder": str(folder),
        "checkpoint_bytes": size,
        "checkpoints_kept": config.trainer.keep_last,
        "checkpoints_there": len(saved),
        "free_bytes": shutil.disk_usage(_existing(folder)).free,
        "training_bytes": counts.training.total,
        "shared": config.parallel.kind not in ("auto", "ddp"),
        "settings": _settings(config),
    }


def advice(found: dict[str, Any], gpus: list[dict[str, Any]], compilers: dict[str, str | None]) -> list[str]:
    """What would stop the run or slow it down here, and what would mend it."""
    lines = []
    size, free, settings = found["checkpoint_bytes"], found["free_bytes"], found["settings"]
    missing = max(1, found["checkpoints_kept"] + 1 - found["checkpoints_there"])
    if free < size:
        lines.append(
            f"the next checkpoint takes {human_bytes(size)}, {human_bytes(free)} are free for "
            f"{found['folder']}: free some, or set runs_dir=…"
        )
    elif free < missing * size:
        lines.append(
            f"{missing} checkpoints are still to come beside each other, {human_bytes(missing * size)}; "
            f"{human_bytes(free)} are free for {found['folder']}: free some, or lower trainer.keep_last"
        )
    least = min((gpu["memory_bytes"] for gpu in gpus), default=None)
    if least is not None and not found["shared"] and found["training_bytes"] > least:
        lines.append(
            f"training takes about {human_bytes(found['training_bytes'])} a device, a GPU here has "
            f"{human_bytes(least)}: set trainer.micro_batch=1, trainer.recompute=block or parallel=fsdp"
        )
    if gpus and settings["precision"] == "fp32" and all(gpu["bf16"] for gpu in gpus):
        lines.append("trainer.precision=fp32 on a GPU is several times slower than bf16 (another run)")
    if settings["kernels"] == "reference" and gpus:
        lines.append(
            "trainer.kernels=reference is many times slower than Triton's on a GPU: leave it at auto"
        )
    if settings["precision"] == "bf16" and not gpus:
        lines.append("trainer.precision=bf16 is slower than fp32 on most CPUs")
    if settings["compile"] and compilers["cxx" if not gpus else "cc"] is None:
        lines.append("trainer.compile=true finds no compiler: apt-get install g++, or leave it out")
    return lines


def describe(found: dict[str, Any]) -> list[str]:
    """The needs as lines."""
    size, free = human_bytes(found["checkpoint_bytes"]), human_bytes(found["free_bytes"])
    kept = f"{found['checkpoints_there']} there, keep_last {found['checkpoints_kept']}"
    return [
        f"next checkpoint: {size} of {free} free for {found['folder']} ({kept})",
        f"training: about {human_bytes(found['training_bytes'])} a device before it is shared out",
    ]


def _settings(config: RunConfig) -> dict[str, Any]:
    trainer = config.trainer
    return {"precision": trainer.precision, "kernels": trainer.kernels, "compile": trainer.compile}


def _existing(folder: Path) -> Path:
    """The folder, or the closest one above it that is there."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return place

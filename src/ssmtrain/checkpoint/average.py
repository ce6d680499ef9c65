"""The verb average: several checkpoints' weights merged into one, under a folder that reads as a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmtrain.checkpoint import store
from ssmtrain.checkpoint.origins import Source, config_of, of_checkpoint
from ssmtrain.checkpoint.records import write_config
from ssmtrain.checkpoint.runs import open_run
from ssmtrain.checkpoint.weights import saved_weights
from ssmtrain.config.errors import FINISHED, UserError
from ssmtrain.config.expect import show_value
from ssmtrain.config.identity import differences
from ssmtrain.config.request import Request

EXAMPLE = "ssmtrain average run=<run> last=3 out=<folder>"


def command(request: Request) -> int:
    """`ssmtrain average <checkpoint> <checkpoint> … out=<folder>`: merge, write, say what to type next."""
    words = request.words
    if "out" not in words:
        raise UserError("average needs out=<folder>", f"as in: {EXAMPLE}")
    out = Path(words["out"]).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={out} exists already", "give another out=…, or delete it first")
    sources = _sources(request.overrides, words)
    shares = _shares(words.get("weights"), len(sources))
    refuse_strangers(sources)
    made = write(out, sources, shares)
    for source, share in zip(sources, shares, strict=True):
        print(f"{share:.4f}  {source.path}")
    print(f"averaged {len(sources)} checkpoints into {made}")
    print(f"  ssmtrain eval run={out}")
    print(f"  ssmtrain fit init={out} …   (weights alone; from={out} keeps step and place in the data too)")
    return FINISHED


def average(checkpoints: Sequence[Path], shares: Sequence[float]) -> dict[str, Tensor]:
    """The weighted sum of checkpoints' parameters and buffers, added in float64, in the types they had.

    What is not floating point comes from the first and must be the same in all. UserError when names or
    shapes differ.
    """
    sums: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for path, share in zip(checkpoints, shares, strict=True):
        tensors = saved_weights(path)
        dtypes = dtypes or {name: tensor.dtype for name, tensor in tensors.items()}
        shapes = {name: tensor.shape for name, tensor in (sums or tensors).items()}
        wrong = sorted(name for name, tensor in tensors.items() if shapes.get(name) != tensor.shape)
        wrong += sorted(dtypes.keys() - tensors.keys())
        if wrong:
            raise UserError(
                f"{path} does not go with {checkpoints[0]}: other shapes, or missing: {', '.join(wrong[:5])}"
            )
        _add(sums, tensors, share, path)
    return {name: tensor.to(dtypes[name]) for name, tensor in sums.items()}


def _add(sums: dict[str, Tensor], tensors: Mapping[str, Tensor], share: float, path: Path) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            part = tensor.double().mul_(share)
            sums[name] = sums[name].add_(part) if name in sums else part
        elif not torch.equal(sums.setdefault(name, tensor), tensor):
            raise UserError(f"{path}: {name} is not a number to average and differs between the checkpoints")


def write(out: Path, sources: Sequence[Source], shares: Sequence[float]) -> Path:
    """Publish the average in `out` and return its checkpoint.

    Step, tokens and place in the data are those of the latest source, whose config stands beside it: written
    last, so that a half-made folder is no run.
    """
    latest = max(sources, key=lambda source: source.step)
    tensors = average([source.path for source in sources], shares)
    state: dict[str, Any] = store.load_state(latest.path)
    parts = [
        {"path": str(source.path), "sha256": source.sha256, "share": share}
        for source, share in zip(sources, shares, strict=True)
    ]
    state |= {"ema": False, "weights_only": True, "average": parts}
    try:
        made = store.save(out / "checkpoints", latest.step, {"model": tensors}, state)
        config = config_of(latest.page).model_copy(update={"name": None, "origin": None})
        write_config(out, config)
    except (store.SaveFailed, OSError) as error:
        raise UserError(f"out={out}: {error}", "give another out=…") from None
    return made


def refuse_strangers(sources: Sequence[Source]) -> None:
    """UserError, with the difference, unless all are of one model and tokenizer, and none is given twice."""
    first = config_of(sources[0].page)
    for source in sources[1:]:
        changed = differences(first, config_of(source.page))
        for key, (one, other) in changed.items():
            if key.startswith(("model.", "tokenizer.")) and not key.startswith("model.init."):
                raise UserError(
                    f"{source.path} is of another model than {sources[0].path}:",
                    f"  {key}: {show_value(one)} there, {show_value(other)} here",
                )
    paths = [source.path.resolve() for source in sources]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise UserError(f"{twice} is given twice; to let it count more, give weights=…")


def _sources(overrides: Sequence[str], words: Mapping[str, str]) -> list[Source]:
    named = [word for word in overrides if not word.startswith("runs_dir=")]
    runs_dir = next((word.partition("=")[2] for word in overrides if word not in named), "runs")
    if ("run" in words) != ("last" in words) or ("run" in words and named):
        raise UserError("average takes checkpoints, or run= with last=", f"as in: {EXAMPLE}")
    if "run" in words:
        return _last(words["run"], words["last"], runs_dir)
    if len(named) < 2:
        raise UserError(
            "average takes at least two checkpoints: folders, <run>@step-<number> or <run>@best",
            f"as in: ssmtrain average first@step-400 first@step-600 out=<folder>, or: {EXAMPLE}",
        )
    found = []
    for text in named:
        run = open_run(text, runs_dir, "checkpoint")
        assert run.checkpoint is not None
        if run.checkpoint.is_file():
            raise UserError(f"{text} is an export: average takes checkpoints of runs")
        found.append(of_checkpoint(run.folder, run.checkpoint))
    return found


def _last(where: str, text: str, runs_dir: str) -> list[Source]:
    """The newest good checkpoints of a run."""
    if not text.isdigit() or int(text) < 2:
        raise UserError(f"last={text}: expected how many checkpoints, at least 2")
    run = open_run(where, runs_dir)
    paths = [path for path in store.checkpoints(run.checkpoints) if not store.verify(path)]
    if len(paths) < int(text):
        raise UserError(
            f"last={text}: {where} has {len(paths)} good checkpoints",
            "trainer.keep_last and trainer.keep_every say how many a run keeps",
        )
    return [of_checkpoint(run.folder, path) for path in paths[-int(text) :]]


def _shares(text: str | None, count: int) -> list[float]:
    """Each checkpoint's share, together 1."""
    if text is None:
        return [1.0 / count] * count
    try:
        numbers = [float(part) for part in text.strip("[]()").split(",")]
    except ValueError:
        numbers = []
    fit = len(numbers) == count and all(math.isfinite(n) and n >= 0 for n in numbers)
    if not fit or not (total := math.fsum(numbers)):
        raise UserError(
            f"weights={text}: expected {count} numbers from 0 up, one for each checkpoint, as in "
            f"weights={','.join('1' * count)}"
        )
    return [number / total for number in numbers]

"""The verb convert: a checkpoint's weights as one safetensors file with its config."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ssmtrain.checkpoint import store
from ssmtrain.checkpoint.exported import write_export
from ssmtrain.checkpoint.runs import open_run
from ssmtrain.checkpoint.weights import saved_weights, wants_ema
from ssmtrain.config.errors import FINISHED, UserError
from ssmtrain.config.load import to_yaml
from ssmtrain.config.request import Request


def command(request: Request) -> int:
    """`ssmtrain convert run=<run>[@step-N] out=<folder or file.safetensors>`."""
    if "out" not in request.words:
        raise UserError(
            "convert needs out=<folder> or out=<file>.safetensors",
            f"as in: ssmtrain convert run={request.run} out=exported",
        )
    others = [word for word in request.overrides if not word.startswith("runs_dir=")]
    if others:
        raise UserError(f"{others[0]}: convert changes nothing of what it writes; leave it out")
    runs_dir = next((word.partition("=")[2] for word in request.overrides), "runs")
    run = open_run(request.run or "", runs_dir)
    assert run.checkpoint is not None
    ema = wants_ema(request.words)
    if run.checkpoint.is_file():
        raise UserError(f"run={request.run} is an export already")
    tensors = saved_weights(run.checkpoint, ema)
    state = store.load_state(run.checkpoint)
    manifest = (run.checkpoint / store.MANIFEST).read_bytes()
    config = run.config.model_copy(update={"name": None, "resume": "auto"})
    note = {
        "step": run.step,
        "tokens": state.get("tokens"),
        "weights": "ema" if ema else "trained",
        "run": run.name,
        "checkpoint": hashlib.sha256(manifest).hexdigest(),
    }
    out = Path(request.words["out"]).expanduser()
    try:
        made = write_export(out, tensors, to_yaml(config), note)
    except OSError as error:
        raise UserError(f"out={out}: {error.strerror or error}", "give another out=…") from None
    numbers = sum(tensor.numel() for tensor in tensors.values())
    print(f"{made.file}: {len(tensors)} tensors, {numbers:,} numbers, of step {run.step:,} of {run.folder}")
    print(f"{made.page}: the config")
    print(f"  ssmtrain fit init={out} data=text data.train=path/to/texts")
    return FINISHED

"""What a checkpoint holds of a run, taken from a LitLM and put back bit for bit."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import ssmtrain
from ssmtrain.checkpoint import store
from ssmtrain.checkpoint.weights import refuse_nonfinite
from ssmtrain.config.errors import UserError
from ssmtrain.parallel import ranks
from ssmtrain.parallel.shard import whole
from ssmtrain.train import optim
from ssmtrain.train.state import RunState, rng_tensors, seed_generators, set_rng_tensors

if TYPE_CHECKING:
    from ssmtrain.train.module import LitLM

Tensors = dict[str, dict[str, Tensor]]


def take(lit: LitLM) -> tuple[Tensors, dict[str, Any]]:
    """Tensors by shard and JSON state of this moment; every rank must call it, rank 0's result is saved."""
    named = dict(lit.model.named_parameters())
    generators: dict[str, Tensor] = {}
    for key, mine in rng_tensors(lit.device).items():
        for rank, theirs in enumerate(ranks.gather(_on_group_device(mine, lit.device))):
            generators[f"rank{rank}/{key}"] = theirs.cpu()
    tensors = {
        "model": whole(lit.model.state_dict()),
        "optim": whole(optim.state_tensors(lit.opt, named)),
        "rng": generators,
    }
    state = {
        "step": lit.state.step,
        "tokens": lit.state.tokens,
        "run": lit.state.as_dict(),
        "text": fingerprint(lit),
        "world": ranks.world(),
        "versions": {
            "ssmtrain": ssmtrain.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    return tensors, state


def fingerprint(lit: LitLM) -> dict[str, Any]:
    """What the rows are made of: a run only continues on the same text and tokenizer."""
    train = lit.text.meta["train"]
    return {"sha256": train["sha256"], "tokens": train["tokens"], "rows": train["rows"]}


def restore(lit: LitLM, checkpoint: Path) -> RunState:
    """Put optimiser and generators back and return the counters; UserError when the text is another one."""
    state = store.load_state(checkpoint)
    text, now = state.get("text"), fingerprint(lit)
    saved = text if isinstance(text, dict) else {}
    if saved != now:
        changed = [
            f"  {key}: {saved.get(key)} then, {now[key]} now" for key in now if saved.get(key) != now[key]
        ]
        raise UserError("data: the text or the tokenizer has changed since the run started", *changed)
    named = dict(lit.model.named_parameters())
    moments = store.load_tensors(checkpoint, "optim")
    if not lit.config.trainer.load_nonfinite:
        refuse_nonfinite(checkpoint, moments)
    run = _counters(checkpoint, state)
    try:
        optim.load_state_tensors(lit.opt, named, moments)
        if not moments and run.step > run.nonfinite:
            raise ValueError("it holds no optimizer state, which training cannot continue without")
    except ValueError as error:
        raise UserError(
            f"{checkpoint}: {error}", "take another checkpoint with resume=<its folder>"
        ) from None
    mine = f"rank{ranks.rank()}/"
    generators = {
        key.removeprefix(mine): value
        for key, value in store.load_tensors(checkpoint, "rng").items()
        if key.startswith(mine)
    }
    if generators:
        try:
            set_rng_tensors(generators, lit.device)
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            said = f"the random states of rank {ranks.rank()} in rng.safetensors cannot be used: {error}"
            raise store.Damaged(checkpoint, [said.splitlines()[0]]) from None
    else:
        seed_generators(lit.config.seed, ranks.rank(), run.step)
    return run


def _counters(checkpoint: Path, state: dict[str, Any]) -> RunState:
    """The run's counters, of this checkpoint's step; Damaged when they are not what `take` writes."""
    try:
        run = RunState.from_dict(state.get("run") or {})
    except ValueError as error:
        raise store.Damaged(checkpoint, [f"state.json: {error}"]) from None
    if run.step != store.step_of(checkpoint):
        raise store.Damaged(checkpoint, [f"state.json is of step {run.step}"])
    return run


def _on_group_device(tensor: Tensor, device: torch.device) -> Tensor:
    # NCCL gathers only what lies on its GPU; without a group nothing is gathered.
    return tensor.to(device) if ranks.active() else tensor

"""What a checkpoint holds of a run, taken from a LitLM and put back bit for bit."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ssmtrain.checkpoint import store
from ssmtrain.checkpoint.parts import Part
from ssmtrain.checkpoint.weights import refuse_nonfinite
from ssmtrain.config.errors import UserError
from ssmtrain.config.mixing import past
from ssmtrain.parallel import ranks
from ssmtrain.parallel.shard import Scattered, mine, rows_of, tensors_of, to_write
from ssmtrain.train.environment import changes, environment
from ssmtrain.train.state import RunState, rng_tensors, seed_generators, set_rng_tensors

if TYPE_CHECKING:
    from ssmtrain.train.module import LitLM

log = logging.getLogger(__name__)

Shares = dict[str, dict[str, Part]]


def take(lit: LitLM) -> tuple[Shares, dict[str, Any]]:
    """What this rank writes of this moment, by kind of tensors, and the JSON state.

    The tensors are the run's own: before it goes on, they are to be written or copied.
    """
    prefix = f"rank{ranks.rank()}/"
    shares = {
        "model": _parts(tensors_of(lit.model)),
        "optim": _parts(lit.engine.states()),
        "rng": {prefix + key: Part(tensor) for key, tensor in rng_tensors(lit.device).items()},
    }
    averages = lit.ema.tensors() if lit.ema is not None else {}
    if averages:
        shares["ema"] = _parts(averages)
    state = {
        "step": lit.state.step,
        "tokens": lit.state.tokens,
        "run": lit.state.as_dict(),
        "text": fingerprint(lit),
        "mixture": lit.text.plan,
        "ema": bool(averages),
        "seq_len": lit.config.data.seq_len,
        "tokenizer": lit.text.tokenizer,
        "world": ranks.world(),
        "versions": environment(lit.device),
    }
    return shares, state


def _parts(tensors: Mapping[str, Tensor | Scattered]) -> dict[str, Part]:
    return {name: Part(mine(tensor), *(rows_of(tensor) or ())) for name, tensor in to_write(tensors).items()}


def fingerprint(lit: LitLM) -> dict[str, Any]:
    """What the rows are made of: a run only continues on the same text and tokenizer."""
    train = lit.text.meta["train"]
    return {"sha256": train["sha256"], "tokens": train["tokens"], "rows": train["rows"]}


def restore(lit: LitLM, checkpoint: Path) -> RunState:
    """Put optimiser and generators back and return the counters; UserError when the text is another one."""
    state = store.load_state(checkpoint)
    _refuse_other_data(lit, checkpoint, state)
    if state.get("weights_only"):
        raise UserError(
            f"{checkpoint} has weights alone, so no run can be resumed from it",
            "start one from it with from=<folder>, or with init=<folder> at step 0",
        )
    run = _counters(checkpoint, state)
    _follow_mixture(lit, checkpoint, state, run)
    _load_optimizers(lit, checkpoint, run)
    _load_averages(lit, checkpoint, state)
    _load_generators(lit, checkpoint, run.step)
    changed = changes(state.get("versions"), environment(lit.device))
    if changed:
        log.info("other than when step %s was saved: %s", f"{run.step:,}", "; ".join(changed))
        log.info("the same tokens follow in the same order; the last bits of the loss may differ")
        lit.journal.write("environment", run.step, changes=changed)
    return run


def _refuse_other_data(lit: LitLM, checkpoint: Path, state: dict[str, Any]) -> None:
    """UserError, with what to do, when the rows are not those that the run was trained on."""
    ways = "put the former file back, or start another run with name=…"
    fork = f"; go on with the new text in a fork: ssmtrain fit from={checkpoint.parents[1]} name=…"
    tokenizer = lit.text.tokenizer
    if state.get("tokenizer", tokenizer) != tokenizer:
        raise UserError("tokenizer: its content has changed since the run started", ways)
    text, now = state.get("text"), fingerprint(lit)
    saved = text if isinstance(text, dict) else {}
    if saved != now:
        changed = [
            f"  {key}: {saved.get(key)} then, {now[key]} now" for key in now if saved.get(key) != now[key]
        ]
        raise UserError(
            "data: the text or the tokenizer has changed since the run started", *changed, ways + fork
        )


def _follow_mixture(lit: LitLM, checkpoint: Path, state: dict[str, Any], run: RunState) -> None:
    """Note phases that have changed since; UserError when one has changed that has begun."""
    was, now = state.get("mixture") or [], lit.text.plan
    if past(was, run.rows) != past(now, run.rows):
        raise UserError(
            f"data: the mixture has changed for rows before row {run.rows:,}, which {checkpoint} has seen",
            "only phases that have not begun may change",
        )
    if was != now:
        lit.journal.write("mixture", run.step, was=was, now=now)


def begin(lit: LitLM, checkpoint: Path) -> RunState:
    """What a fork keeps of another run's checkpoint: optimiser, generators, step and place in the data.

    On another text the rows begin at the first; what the other run counted of itself is left to it.
    UserError when the tokenizer's content has changed.
    """
    state = store.load_state(checkpoint)
    run = _counters(checkpoint, state)
    run = replace(run, nonfinite=0, seconds=0.0, best_val=None, best_step=None, save_failures=0)
    tokenizer = lit.text.tokenizer
    if state.get("tokenizer", tokenizer) != tokenizer:
        raise UserError("tokenizer: its content has changed since the run forked from was trained")
    same = state.get("text") == fingerprint(lit) and state.get("seq_len") == lit.config.data.seq_len
    same = same and past(state.get("mixture") or [], run.rows) == past(lit.text.plan, run.rows)
    if not same:
        log.info("the data is not that of the run forked from: it is read from its beginning")
        run.rows = 0
    if state.get("weights_only"):
        log.info("%s has weights alone: the optimiser begins anew", checkpoint)
        seed_generators(lit.config.seed, ranks.rank(), run.step)
    else:
        _load_optimizers(lit, checkpoint, run)
        _load_averages(lit, checkpoint, state)
        _load_generators(lit, checkpoint, run.step)
    data = "kept" if same else "from its beginning"
    lit.journal.write("fork", run.step, path=str(checkpoint), data=data, rows=run.rows, tokens=run.tokens)
    return run


def _load_optimizers(lit: LitLM, checkpoint: Path, run: RunState) -> None:
    named = dict(lit.model.named_parameters())
    moments = store.load_tensors(checkpoint, "optim")
    if not lit.config.trainer.load_nonfinite:
        refuse_nonfinite(checkpoint, moments)
    try:
        lit.engine.load(named, moments)
        if not moments and run.step > run.nonfinite:
            raise ValueError("it holds no optimizer state, which training cannot continue without")
    except ValueError as error:
        raise UserError(
            f"{checkpoint}: {error}", "take another checkpoint with resume=<its folder>"
        ) from None


def _load_averages(lit: LitLM, checkpoint: Path, state: dict[str, Any]) -> None:
    """The moving average, where there is one to go on with; otherwise it begins where it is said to."""
    if lit.ema is None or not state.get("ema"):
        return
    try:
        lit.ema.load(store.load_tensors(checkpoint, "ema"))
    except ValueError as error:
        raise UserError(f"{checkpoint}: {error}") from None


def _load_generators(lit: LitLM, checkpoint: Path, step: int) -> None:
    """This rank's generators; a rank that the checkpoint does not know is seeded."""
    prefix = f"rank{ranks.rank()}/"
    generators = {
        key.removeprefix(prefix): value
        for key, value in store.load_tensors(checkpoint, "rng").items()
        if key.startswith(prefix)
    }
    if generators:
        try:
            set_rng_tensors(generators, lit.device)
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            said = f"the random states of rank {ranks.rank()} in rng.safetensors cannot be used: {error}"
            raise store.Damaged(checkpoint, [said.splitlines()[0]]) from None
    else:
        seed_generators(lit.config.seed, ranks.rank(), step)


def _counters(checkpoint: Path, state: dict[str, Any]) -> RunState:
    """The run's counters, of this checkpoint's step; Damaged when they are not what `take` writes."""
    try:
        run = RunState.from_dict(state.get("run") or {})
    except ValueError as error:
        raise store.Damaged(checkpoint, [f"state.json: {error}"]) from None
    if run.step != store.step_of(checkpoint):
        raise store.Damaged(checkpoint, [f"state.json is of step {run.step}"])
    return run

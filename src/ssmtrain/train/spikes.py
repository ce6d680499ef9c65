"""Steps whose loss or gradient leaps: told from the steps before, left out, or gone back from.

Which steps those are follows from what is saved with every checkpoint, so a run that is killed and resumed
leaves out the same ones. The test of six standard deviations over 128 steps is that of allenai/OLMo-core.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ssmtrain.checkpoint.weights import saved_weights
from ssmtrain.config.errors import NonFinite
from ssmtrain.config.trainer import SpikeConfig
from ssmtrain.parallel.shard import cut_again, like, mine
from ssmtrain.train import snapshot
from ssmtrain.train.ema import Ema
from ssmtrain.train.state import RunState

if TYPE_CHECKING:
    from ssmtrain.train.module import LitLM


def leap(config: SpikeConfig | None, state: RunState, loss: float, norm: float) -> str | None:
    """What is unusual of a step, in words; None where nothing is, or too few steps say what is usual."""
    if config is None or len(state.recent_losses) < max(2, config.window // 2):
        return None
    for what, value, recent in (("loss", loss, state.recent_losses), ("gradient", norm, state.recent_norms)):
        mean, deviation = _usual(recent)
        if value > mean + config.sigma * deviation:
            far = (value - mean) / deviation if deviation else math.inf
            return f"the {what} of {value:.4g} is {far:.1f} standard deviations above {mean:.4g}, its mean"
    return None


def note(config: SpikeConfig | None, state: RunState, loss: float, norm: float) -> None:
    """Count a step that was taken among those that say what is usual."""
    if config is not None:
        state.recent_losses = [*state.recent_losses, loss][-config.window :]
        state.recent_norms = [*state.recent_norms, norm][-config.window :]
        state.spikes_row = 0


def _usual(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation."""
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def leave_out(lit: LitLM, why: str) -> bool:
    """Deal with a leap: False when the step is left out, True when the run went back instead.

    NonFinite after as many in a row as trainer.max_nonfinite allows, or where going back was of no use.
    """
    state, config = lit.state, lit.config.trainer.spikes
    assert config is not None
    if config.action == "rollback" and go_back(lit, why):
        return True
    state.spikes += 1
    state.spikes_row += 1
    limit = lit.config.trainer.max_nonfinite
    row = f"{state.spikes_row} in a row, {limit} stop the run"
    lit.journal.write("spike", state.step + 1, why=why, row=row)
    if state.spikes_row >= limit:
        raise NonFinite(
            f"{state.spikes_row} steps in a row were left out, up to step {state.step + 1}: {why}",
            "lower optim.lr, or raise trainer.spikes.sigma; the last checkpoint is good",
        )
    return False


def go_back(lit: LitLM, why: str) -> bool:
    """Put the last checkpoint back and leave out all rows that were read since; False without a checkpoint.

    NonFinite where the run went back as often as trainer.spikes.rollbacks allows since its last save.
    """
    state, config = lit.state, lit.config.trainer.spikes
    assert config is not None
    checkpoint = lit.newest_checkpoint()
    if checkpoint is None:
        return False
    at, rows = state.step + 1, state.rows + lit.config.trainer.global_batch // lit.config.data.seq_len
    again = state.rollbacks_row + 1
    if again > config.rollbacks:
        raise NonFinite(
            f"step {at}: {why}",
            f"the run went back to {checkpoint.name} {config.rollbacks} times, and no step was saved since",
            "lower optim.lr, raise trainer.spikes.sigma, or look at the data; the last checkpoint is good",
        )
    total, nonfinite = state.rollbacks + 1, state.nonfinite
    lit.engine.clear()
    lit.state = _put_back(lit, checkpoint)
    left_out = rows - lit.state.rows
    lit.state.rows, lit.state.rollbacks, lit.state.rollbacks_row = rows, total, again
    lit.state.nonfinite = nonfinite
    for turn in lit.on_back:
        turn(lit.state.step)
    lit.journal.write(
        "rollback", lit.state.step + 1, why=why, after=at, to=checkpoint.name, rows_left_out=left_out
    )
    return True


def _put_back(lit: LitLM, checkpoint: Path) -> RunState:
    saved = saved_weights(checkpoint)
    cut_again(lit.model)
    with torch.no_grad():
        for name, tensor in lit.model.state_dict().items():
            mine(tensor).copy_(mine(like(saved[name], tensor)))
    if lit.ema is not None:
        lit.ema = Ema(lit.ema.config, dict(lit.model.named_parameters()))
    state = snapshot.restore(lit, checkpoint)
    if lit.ema is not None:
        lit.ema.begin(state.step)
    return state

"""How many rows a device can take at a time: tried before the first step, and kept for the run's life.

The number is part of the checkpoint: with another the sums are rounded otherwise, so a resumed run keeps it.
"""

from __future__ import annotations

import gc
import logging
from typing import TYPE_CHECKING

import torch

from ssmtrain.parallel import ranks
from ssmtrain.train import optim
from ssmtrain.train.state import forked_rng

if TYPE_CHECKING:
    from ssmtrain.train.module import LitLM

log = logging.getLogger(__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device, or the host, has no memory left."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return "can't allocate memory" in str(error) or "CUDA out of memory" in str(error)


def rows_at_once(lit: LitLM) -> int:
    """As many of a rank's rows as the forward and backward passes of every rank find memory for.

    The number of the checkpoint, or all rows, halved for as long as memory runs out; the error that says so
    when one row alone is too much.
    """
    world = ranks.world()
    mine = lit.config.trainer.global_batch // lit.config.data.seq_len // world
    known = lit.state.micro_batch
    rows = first = min(known or mine, mine)
    with forked_rng(lit.device):
        while not _fits(lit, rows):
            rows = -(-rows // 2)
    # The ranks' devices are alike, but what else runs on them may not be.
    rows = min(int(n) for n in ranks.gather(torch.tensor([rows], device=lit.device)))
    if known is None or rows < first:
        lit.journal.write("micro_batch", lit.state.step, rows=rows, of=mine)
    if known is not None and rows < known:
        log.warning("memory is found for %d rows at a time, not %d as before: last bits differ", rows, known)
    return rows


def _fits(lit: LitLM, rows: int) -> bool:
    """Whether a pass over so many rows finds memory beside what the optimisers will hold."""
    begin = lit.state.rows + lit.shares()[0].start
    try:
        held = _reserve(lit)
        batch = lit.text.train.batch(range(begin, begin + rows))
        with lit.engine.micro_batch(last=False):
            lit.run_passes(batch, 1.0 / (rows * lit.config.data.seq_len), 1.0)
        del held
        return True
    except (MemoryError, RuntimeError) as error:
        if rows == 1 or not is_out_of_memory(error):
            raise
        return False
    finally:
        lit.engine.clear()
        gc.collect()
        if lit.device.type == "cuda":
            torch.cuda.empty_cache()


def _reserve(lit: LitLM) -> torch.Tensor:
    """Memory for optimiser states that the first step will make; of a run that goes on they are there."""
    if lit.engine.states():
        return torch.empty(0)
    size = optim.state_bytes(dict(lit.model.named_parameters()), lit.config.optim)
    return torch.empty(size, dtype=torch.uint8, device=lit.device)

"""ledger.jsonl: the exact bits of every step, for proofs that a resumed run equals an unbroken one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from ssmtrain.parallel import ranks
from ssmtrain.train.journal import JsonLines
from ssmtrain.train.module import LitLM

VARIABLE = "SSMTRAIN_LEDGER"


def wanted() -> bool:
    """Whether the environment asks for a ledger."""
    return os.environ.get(VARIABLE) == "1"


class Ledger(Callback):
    """Writes step, loss_hex, grad_norm_hex, samples, tokens after each step; rows of all ranks, in order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: JsonLines | None = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Gather the step's rows and append its line."""
        lit: LitLM = pl_module
        assert lit.last is not None
        mine = torch.tensor(lit.last.samples, dtype=torch.int64, device=lit.device)
        samples = torch.cat(ranks.gather(mine)).tolist()
        if ranks.rank():
            return
        self.file = self.file or JsonLines(self.path)
        self.file.write(
            {
                "step": lit.state.step,
                "loss_hex": lit.last.loss.hex(),
                "grad_norm_hex": lit.last.grad_norm.hex(),
                "samples": samples,
                "tokens": lit.state.tokens,
            }
        )

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Close the file."""
        if self.file:
            self.file.close()

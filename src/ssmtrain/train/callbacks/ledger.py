"""ledger.jsonl: the exact bits of every step, for proofs that a resumed run equals an unbroken one."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

from ssmtrain.parallel import ranks
from ssmtrain.parallel.shard import mine
from ssmtrain.train.journal import JsonLines
from ssmtrain.train.module import LitLM

VARIABLE = "SSMTRAIN_LEDGER"


def wanted() -> bool:
    """Whether the environment asks for a ledger."""
    return os.environ.get(VARIABLE) == "1"


class Ledger(Callback):
    """Writes step, loss_hex, grad_norm_hex, samples, tokens, params after each step.

    Samples are the rows of all ranks, in order; params has a hash of each rank's weights, replicas' the same.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: JsonLines | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Follow a run that goes back."""
        pl_module.on_back.append(self._cut)

    def _cut(self, step: int) -> None:
        if self.file:
            self.file.cut(step)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Gather the step's rows and append its line."""
        lit: LitLM = pl_module
        assert lit.last is not None
        rows = torch.tensor(lit.last.samples, dtype=torch.int64, device=lit.device)
        samples = torch.cat(ranks.gather(rows)).tolist()
        params = ranks.texts(digest({**lit.model.state_dict(), **dict(lit.model.named_parameters())}))
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
                "params": params,
            }
        )

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Close the file."""
        if self.file:
            self.file.close()


def digest(tensors: dict[str, Tensor]) -> str:
    """Sixteen hex digits of the bytes of tensors, of a cut one this rank's rows, in order of their names."""
    found = hashlib.blake2b(digest_size=8)
    for name in sorted(tensors):
        flat = mine(tensors[name]).detach().cpu().contiguous().reshape(-1)
        found.update(name.encode())
        if flat.numel():
            found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()

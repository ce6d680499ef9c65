"""The moving average of the weights, taken after each step and before anything is scored or saved."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback

from ssmtrain.train.module import LitLM


class Averaging(Callback):
    """Lets the average take in the weights of each step."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Update the average, or begin it."""
        lit: LitLM = pl_module
        assert lit.ema is not None and lit.last is not None
        lit.ema.update(lit.state.step, lit.last.skipped)

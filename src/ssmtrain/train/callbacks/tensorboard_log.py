"""Records to TensorBoard event files, whose library is imported here only."""

from __future__ import annotations

from pathlib import Path

from ssmtrain.config.errors import UserError
from ssmtrain.train.callbacks.wandb_log import flat
from ssmtrain.train.journal import Record


class TensorBoardSink:
    """Writes figures as `kind/name` scalars and samples as text."""

    def __init__(self, folder: Path, step: int) -> None:
        self.folder = str(folder / "tensorboard")
        self.begin(step + 1)

    def begin(self, step: int) -> None:
        """Begin a file; what others in the folder hold of `step` and later ones is dropped by the reader."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "logger.kind: tensorboard is not installed", "pip install 'ssmtrain[tensorboard]'"
            ) from None
        self.writer = SummaryWriter(self.folder, purge_step=step)

    def write(self, record: Record) -> None:
        """Write one record; where the run went back, the steps that are taken again are shown once."""
        if record["kind"] == "rollback":
            self.writer.close()
            self.begin(record["step"])
        for name, value in flat(record).items():
            if isinstance(value, str):
                self.writer.add_text(name, value, record["step"])
            else:
                self.writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Flush and close the event file."""
        self.writer.close()

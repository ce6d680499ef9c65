"""What a run reads, source by source: texts with their documents, tasks with their rows."""

from __future__ import annotations

from collections.abc import Mapping

from ssmtrain.config.errors import UserError
from ssmtrain.data.batch import Samples
from ssmtrain.data.mixture import ROW_BITS, Mixture
from ssmtrain.data.module import Data, Rows
from ssmtrain.data.tasks.rows import TaskRows
from ssmtrain.data.tokenizer import Tokenizer
from ssmtrain.explain.documents import Documents

ALONE = ""
"""The name of a source that is no mixture's."""


def row_of(train: Samples, sample: int) -> tuple[str, int]:
    """The source of a sample id, and the row there."""
    if not isinstance(train, Mixture):
        return ALONE, sample
    return list(train.sources)[sample >> ROW_BITS], sample & ((1 << ROW_BITS) - 1)


class Reads:
    """The training split of each source by name, in the order in which sample ids count them."""

    def __init__(self, data: Data, tokenizer: Tokenizer) -> None:
        train = data.train
        self.mixed = isinstance(train, Mixture)
        sources: Mapping[str, Samples] = train.sources if isinstance(train, Mixture) else {ALONE: train}
        self.parts: dict[str, Documents | TaskRows] = {}
        for name, rows in sources.items():
            assert isinstance(rows, Rows | TaskRows)
            self.parts[name] = rows if isinstance(rows, TaskRows) else Documents(rows, tokenizer)
        self.names = list(self.parts)

    def id(self, name: str, row: int) -> int:
        """The sample id of a source's row."""
        return (self.names.index(name) << ROW_BITS) + row if self.mixed else row

    def chosen(self, name: str | None) -> list[str]:
        """The sources that source= names, all without it; UserError for one that is not there."""
        if name is None:
            return self.names
        if not self.mixed:
            raise UserError(f"source={name}: the run's data is no mixture", "leave it out")
        if name not in self.parts:
            raise UserError(f"source={name}: there is no such source; expected {', '.join(self.names)}")
        return [name]

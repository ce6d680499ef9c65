"""States that rows hand on: where a row of a step ended, the row of the next step in its place goes on.

Each place in a step (a slot) has one state of every mixer. Which rows go on follows from the data alone, so
states are all that a run has to keep of it: they are saved with every checkpoint, whole, whatever the number
of ranks. Documents beyond the first of a row begin from nothing, and so does every row after rows that were
not read, or read by a step that was not finite. (Dai et al. 2019, "Transformer-XL", carry keys and values.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ssmtrain.checkpoint.parts import Part
from ssmtrain.data.batch import Batch
from ssmtrain.layers.base import State
from ssmtrain.model.hybrid import HybridModel

States = list[State | None]
"""One entry per block."""


class Carry:
    """The states of some neighbouring slots, of all the `total` slots of a step."""

    def __init__(
        self, model: HybridModel, slots: range, total: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Empty states; convolution windows in `dtype`, in which the model computes."""
        self.slots, self.total, self.device = slots, total, device
        self.now: States = model.init_states(len(slots), 1, dtype, device)
        """What the rows of the step that is being taken begin with."""
        self.next: States = model.init_states(len(slots), 1, dtype, device)
        """What they have ended with, so far."""
        self.rows = 0
        """The sample number of the first row that goes on from `now`."""

    def follow(self, rows: int) -> None:
        """Forget all states unless sample number `rows` is the one that they lead to."""
        if rows != self.rows:
            for state in self.now:
                for tensor in (state or {}).values():
                    tensor.zero_()
            self.rows = rows

    def begin(self, batch: Batch) -> States:
        """What each document of a batch in host memory begins with, (n_docs, ...) for every block."""
        places, documents = self._places(batch), _documents(batch, 0)
        rows = [row for row, on in enumerate(batch.goes_on or []) if on]
        slots, first = (self._index([found[row] for row in rows]) for found in (places, documents))

        def made(tensor: Tensor) -> Tensor:
            return tensor.new_zeros(batch.n_docs, *tensor.shape[1:]).index_copy_(0, first, tensor[slots])

        return [
            None if state is None else {key: made(tensor) for key, tensor in state.items()}
            for state in self.now
        ]

    @torch.no_grad()
    def keep(self, batch: Batch, ended: Sequence[State | None]) -> None:
        """Note what the last document of each row ended with, from `ended` (n_docs, ...) for every block."""
        slots, last = self._index(self._places(batch)), self._index(_documents(batch, -1))
        for state, found in zip(self.next, ended, strict=True):
            for key, tensor in (state or {}).items():
                assert found is not None
                tensor.index_copy_(0, slots, found[key][last].to(tensor.dtype))

    def advance(self, rows: int) -> None:
        """Go on to the step whose first sample number is `rows`."""
        self.now, self.next, self.rows = self.next, self.now, rows

    def parts(self) -> dict[str, Part]:
        """What is saved, as `block/entry` -> this rank's slots."""
        return {
            f"{block}/{key}": Part(tensor, self.slots.start, self.total)
            for block, state in enumerate(self.now)
            for key, tensor in (state or {}).items()
        }

    def load(self, saved: Mapping[str, Tensor], rows: int) -> None:
        """Put back what was saved, of all slots, before sample number `rows`; ValueError when it does not
        fit."""
        own = self.parts()
        strange = sorted(own.keys() ^ saved.keys())
        if strange:
            raise ValueError(f"its carried states are of other blocks, such as {strange[0][:80]!r}")
        for name, part in own.items():
            whole = saved[name]
            shape = (self.total, *part.tensor.shape[1:])
            if whole.shape != shape:
                raise ValueError(f"its carried state {name} is {tuple(whole.shape)}, expected {shape}")
            part.tensor.copy_(whole[self.slots.start : self.slots.stop])
        self.rows = rows

    def _places(self, batch: Batch) -> list[int]:
        """Where the rows' slots lie among this rank's."""
        assert batch.slots is not None, "rows whose states are carried come from Rows.batch"
        return [slot - self.slots.start for slot in batch.slots]

    def _index(self, places: list[int]) -> Tensor:
        return torch.tensor(places, dtype=torch.int64, device=self.device)


def _documents(batch: Batch, column: int) -> list[int]:
    """The document at a column of each row."""
    if batch.doc_ids is None:
        return list(range(batch.n_docs))
    return batch.doc_ids[:, column].tolist()

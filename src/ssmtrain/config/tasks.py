"""Tasks whose rows are made from numbers alone: recall, induction, copying, parity."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ssmtrain.config.base import Config, Positive, PositiveFloat

Length = Annotated[int, Field(ge=2)]


class Rows(Config):
    """What every kind of data has."""

    seq_len: Length = 512
    """Tokens in a row."""


class Mqar(Rows):
    """Multi-query associative recall (Arora et al. 2023, "Zoology", figure 2): pairs of a key and a value,
    then each key once more, at which its value is asked for."""

    kind: Literal["mqar"] = "mqar"
    seq_len: Length = 64
    """Tokens in a row; the paper has 64 with 4 pairs, 128 with 8, 256 with 16, 512 with 64."""
    vocab_size: Annotated[int, Field(ge=4)] = 8192
    """Ids: 0 is blank, the lower half are keys, the upper half values."""
    n_pairs: Positive = 4
    """Pairs in a row, at most a quarter of its tokens."""
    power: PositiveFloat = 0.01
    """Keys come back after g pairs of tokens with a probability that goes as g^(power - 1)."""
    filler: Literal["blank", "random"] = "blank"
    """What stands between the queries: id 0 (the paper's figure 2), or any id (Mamba-2's figure 8)."""


class Induction(Rows):
    """Induction heads (Gu & Dao 2023, table 11): a marker stands once in a row, and again at its end,
    where the token is asked for that followed it."""

    kind: Literal["induction"] = "induction"
    seq_len: Length = 256
    """Tokens in a row."""
    vocab_size: Annotated[int, Field(ge=3)] = 16
    """Ids: 0 is the marker, the others are text."""


class SelectiveCopy(Rows):
    """Selective copying (Gu & Dao 2023, table 1): tokens among blanks, asked for in their order."""

    kind: Literal["selective_copy"] = "selective_copy"
    seq_len: Length = 4112
    """Tokens in a row: the paper's 4,096 in which to find the tokens, and a mark for each of them."""
    vocab_size: Annotated[int, Field(ge=3)] = 16
    """Ids: 0 is blank, the last is the mark at which a token is asked for, the others are to be copied."""
    n_tokens: Positive = 16
    """Tokens to copy."""


class Copy(Rows):
    """Copying (Jelassi et al. 2024, "Repeat After Me"): a string, asked for again letter by letter."""

    kind: Literal["copy"] = "copy"
    seq_len: Length = 102
    """Tokens in a row: strings have up to (seq_len - 2) / 2 letters, 50 where the
    paper tests longer ones."""
    vocab_size: Annotated[int, Field(ge=4)] = 29
    """Ids: 0 ends a string, 1 begins it, 2 asks for the copy, the others are letters (26)."""
    min_len: Positive = 1
    """Letters of the shortest string; lengths are drawn evenly."""


class Parity(Rows):
    """State tracking (Grazzi et al. 2024; Mamba-3): the sum of the numbers so far, modulo their number;
    parity for two."""

    kind: Literal["parity"] = "parity"
    seq_len: Length = 40
    """Tokens in a row, the longest sequence."""
    vocab_size: Annotated[int, Field(ge=2)] = 2
    """Ids, which are the numbers: 0 and 1 for parity."""
    min_len: Positive = 3
    """Numbers of the shortest sequence; lengths are drawn evenly."""
    asked: Literal["last", "every"] = "last"
    """Whether the sum is asked for after the last number alone, or after every one."""


class Trained(Config):
    """What a task has besides where it is the data of a run."""

    train_rows: Positive | None = None
    """Different rows to train on, in another order each epoch; absent: no row comes twice."""
    val_rows: Positive = 1000
    """Rows to validate on, the same for every seed."""
    val_lengths: list[Length] = []
    """Further row lengths to validate at, with sequences as long as they allow."""


class MqarData(Mqar, Trained):
    """Multi-query associative recall as data."""

    train_rows: Positive | None = 100_000
    """Different rows to train on, in another order each epoch (as in the paper); absent: none comes twice."""
    val_rows: Positive = 3000
    """Rows to validate on (the paper: 3,000), the same for every seed."""


class InductionData(Induction, Trained):
    """Induction heads as data."""


class SelectiveCopyData(SelectiveCopy, Trained):
    """Selective copying as data."""


class CopyData(Copy, Trained):
    """Copying as data."""


class ParityData(Parity, Trained):
    """Parity as data."""


class Check(Config):
    """A score taken while a run trains, beside its validation."""

    every: Positive = 200
    """Steps between its scores; one is always taken at the end."""


class TaskCheck(Check):
    """A task as a check."""

    rows: Positive = 256
    """Rows to score."""


class MqarCheck(Mqar, TaskCheck):
    """Multi-query associative recall as a check."""


class InductionCheck(Induction, TaskCheck):
    """Induction heads as a check."""


class SelectiveCopyCheck(SelectiveCopy, TaskCheck):
    """Selective copying as a check."""


class CopyCheck(Copy, TaskCheck):
    """Copying as a check."""


class ParityCheck(Parity, TaskCheck):
    """Parity as a check."""


class FileCheck(Check):
    """A text file as a check."""

    kind: Literal["file"] = "file"
    path: str
    """The file, UTF-8 text; one document."""
    seq_len: Length | None = None
    """Tokens in a row; absent: as in training."""
    rows: Positive | None = None
    """Rows to score, the file's first; absent: all of them."""


AnyTask = Mqar | Induction | SelectiveCopy | Copy | Parity
AnyTaskData = MqarData | InductionData | SelectiveCopyData | CopyData | ParityData
AnyTaskCheck = MqarCheck | InductionCheck | SelectiveCopyCheck | CopyCheck | ParityCheck
AnyCheck = Annotated[AnyTaskCheck | FileCheck, Field(discriminator="kind")]

"""One column of a Parquet file, row by row (package pyarrow, extra `data`)."""

from __future__ import annotations

from collections.abc import Iterator

from ssmtrain.config.errors import UserError
from ssmtrain.data.spans import BadText, TextFile

ROWS = 1024
"""Rows read at a time."""


def column(file: TextFile, name: str) -> Iterator[bytes | None]:
    """A column as UTF-8 that is not yet checked; UserError for another schema, BadText for damage."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(
            f"{file.key}: {file.path}: reading Parquet needs the package pyarrow",
            "pip install 'ssmtrain[data]'",
        ) from None
    with file.open() as stream:
        try:
            table = parquet.ParquetFile(stream)
            fields = {field.name: field.type for field in table.schema_arrow}
            if name not in fields:
                has = ", ".join(list(fields)[:8])
                raise UserError(
                    f"{file.key}: {file.path}: there is no column {name!r}, only {has}",
                    "set data.text_key=<the column that holds the text>",
                )
            kind = fields[name]
            if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind)):
                wrong = f"the column {name!r} holds {kind}, expected string"
                raise UserError(f"{file.key}: {file.path}: {wrong}")
            for batch in table.iter_batches(ROWS, columns=[name], use_threads=False):
                texts = batch.column(0)
                yield from texts.cast(arrow.large_binary()).to_pylist()
        # Of a damaged file a name may be no text, and a length more than there is memory.
        except (arrow.ArrowException, OSError, ValueError, TypeError, OverflowError, MemoryError) as error:
            raise BadText(f"{file.key}: {file.path}: cannot be read as Parquet: {_line(error)}") from None
        file.check(stream)


def _line(error: BaseException) -> str:
    """What the library says, in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__

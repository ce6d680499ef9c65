"""A text file to score."""

from __future__ import annotations

from pathlib import Path

from ssmtrain.config.errors import UserError


def read_text(path: str, key: str) -> str:
    """The UTF-8 text of a file; UserError, which begins with the key that named it, when it is none."""
    try:
        return Path(path).expanduser().read_bytes().decode()
    except OSError as error:
        raise UserError(f"{key}={path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{key}={path}: not UTF-8 text (byte {error.start})") from None

"""A text file to score."""

from __future__ import annotations

from pathlib import Path

from ssmtrain.config.errors import UserError


def read_text(path: str, key: str) -> str:
    """The UTF-8 text of a file; UserError, which begins with the key that named it, when it is none."""
    try:
        file = Path(path).expanduser()
        if file.exists() and not file.is_file():
            raise UserError(f"{key}={path}: not a regular file")
        return file.read_bytes().decode()
    except OSError as error:
        raise UserError(f"{key}={path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{key}={path}: not UTF-8 text (byte {error.start})") from None
    except (ValueError, RuntimeError) as error:  # a NUL in the name; ~ of a user who is not there
        raise UserError(f"{key}={path}: {error}") from None

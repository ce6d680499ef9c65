"""What the program raises on purpose; the command line turns each into its exit code."""

from __future__ import annotations


class UserError(Exception):
    """Wrong input (exit 2): up to five lines that name the key, the value and what to do."""

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = list(lines[:5])

"""What the command line asks of a room."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssmtrain.config.schema import RunConfig


@dataclass(frozen=True)
class Request:
    """One parsed command line; every room's `command(request) -> int` (exit code) takes it.

    Either `config` is set (the line said config=) or `run` is (it said run=); a room that is given `run`
    loads that run's page itself with `config.load.load_run_config(folder, request.overrides)`.
    """

    verb: str
    """The verb, two words joined by a space where there are two ("check resume")."""
    config: RunConfig | None = None
    """The composed, typed and checked config of a `config=` line."""
    run: str | None = None
    """Name (under runs_dir) or folder of a `run=` line."""
    overrides: list[str] = field(default_factory=list)
    """The key=value words as typed, without config= and run=."""
    flags: dict[str, Any] = field(default_factory=dict)
    """Flags by name without dashes: `json` and `multirun` are True, `prompt`, `file`, … hold their text."""

    words: dict[str, str] = field(default_factory=dict)
    """The words that are the verb's own (`from`, `out`, `weights`, …) and their text."""

    began: float | None = field(default=None, compare=False)
    """When the program started, on the monotonic clock."""

    @property
    def as_json(self) -> bool:
        """Whether the line asked for --json."""
        return bool(self.flags.get("json"))

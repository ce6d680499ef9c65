"""Records of a run: one dictionary of figures per event, sent to every place that keeps or shows them."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any, Protocol

from ssmtrain.checkpoint.durable import append_file
from ssmtrain.checkpoint.records import cut_jsonl
from ssmtrain.config.redact import redacted

log = logging.getLogger(__name__)

Record = dict[str, Any]
"""Flat figures with `kind` (train, val, health, sample, skip, save) and `step`."""


class Sink(Protocol):
    """A place that records go to."""

    def write(self, record: Record) -> None:
        """Take one record."""

    def close(self) -> str | None:
        """Finish; nothing follows. Returns a line for the user where there is something left to do."""


class Journal:
    """Sends records to the sinks of rank 0; the other ranks have none."""

    def __init__(self) -> None:
        self.sinks: list[Sink] = []

    def write(self, kind: str, step: int, **figures: Any) -> None:
        """Send one record; a sink that fails is dropped with a warning, because no record is worth a run."""
        record = redacted({"kind": kind, "step": step, **figures})
        for sink in list(self.sinks):
            try:
                sink.write(record)
            except Exception as error:  # whatever a logging service raises
                log.warning("%s stopped taking records: %s", type(sink).__name__, error)
                self.sinks.remove(sink)

    def close(self) -> list[str]:
        """Close every sink; returns what they have to say to the user."""
        said = []
        for sink in self.sinks:
            try:
                said.append(sink.close())
            except Exception as error:
                log.warning("%s did not close: %s", type(sink).__name__, error)
        self.sinks = []
        return [line for line in said if line]


class JsonLines:
    """A file of one JSON object per line; what is not finite becomes null, as JSON knows no NaN."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, append_file(path)

    def write(self, record: Record) -> None:
        """Append one line and hand it to the system, so that a killed process loses nothing."""
        self.file.write(json.dumps(finite(record), ensure_ascii=False) + "\n")
        self.file.flush()

    def cut(self, step: int) -> None:
        """Drop the lines beyond a step, which the run will take again."""
        self.file.close()
        cut_jsonl(self.path, step)
        self.file = append_file(self.path)

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def finite(value: Any) -> Any:
    """The value with every float that is not finite replaced by None."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

"""How figures of runs are written, and tables of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ssmtrain.config.redact import redact
from ssmtrain.train.callbacks.words import duration, si


def plain(text: str) -> str:
    """Text of a run's files without secrets and without the codes that move a terminal's cursor."""
    return redact("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))


def size(n_bytes: float) -> str:
    """Bytes as 940 B, 12.3 kB, 1.20 MB."""
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n_bytes >= unit:
            return f"{n_bytes / unit:.3g} {letter}B"
    return f"{n_bytes:.0f} B"


def ago(seconds: float) -> str:
    """How long ago something was."""
    return f"{duration(max(0.0, seconds))} ago"


def number(value: Any, digits: int = 4) -> str:
    """A figure with so many decimals, or - where there is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return "-"
    return f"{value:.{digits}f}"


def speed(value: Any) -> str:
    """Tokens a second, or - where it is not known."""
    return si(value) if isinstance(value, (int, float)) and math.isfinite(value) else "-"


def table(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Rows as aligned lines, the first `left` columns to the left and the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            text.ljust(width) if i < left else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def record_line(record: dict[str, Any]) -> str | None:
    """A record of metrics.jsonl as a line, as the run itself prints it; None for one that it does not."""
    step, kind = record.get("step"), record.get("kind")
    if type(step) is not int:
        return None
    said = {"train": _train, "val": _val, "sample": _sample, "skip": _skip, "slow": _slow}.get(str(kind))
    return plain(f"step {step:>6,}  {said(record)}") if said else None


def _train(record: dict[str, Any]) -> str:
    found = [f"loss {number(record.get('loss'))}"]
    if "bpb" in record:
        found.append(f"{number(record['bpb'], 3)} bits/byte")
    if isinstance(record.get("lr"), (int, float)):
        found.append(f"lr {record['lr']:.2e}")
    found.append(f"{speed(record.get('tokens_per_s'))} tokens/s")
    if isinstance(record.get("mfu"), (int, float)):
        found.append(f"MFU {100 * record['mfu']:.1f} %")
    return "  ".join(found)


def _val(record: dict[str, Any]) -> str:
    found = f"validation loss {number(record.get('loss'))}"
    return found + (f", {number(record['bpb'])} bits per byte" if "bpb" in record else "")


def _sample(record: dict[str, Any]) -> str:
    return f"sample: {record.get('text', '')}"


def _skip(record: dict[str, Any]) -> str:
    return f"skipped: the {record.get('what', 'step')} is not finite"


def _slow(record: dict[str, Any]) -> str:
    return f"rank {record.get('rank')} on {record.get('host')} is slow"

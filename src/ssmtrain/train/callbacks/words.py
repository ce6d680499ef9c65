"""Numbers as people write them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Seconds as 42 s, 3 min 05 s, 2 h 10 min, 5 d 3 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def si(number: float) -> str:
    """A number with three digits and a prefix: 940, 12.3k, 1.20M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"


def scored(found: dict[str, float]) -> str:
    """The figures of a score as words: of a task how much was right, of a text how many bits a byte."""
    text = f"loss {found['loss']:.4f}, perplexity {found['perplexity']:.4g}"
    if "accuracy" in found:
        rows = f"{100 * found['row_accuracy']:.2f} % of the rows"
        text += f", {100 * found['accuracy']:.2f} % right, {rows}"
    return text + (f", {found['bpb']:.4f} bits per byte" if "bpb" in found else "")

"""What general compressors need for a text: the measure that a byte-level model has to beat."""

from __future__ import annotations

import bz2
import gzip
import lzma


def yardsticks(data: bytes) -> dict[str, float]:
    """Bits per byte of `data` under gzip, bz2 and xz at their highest levels; empty when there is no data."""
    if not data:
        return {}
    sizes = {
        "gzip": len(gzip.compress(data, compresslevel=9, mtime=0)),
        "xz": len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)),
        "bz2": len(bz2.compress(data, compresslevel=9)),
    }
    return {name: 8 * size / len(data) for name, size in sizes.items()}

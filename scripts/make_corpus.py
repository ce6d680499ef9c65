"""Rebuild the embedded corpus from the Debian package r-cran-janeaustenr, with the standard library only.

    apt-get download r-cran-janeaustenr
    python scripts/make_corpus.py r-cran-janeaustenr_1.0.0-1_all.deb src/ssmtrain/data/corpora/austen

Writes six `<novel>.txt.xz` and `corpus.json`, byte for byte the same each time.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import lzma
import struct
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

RDB = "./usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
# Title as the text's first line has it -> name; in order of publication, the validation novel last.
NOVELS = {
    "SENSE AND SENSIBILITY": "sense_and_sensibility",
    "PRIDE AND PREJUDICE": "pride_and_prejudice",
    "MANSFIELD PARK": "mansfield_park",
    "EMMA": "emma",
    "NORTHANGER ABBEY": "northanger_abbey",
    "PERSUASION": "persuasion",
}
VALIDATION = "persuasion"
# A modern editor's note at the end of Northanger Abbey is not Austen's, and the one pound sign is not ASCII.
EDITORS_NOTE = "A NOTE ON THE TEXT"
POUNDS = ("£20,000", "20,000 pounds")


def members(deb: bytes) -> Iterator[tuple[str, bytes]]:
    """The members of an `ar` archive (which a .deb is): name and content."""
    if deb[:8] != b"!<arch>\n":
        raise SystemExit("not a Debian package: the ar magic is missing")
    at = 8
    while at < len(deb):
        header = deb[at : at + 60]
        size = int(header[48:58])
        yield header[:16].decode("ascii").rstrip(" /"), deb[at + 60 : at + 60 + size]
        at += 60 + size + size % 2  # members start at even offsets


def chunks(rdb: bytes) -> Iterator[bytes]:
    """The objects of an R lazy-load database: each a big-endian length and a zlib stream, end to end."""
    at = 0
    while at < len(rdb):
        (size,) = struct.unpack(">I", rdb[at : at + 4])
        stream = zlib.decompressobj()
        out = stream.decompress(rdb[at + 4 :])
        if len(out) != size:
            raise SystemExit(f"the object at byte {at} has {len(out)} bytes, its header says {size}")
        yield out
        at = len(rdb) - len(stream.unused_data)


def lines(obj: bytes) -> list[str]:
    """The strings of a serialised R character vector (XDR, version 3): type 16, a count, length-prefixed."""
    (encoding,) = struct.unpack(">I", obj[14:18])
    at = 18 + encoding
    kind, count = struct.unpack(">II", obj[at : at + 8])
    if kind & 0xFF != 16:
        raise SystemExit(f"expected a character vector (16), found type {kind & 0xFF}")
    at += 8
    out = []
    for _ in range(count):
        size = struct.unpack(">I", obj[at + 4 : at + 8])[0]
        out.append(obj[at + 8 : at + 8 + size].decode("utf-8"))
        at += 8 + size
    return out


def novels(deb: bytes) -> dict[str, bytes]:
    """Name -> plain ASCII text of the six novels, found by their first line."""
    data = next(body for name, body in members(deb) if name == "data.tar.xz")
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:xz") as tar:
        member = tar.extractfile(RDB)
        if member is None:
            raise SystemExit(f"{RDB} is not a file of the package")
        rdb = member.read()
    found = {}
    for obj in chunks(rdb):
        text = lines(obj)
        title = next(line for line in text if line).strip().upper()
        prose = "\n".join(text[: text.index(EDITORS_NOTE)] if EDITORS_NOTE in text else text)
        found[NOVELS[title]] = (prose.replace(*POUNDS).strip("\n") + "\n").encode("ascii")
    return {name: found[name] for name in NOVELS.values()}


def main() -> None:
    """Read the .deb, write the corpus folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("deb", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    deb = args.deb.read_bytes()
    args.folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, text in novels(deb).items():
        packed = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
        (args.folder / f"{name}.txt.xz").write_bytes(packed)
        files.append(
            {
                "file": f"{name}.txt.xz",
                "split": "val" if name == VALIDATION else "train",
                "bytes": len(text),
                "sha256": hashlib.sha256(text).hexdigest(),
                "sha256_xz": hashlib.sha256(packed).hexdigest(),
            }
        )
    corpus = {
        "name": "austen",
        "source": "Debian package r-cran-janeaustenr 1.0.0-1",
        "source_sha256": hashlib.sha256(deb).hexdigest(),
        "files": files,
    }
    (args.folder / "corpus.json").write_text(json.dumps(corpus, indent=2) + "\n")
    print(f"{len(files)} novels, {sum(f['bytes'] for f in files):,} bytes of text, in {args.folder}")


if __name__ == "__main__":
    main()

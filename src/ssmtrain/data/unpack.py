"""Packed files as streams: gzip and xz by the standard library, zstd by `zstandard`; bombs are refused."""

from __future__ import annotations

import io
import lzma
import zlib
from typing import Any, BinaryIO, Protocol, cast

from ssmtrain.config.errors import UserError
from ssmtrain.data.spans import BadText, TextFile

PACKINGS = {".gz": "gz", ".xz": "xz", ".zst": "zst"}
"""Names of files that are unpacked as they are read."""
BLOCK = {"gz": 2**16, "xz": 2**16, "zst": 2**12}
"""Packed bytes unpacked at a time. They become 66 MB at most of gzip, whose ratio is at most 1032; 134 MB of
zstd, whose blocks are 4 bytes and 128 KiB; of xz a mebibyte is taken at a time."""
RATIO = 200
"""How many times its size a file may unpack to, once that is more than `FREE`; prose gives 3 to 5."""
FREE = 2**26
WINDOW = 2**27
"""Bytes of window a zstd file may ask for; an xz file may take twice that in all."""


class _Decoder(Protocol):
    """One compressed member: bytes in, bytes out."""

    @property
    def eof(self) -> bool:
        """Whether the member is complete."""

    @property
    def needs_input(self) -> bool:
        """Whether all that was given is unpacked."""

    @property
    def unused_data(self) -> bytes:
        """What follows the member."""

    def decompress(self, data: bytes) -> bytes:
        """Unpack some more of it."""


class Unpacked(io.RawIOBase):
    """The text inside a packed file, its members end to end; BadText for damage and for bombs."""

    def __init__(self, name: TextFile, packing: str) -> None:
        self._name, self._packing = name, packing
        self._file = name.open()
        self._decoder: _Decoder | None = None
        self._held = b""  # unpacked, not yet given out
        self._packed = b""  # read, not yet unpacked
        self._read = self._given = 0
        self._ended = False

    def readable(self) -> bool:
        """It is."""
        return True

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes, fewer at the end alone."""
        out = bytearray()
        while size < 0 or len(out) < size:
            if not self._held and not self._fill():
                break
            take = len(self._held) if size < 0 else size - len(out)
            out += self._held[:take]
            self._held = self._held[take:]
        return bytes(out)

    def close(self) -> None:
        """Close the packed file, which must be what it was when it was found."""
        if not self.closed:
            self._file.close()
        super().close()

    def fileno(self) -> int:
        """Descriptor of the packed file."""
        return self._file.fileno()

    def _fill(self) -> bool:
        """Unpack the next block; False at the end."""
        while not self._held:
            if not self._packed and (self._decoder is None or self._decoder.needs_input):
                self._packed = self._file.read(BLOCK[self._packing])
                self._read += len(self._packed)
                if not self._packed:
                    if self._decoder is not None:
                        raise self._bad("it is cut short")
                    return False
            self._unpack()
            self._given += len(self._held)
            if self._given > FREE and self._given > RATIO * self._read:
                raise self._bad(
                    f"it unpacks to more than {RATIO} times its size, which no text does; "
                    "unpack it yourself if it is meant"
                )
        return True

    def _unpack(self) -> None:
        if self._decoder is None:
            if self._given and not self._packed.strip(b"\0"):
                self._packed = b""  # padding after the last member
                return
            self._decoder = _decoder(self._packing, self._name)
        try:
            self._held = self._decoder.decompress(self._packed)
        except Exception as error:  # zlib.error, LZMAError, ZstdError, MemoryError: no base in common
            raise self._bad(f"it is damaged ({error})") from None
        self._packed = b""
        if self._decoder.eof:
            self._packed = self._decoder.unused_data
            self._decoder = None

    def _bad(self, why: str) -> BadText:
        return BadText(f"{self._name.key}: {self._name.path}: cannot unpack {self._packing}: {why}")


class _Bounded:
    """zlib's object, or zstandard's, under lzma's names: what a block may become bounds them."""

    needs_input = True

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    @property
    def eof(self) -> bool:
        return bool(self._inner.eof)

    @property
    def unused_data(self) -> bytes:
        return bytes(self._inner.unused_data)

    def decompress(self, data: bytes) -> bytes:
        return bytes(self._inner.decompress(data))


class _Lzma:
    """lzma's object, giving at most a mebibyte at a time: a kilobyte of xz may hold a gigabyte."""

    def __init__(self) -> None:
        self._inner = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=2 * WINDOW)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def needs_input(self) -> bool:
        return self._inner.needs_input

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes) -> bytes:
        return self._inner.decompress(data, 2**20)


def open_packed(name: TextFile, packing: str) -> BinaryIO:
    """The text inside a packed file as a stream; UserError where its library is missing."""
    return cast("BinaryIO", Unpacked(name, packing))  # a class of typing that io's streams do not derive from


def _decoder(packing: str, name: TextFile) -> _Decoder:
    if packing == "gz":
        return _Bounded(zlib.decompressobj(wbits=31))
    if packing == "xz":
        return _Lzma()
    try:
        import zstandard
    except ImportError:
        raise UserError(
            f"{name.key}: {name.path}: reading .zst needs the package zstandard",
            "pip install 'ssmtrain[data]'",
        ) from None
    return _Bounded(zstandard.ZstdDecompressor(max_window_size=WINDOW).decompressobj())

"""An input file as a stream of bytes that its readers can use: decompressed, with newlines at the ends of lines.

What a file is follows from its first bytes, not from its name; binary formats that nothing here reads are named.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from verl.data.lines import BOM
from verl.errors import UserError

_BUFFER = 2**20
_PARQUET = b"PAR1"
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    **{b"BZh%d1AY&SY" % level: "bz2" for level in range(1, 10)},
}
_COMPRESSED_SUFFIXES = {".gz", ".gzip", ".bz2", ".zst", ".zstd"}
_NOT_READ = {
    b"PK\x03\x04": "a zip archive or an Excel workbook; unpack it, or export it as CSV",
    b"\xd0\xcf\x11\xe0": "an Excel workbook; export it as CSV",
    b"\xfd7zXZ\0": "compressed with xz; decompress it with unxz",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it",
    b"\x04\x22\x4d\x18": "compressed with lz4; decompress it with unlz4",
    b"ARROW1\0\0": "an Arrow file; write it as parquet",
    b"\xff\xff\xff\xff": "an Arrow stream; write it as parquet, for example with datasets.Dataset.from_file",
    b"\xff\xfe": "UTF-16 text; convert it with iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16 text; convert it with iconv -f UTF-16 -t UTF-8",
    b"\x89HDF": "an HDF5 file; write it as parquet",
    b"\x93NUMPY": "a NumPy file; write it as parquet",
    b"\x80\x04": "a Python pickle; write it as parquet",
    b"\x80\x05": "a Python pickle; write it as parquet",
    b"Obj\x01": "an Avro file; write it as parquet",
    b"SQLite format 3\0": "an SQLite database; export the table as CSV",
    b"%PDF-": "a PDF; extract its text",
}
_TAR, _TAR_AT = b"ustar", 257


@dataclass(frozen=True)
class Opened:
    """An open file after decompression."""

    file: BinaryIO
    """At the beginning, which `head` has looked at but not consumed."""
    head: bytes
    """The first bytes, at most 1 MB, without a byte order mark; all of a shorter file."""
    suffix: str
    """Of the name without the compression's suffix, in lower case: `.csv` of `a.CSV.gz`."""
    is_parquet: bool
    position: Callable[[], int]
    """Bytes read, as they are on the disk."""
    size: int
    """Bytes on the disk."""


@contextmanager
def open_input(path: Path) -> Iterator[Opened]:
    """Open a file by its content.

    Raises:
        UserError: it is missing, empty, or of a format that is not read; while reading: its compression is damaged.
    """
    if not path.exists():
        raise UserError(f"input file {path} does not exist")
    if not path.is_file():
        raise UserError(f"input file {path} is not a file")
    with io.BufferedReader(path.open("rb", buffering=0), _BUFFER) as raw:
        head = raw.peek()
        compression = next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), None)
        file: Any = _stream(_decompressed(raw, compression, path)) if compression else raw
        head = file.peek()
        if not head:
            raise UserError(f"input file {path} is empty")
        if compression and head.startswith(_PARQUET):
            raise UserError(f"{path} is a parquet file inside {compression}; decompress it")
        _check_is_read(head, path)
        suffix = _suffix(path, compression)
        is_parquet = suffix == ".parquet" or _is_parquet(raw, head)
        if not is_parquet and head.count(b"\r") - head.count(b"\r\n") > head.count(b"\n"):
            file = _stream(_with_newlines(file))
            head = file.peek()
        yield Opened(file, head.removeprefix(BOM), suffix, is_parquet, raw.tell, path.stat().st_size)


def _suffix(path: Path, compression: str | None) -> str:
    name = Path(path.name.lower())
    return Path(name.stem).suffix if compression and name.suffix in _COMPRESSED_SUFFIXES else name.suffix


def _is_parquet(raw: BinaryIO, head: bytes) -> bool:
    """Whether a file begins as parquet does; a text may begin with the same four letters, but not end with them."""
    if not head.startswith(_PARQUET):
        return False
    position = raw.tell()
    raw.seek(-len(_PARQUET), io.SEEK_END)
    end = raw.read()
    raw.seek(position)
    return end == _PARQUET


def _check_is_read(head: bytes, path: Path) -> None:
    for magic, description in _NOT_READ.items():
        if head.startswith(magic):
            raise UserError(f"{path} is {description}")
    if head[_TAR_AT:].startswith(_TAR):
        raise UserError(f"{path} is a tar archive; unpack it")


def _decompressed(raw: BinaryIO, compression: str, path: Path) -> Callable[[int], bytes]:
    stream = pa.CompressedInputStream(raw, compression)

    def read(size: int) -> bytes:
        try:
            return stream.read(size)
        except OSError as error:
            raise UserError(f"{path} is damaged, or cut off: {error}") from error

    return read


def _with_newlines(file: io.BufferedReader) -> Callable[[int], bytes]:
    """Lines that end in a carriage return alone, as old programs of the Macintosh write them, end in a newline."""
    return lambda size: file.read(size).replace(b"\r", b"\n")


def _stream(read: Callable[[int], bytes]) -> io.BufferedReader:
    return io.BufferedReader(_Source(read), _BUFFER)


class _Source(io.RawIOBase):
    """A file of the bytes that `read(size)` returns."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

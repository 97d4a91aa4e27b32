"""Lines of a byte stream in bounded memory: a line over the limit is skipped, never held."""

from collections.abc import Iterator
from functools import partial
from typing import BinaryIO, NamedTuple

MAX_LINE_BYTES = 10 * 2**20
_BOM = b"\xef\xbb\xbf"
_EXCERPT = 120


class Line(NamedTuple):
    """One line; `problem` says why it cannot be used, and then `text` is only its beginning."""

    line_idx: int
    text: str
    problem: str | None


def read_lines(file: BinaryIO) -> Iterator[Line]:
    """Yield the lines of `file`, split at newline bytes alone, each decoded as strict UTF-8."""
    chunks = iter(partial(file.readline, MAX_LINE_BYTES + 1), b"")
    for line_idx, raw in enumerate(chunks):
        if len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
            _skip_rest(file)
            problem = f"the line is longer than {MAX_LINE_BYTES >> 20} MB"
            yield Line(line_idx, raw[:_EXCERPT].decode(errors="replace"), problem)
            continue
        if line_idx == 0:
            raw = raw.removeprefix(_BOM)
        try:
            yield Line(line_idx, raw.decode(), None)
        except UnicodeDecodeError as error:
            problem = f"not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line"
            yield Line(line_idx, raw[:_EXCERPT].decode(errors="replace"), problem)


def _skip_rest(file: BinaryIO) -> None:
    while (chunk := file.readline(2**20)) and not chunk.endswith(b"\n"):
        pass

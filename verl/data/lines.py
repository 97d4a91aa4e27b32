"""Lines, and JSON objects one a line, of a byte stream in bounded memory.

Nothing is raised and nothing is dropped: a line that cannot be used comes with the reason.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, BinaryIO, NamedTuple

import orjson

MAX_LINE_BYTES = 10 * 2**20
_BOM = b"\xef\xbb\xbf"
_EXCERPT = 120


class Line(NamedTuple):
    """One line; `problem` says why it cannot be used, and then `text` is only its beginning."""

    line_idx: int
    """From 0."""
    text: str
    problem: str | None


class Record(NamedTuple):
    """One line of text or JSON, or one row of a table."""

    line_idx: int
    """From 0: of the (first) line in a text file, of the row in a parquet file."""
    fields: dict[str, Any] | None
    """None for a blank line and for a record with a `problem`."""
    problem: str | None
    """Why the record cannot be used."""
    raw: str
    """The record or its beginning, for messages."""


def read_lines(file: BinaryIO) -> Iterator[Line]:
    """Yield the lines of `file`, split at newline bytes alone, each decoded as strict UTF-8.

    A line of more than MAX_LINE_BYTES is read past without being held in memory. A byte order mark is skipped.
    """
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


def read_objects(file: BinaryIO) -> Iterator[Record]:
    """Yield a record per line of a file of JSON objects, one a line."""
    return map(_parse_object, read_lines(file))


def _parse_object(line: Line) -> Record:
    text = line.text if line.problem else line.text.strip()
    if line.problem or not text:
        return Record(line.line_idx, None, line.problem, text)
    try:
        fields = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        return Record(line.line_idx, None, f"not valid JSON: {error.msg}, character {error.pos + 1}", text)
    if not isinstance(fields, dict):
        problem = f"a JSON {type(fields).__name__} instead of an object; write one object per line"
        return Record(line.line_idx, None, problem, text)
    return Record(line.line_idx, fields, None, text)


def _skip_rest(file: BinaryIO) -> None:
    while (chunk := file.readline(2**20)) and not chunk.endswith(b"\n"):
        pass

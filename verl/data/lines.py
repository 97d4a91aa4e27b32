"""Lines, and records of JSON, of a byte stream in bounded memory.

Nothing is dropped: a line or value that cannot be used comes with the reason.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, BinaryIO, NamedTuple

import orjson

MAX_LINE_BYTES = 10 * 2**20
BOM = b"\xef\xbb\xbf"
_EXCERPT = 120


class Line(NamedTuple):
    """One line, or one JSON value; `problem` says why it cannot be used, and then `text` is only its beginning."""

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
            yield too_long(line_idx, raw, "line")
            continue
        if line_idx == 0:
            raw = raw.removeprefix(BOM)
        yield decoded(line_idx, raw)


def decoded(line_idx: int, raw: bytes) -> Line:
    try:
        return Line(line_idx, raw.decode(), None)
    except UnicodeDecodeError as error:
        problem = f"not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line"
        return Line(line_idx, raw[:_EXCERPT].decode(errors="replace"), problem)


def too_long(line_idx: int, raw: bytes, what: str) -> Line:
    problem = f"the {what} is longer than {MAX_LINE_BYTES >> 20} MB"
    return Line(line_idx, raw[:_EXCERPT].decode(errors="replace"), problem)


def read_objects(file: BinaryIO, columns: Sequence[str] = ()) -> Iterator[Record]:
    """Yield a record per line of a file of JSON objects, one a line; see `parse_record` for `columns`."""
    return map(partial(parse_record, columns=columns), read_lines(file))


def parse_record(line: Line, columns: Sequence[str] = ()) -> Record:
    """The record of a line that holds one JSON value.

    Args:
        columns: the names of the values of a JSON list; without them only objects are records.
    """
    text = line.text if line.problem else line.text.strip()
    if line.problem or not text:
        return Record(line.line_idx, None, line.problem, text)
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        return Record(line.line_idx, None, f"not valid JSON: {error.msg}, character {error.pos + 1}", text)
    if columns and isinstance(value, dict):
        return Record(line.line_idx, None, "an object, which has names of its own; leave --columns out", text)
    if columns:
        return name_values(line.line_idx, value if isinstance(value, list) else [value], columns, text)
    if not isinstance(value, dict):
        way_out = "name its values with --columns" if isinstance(value, list) else "write one object per line"
        problem = f"a JSON {type(value).__name__} instead of an object; {way_out}"
        return Record(line.line_idx, None, problem, text)
    return Record(line.line_idx, value, None, text)


def name_values(line_idx: int, values: list[Any], columns: Sequence[str], raw: str) -> Record:
    """The record of a row whose values have no names of their own; a row of the names themselves counts as blank."""
    if values == list(columns):
        return Record(line_idx, None, None, raw)
    if len(values) != len(columns):
        return Record(line_idx, None, f"{len(values)} values, but {len(columns)} columns", raw)
    return Record(line_idx, dict(zip(columns, values, strict=True)), None, raw)


def _skip_rest(file: BinaryIO) -> None:
    while (chunk := file.readline(2**20)) and not chunk.endswith(b"\n"):
        pass

"""Rows of CSV and TSV files. The separator is the one under which the header has the columns that are needed.

A file without a header is read if its columns are named. In a CSV file a quoted cell may hold line breaks. In a TSV
file every line is a row, and quotes that do not enclose a cell are characters. A cell that is a list in the notation of
JSON or Python is that list.
"""

import ast
import csv
import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from verl.data.lines import MAX_LINE_BYTES, Line, Record, name_values, read_lines
from verl.errors import UserError

csv.field_size_limit(MAX_LINE_BYTES)

_TAB = "\t"
_SEPARATORS = {_TAB: "tabs", ",": "commas", ";": "semicolons", "|": "bars"}
_LIKE_A_LIST = re.compile(r"(?:array\(|list\(|\[|\s|(?:nan|None|null)\s*,)+['\"]")


def header_separator(head: str, suffix: str, suffices: Callable[[Sequence[str]], bool]) -> str | None:
    """The separator under which the names in the first row of a file suffice; `head` is the file's beginning."""
    return next((s for s in _separators(suffix) if suffices(_names(_first_row(head, s)))), None)


def row_separator(head: str, suffix: str, columns: Sequence[str], path: Path) -> str:
    """The separator of a file without a header.

    Raises:
        UserError: the first row has not as many cells as there are `columns`, whatever the separator.
    """
    separators = _separators(suffix)[: 1 if len(columns) == 1 else None]
    counts = {separator: len(_first_row(head, separator)) for separator in separators}
    fitting = [separator for separator, count in counts.items() if count == len(columns)]
    if not fitting:
        found = ", ".join(f"{count} between {_SEPARATORS[separator]}" for separator, count in counts.items())
        raise UserError(f"--columns names {len(columns)} columns; the first line of {path} has other cells: {found}")
    return fitting[0]


def read_table(file: BinaryIO, separator: str, columns: Sequence[str], path: Path) -> Iterator[Record]:
    """Yield a record per row.

    Args:
        columns: the columns of a file without a header; empty = the first row names them.

    Raises:
        UserError: the header cannot be read.
    """
    names = list(columns)
    for line_idx, cells, problem, raw in _rows(file, separator):
        if problem and not names:
            raise UserError(f"the header of {path} cannot be read: {problem}")
        if problem or not cells:
            yield Record(line_idx, None, problem, raw)
        elif names:
            yield _record(line_idx, cells, names, raw)
        else:
            names = _names(cells)


def _record(line_idx: int, cells: list[str], names: list[str], raw: str) -> Record:
    try:
        return name_values(line_idx, [_value(cell) for cell in cells], names, raw)
    except ValueError as error:
        return Record(line_idx, None, str(error), raw)


def _value(cell: str) -> Any:
    """None for an empty cell, the list that a cell is the notation of, or the cell.

    Raises:
        ValueError: the cell is the notation of something else.
    """
    if not cell or cell[0] not in "[({ ":
        return cell or None
    text = cell.strip()
    if text[:1] + text[-1:] not in ("[]", "()", "{}"):
        return cell
    value = _read_notation(text)
    if isinstance(value, list):
        return value
    if isinstance(value, dict | tuple | set) or _LIKE_A_LIST.match(text):
        raise ValueError(f"the cell {text[:40]!r} is neither a text nor a list in the notation of JSON or Python")
    return cell


def _read_notation(text: str) -> Any:
    """The value that `text` is the notation of in JSON or Python, or None."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        pass
    try:
        with warnings.catch_warnings(action="ignore"):
            value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    # NumPy writes lists without commas, whose items Python would read as one.
    return value if not isinstance(value, list) or repr(value) == text else None


_Row = tuple[int, list[str] | None, str | None, str]
"""Index of its first line, its cells, what is wrong with it, and its beginning."""


def _rows(file: BinaryIO, separator: str) -> Iterator[_Row]:
    return _tsv_rows(file) if separator == _TAB else _csv_rows(file, separator)


def _tsv_rows(file: BinaryIO) -> Iterator[_Row]:
    for line in read_lines(file):
        text = line.text.rstrip("\r\n")
        cells, problem = (None, line.problem) if line.problem or not text.strip() else _tsv_cells(text)
        yield line.line_idx, cells, problem, text


def _tsv_cells(line: str) -> tuple[list[str] | None, str | None]:
    """The cells of a line, or what is wrong with it."""
    if '"' not in line:
        return line.split(_TAB), None
    try:
        return next(csv.reader([line], delimiter=_TAB, strict=True)), None
    except csv.Error as error:
        if "unexpected end" in str(error):
            return None, "a quote that begins a cell is not closed on its line; write one row a line"
        return line.split(_TAB), None


def _csv_rows(file: BinaryIO, separator: str) -> Iterator[_Row]:
    feed = _CsvFeed(read_lines(file))
    rows = csv.reader(feed, delimiter=separator, strict=True)
    while True:
        feed.start_record()
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            # Every physical line that the broken record swallowed is one rejected record.
            for index in range(feed.first, feed.next):
                yield index, None, f"not valid CSV: {error}", feed.raw
            continue
        yield feed.first, row, feed.problem, feed.raw


class _CsvFeed:
    """Physical lines for `csv.reader`; remembers what is wrong with the lines of the current record."""

    def __init__(self, lines: Iterator[Line]) -> None:
        self._lines = lines
        self.problem: str | None = None
        self.raw = ""
        self.first = self.next = self._num_chars = 0

    def start_record(self) -> None:
        self.problem, self.raw, self._num_chars, self.first = None, "", 0, self.next

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.next = line.line_idx + 1
        self._num_chars += len(line.text)
        self.raw = self.raw or line.text
        self.problem = self.problem or line.problem
        if self._num_chars > MAX_LINE_BYTES:
            raise csv.Error(f"the record is longer than {MAX_LINE_BYTES >> 20} MB; is a quote left open?")
        return line.text


def _first_row(head: str, separator: str) -> list[str]:
    rows = _rows(io.BytesIO(head.encode()), separator)
    return next((cells for _, cells, _, _ in rows if cells), [])


def _names(cells: Sequence[str]) -> list[str]:
    return [name.strip() for name in cells]


def _separators(suffix: str) -> list[str]:
    """The usual one first."""
    return sorted(_SEPARATORS, key=lambda separator: suffix == ".csv" and separator != ",")

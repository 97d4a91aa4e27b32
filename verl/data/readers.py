"""Input files of every accepted format as a stream of records, in bounded memory.

A record is one line of JSON or text, one row of a CSV or parquet file. What cannot be read becomes a
record with a `problem`; nothing is dropped here.
"""

import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from verl.data.lines import MAX_LINE_BYTES, Line, Record, read_lines, read_objects
from verl.data.samples import FIELDS, Mode, describe_fields
from verl.errors import UserError

TEXT_SOURCE = "wiki1m"
"""`source` of every line of an unsupervised .txt file."""

_READ_BUFFER = 2**20
_PARQUET_ROWS = 2_000


@dataclass(frozen=True)
class Source:
    """An open input: its records, how many bytes of it are read, and how many there are."""

    records: Iterator[Record]
    position: Callable[[], int]
    size: int


@contextmanager
def open_source(path: Path, mode: Mode) -> Iterator[Source]:
    """Open `path` in the format of its extension: .csv, .parquet, .txt (one text a line), else JSON lines.

    Raises:
        UserError: the file is missing or empty, is not what its extension says, or lacks a column.
    """
    if not path.exists():
        raise UserError(f"input file {path} does not exist")
    if not path.is_file():
        raise UserError(f"input file {path} is not a file")
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"input file {path} is empty")
    extension = path.suffix.lower()
    with path.open("rb", buffering=_READ_BUFFER) as file:
        if extension == ".parquet":
            yield _parquet_source(file, path, mode, size)
            return
        if extension == ".csv":
            records = _csv_records(file, path, mode)
        elif extension == ".txt" and mode == "unsupervised":
            records = map(_text_record, read_lines(file))
        else:
            records = read_objects(file)
        yield Source(records, file.tell, size)


def _text_record(line: Line) -> Record:
    if line.problem:
        return Record(line.line_idx, None, line.problem, line.text)
    text = line.text.strip()
    fields = {"text": text, "source": TEXT_SOURCE} if text else None
    return Record(line.line_idx, fields, None, text)


def _check_columns(names: list[str], path: Path, mode: Mode) -> None:
    if not all(set(aliases) & set(names) for aliases in FIELDS[mode].values()):
        raise UserError(
            f"{path} has the columns {', '.join(names) or '(none)'}; --mode {mode} needs {describe_fields(mode)}"
        )


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


def _csv_records(file: BinaryIO, path: Path, mode: Mode) -> Iterator[Record]:
    csv.field_size_limit(MAX_LINE_BYTES)
    feed = _CsvFeed(read_lines(file))
    rows = csv.reader(feed, strict=True)
    try:
        header = [name.strip() for name in next(rows, [])]
    except csv.Error as error:
        raise UserError(f"the header of {path} is not valid CSV: {error}") from error
    if feed.problem:
        raise UserError(f"the header of {path} cannot be read: {feed.problem}")
    _check_columns(header, path, mode)
    while True:
        feed.start_record()
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            # Every physical line that the broken record swallowed is one rejected record.
            for index in range(feed.first, feed.next):
                yield Record(index, None, f"not valid CSV: {error}", feed.raw)
            continue
        yield _csv_record(feed, header, row)


def _csv_record(feed: _CsvFeed, header: list[str], row: list[str]) -> Record:
    problem = feed.problem
    if not problem and row and len(row) != len(header):
        problem = f"{len(row)} cells, but the header has {len(header)} columns"
    if problem or not row:
        return Record(feed.first, None, problem, feed.raw)
    cells = {name: cell or None for name, cell in zip(header, row, strict=True)}
    return Record(feed.first, cells, None, feed.raw)


def _parquet_source(file: BinaryIO, path: Path, mode: Mode, size: int) -> Source:
    try:
        # A read buffer instead of whole column chunks: memory then does not grow with a row group.
        parquet = pq.ParquetFile(file, buffer_size=_READ_BUFFER)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is not a readable parquet file: {error}") from error
    _check_columns(parquet.schema_arrow.names, path, mode)
    num_rows = max(parquet.metadata.num_rows, 1)
    num_read = 0

    def records() -> Iterator[Record]:
        nonlocal num_read
        accepted = {name for aliases in FIELDS[mode].values() for name in aliases} | {"source"}
        columns = [name for name in parquet.schema_arrow.names if name in accepted]
        try:
            for batch in parquet.iter_batches(_PARQUET_ROWS, columns=columns):
                cells = [_undecoded(column).to_pylist() for column in batch.columns]
                for row in zip(*cells, strict=True):
                    yield _parquet_record(num_read, columns, row)
                    num_read += 1
        except pa.ArrowException as error:
            raise UserError(f"{path} is damaged after row {num_read}: {error}") from error

    return Source(records(), lambda: size * num_read // num_rows, size)


def _undecoded(column: pa.Array) -> pa.Array:
    """`column` with its strings as bytes: parquet does not promise that they are UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if _is_text(column.type):
        return column.cast(pa.large_binary())
    is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    if is_list and _is_text(column.type.value_type):
        return column.cast(pa.large_list(pa.large_binary()))
    return column


def _is_text(type_: pa.DataType) -> bool:
    return pa.types.is_string(type_) or pa.types.is_large_string(type_)


def _parquet_record(index: int, columns: list[str], row: tuple[Any, ...]) -> Record:
    try:
        cells = [_decoded(cell) for cell in row]
    except UnicodeDecodeError as error:
        problem = f"not UTF-8: byte 0x{error.object[error.start]:02x} at byte {error.start + 1} of a cell"
        return Record(index, None, problem, _row_excerpt(row))
    if sum(len(cell) for cell in row if isinstance(cell, bytes)) > MAX_LINE_BYTES:
        return Record(index, None, f"the row is longer than {MAX_LINE_BYTES >> 20} MB", _row_excerpt(row))
    return Record(index, dict(zip(columns, cells, strict=True)), None, _row_excerpt(row))


def _decoded(cell: Any) -> Any:
    if isinstance(cell, bytes):
        return cell.decode()
    if isinstance(cell, list):
        return [_decoded(item) for item in cell]
    return cell


def _row_excerpt(row: tuple[Any, ...]) -> str:
    return " | ".join(cell[:40].decode(errors="replace") if isinstance(cell, bytes) else "" for cell in row)

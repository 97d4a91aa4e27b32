"""Input files of every accepted format as a stream of records, in bounded memory.

A record is one line of JSON or text, one value of a JSON array, one row of a CSV, TSV or parquet file. What cannot be
read becomes a record with a `problem`; nothing is dropped here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from verl.data.columns import describe_names, names_in
from verl.data.delimited import header_separator, read_table, row_separator
from verl.data.json_values import read_values, spans_lines
from verl.data.lines import Line, Record, decoded, parse_record, read_lines, read_objects
from verl.data.opened import Opened, open_input
from verl.data.parquet_rows import ParquetRows
from verl.data.samples import (
    FIELDS,
    FIND_NEGATIVES,
    INSTRUCTION,
    OPTIONAL,
    BadSample,
    Mode,
    Sample,
    describe_need,
    has_fields,
    read_sample,
)
from verl.errors import UserError

TEXT_SOURCE = "wiki1m"
"""`source` of every line of an unsupervised .txt file."""

_TABLES = (".csv", ".tsv", ".tab")


@dataclass(frozen=True)
class Source:
    """An open input: its records, how many bytes of it are read, and how many there are."""

    records: Iterator[Record]
    position: Callable[[], int]
    size: int


@contextmanager
def open_source(path: Path, mode: Mode, columns: Sequence[str] = ()) -> Iterator[Source]:
    """Open `path` in the format of its content; in an unsupervised file named .txt each line is a text.

    Args:
        columns: the names of the values of rows that are lists, or of a table without a header.

    Raises:
        UserError: the file is missing or empty, is of no format that is read, or lacks a column.
    """
    if columns:
        _check_columns(columns, "--columns", mode)
    with open_input(path) as opened:
        if opened.is_parquet:
            rows = ParquetRows(opened.file, path)
            if columns:
                raise UserError(f"{path} is parquet and has names of its own; leave --columns out")
            _check_columns(rows.names, str(path), mode)
            accepted = {name for field in FIELDS[mode] + OPTIONAL[mode] for name in names_in(rows.names, field)}
            yield Source(
                rows.records(accepted | {"source", INSTRUCTION}), lambda: rows.share_read(opened.size), opened.size
            )
        else:
            yield Source(_text_records(opened, path, mode, columns), opened.position, opened.size)


def read_samples(path: Path, mode: Mode) -> Iterator[Sample]:
    """The samples of a file, for readers that accept no bad one.

    Raises:
        UserError: see `open_source`; or a line holds no sample, and the message has its number.
    """
    with open_source(path, mode) as source:
        yield from samples_of(source, path, mode)


def samples_of(source: Source, path: Path, mode: Mode) -> Iterator[Sample]:
    """The samples of an open file, as `read_samples` gives them, for readers that look at its position too.

    Raises:
        UserError: a line holds no sample, and the message has its number.
    """
    for record in source.records:
        if record.problem:
            raise UserError(f"{path}, line {record.line_idx + 1}: {record.problem}")
        if record.fields is None:
            continue
        try:
            yield read_sample(record.fields, mode)
        except BadSample as error:
            raise UserError(f"{path}, line {record.line_idx + 1}: {error}") from error


def _text_records(opened: Opened, path: Path, mode: Mode, columns: Sequence[str]) -> Iterator[Record]:
    if opened.suffix == ".txt" and mode == "unsupervised" and not columns:
        return map(_text_record, read_lines(opened.file))
    head = opened.head.decode(errors="replace")
    if head.lstrip().startswith(("{", "[")) and not (columns and opened.suffix in _TABLES):
        if spans_lines(head):
            return map(partial(parse_record, columns=columns), read_values(opened.file, path))
        return read_objects(opened.file, columns)
    if columns:
        return read_table(opened.file, row_separator(head, opened.suffix, columns, path), columns, path)
    if separator := header_separator(head, opened.suffix, partial(has_fields, mode=mode)):
        return read_table(opened.file, separator, (), path)
    if opened.suffix not in _TABLES and (not head.strip() or any(map(_begins_an_object, head.split("\n")))):
        return read_objects(opened.file)  # the file begins with blank or damaged lines
    raise UserError(_unknown_form(opened, path, mode))


def _text_record(line: Line) -> Record:
    if line.problem:
        return Record(line.line_idx, None, line.problem, line.text)
    text = line.text.strip()
    fields = {"text": text, "source": TEXT_SOURCE} if text else None
    return Record(line.line_idx, fields, None, text)


def _begins_an_object(line: str) -> bool:
    return line.lstrip().startswith("{")


def _check_columns(names: Sequence[str], where: str, mode: Mode) -> None:
    if not has_fields(names, mode):
        raise UserError(f"{where} has the columns {', '.join(names) or '(none)'}; {describe_need(mode, names)}")


def _unknown_form(opened: Opened, path: Path, mode: Mode) -> str:
    """What is wrong with a file that is neither JSON nor has the columns of its mode."""
    first_line = decoded(0, opened.head.partition(b"\n")[0])
    if first_line.problem:
        return f"the first line of {path} cannot be read: {first_line.problem}"
    head = opened.head.decode(errors="replace")
    if mode == "supervised" and header_separator(head, opened.suffix, partial(has_fields, mode="pairs")):
        return f"{path} has no column of negatives ({describe_names('negative')}); {FIND_NEGATIVES}"
    one_text_a_line = " A file of one text a line is named .txt." if mode == "unsupervised" else ""
    return (
        f"{path} is neither JSON nor a table with the columns that it needs: {describe_need(mode, ())}. Its first line "
        f"is {first_line.text.strip()[:80]!r}. Begin a table with a line of its columns' names, or give them to "
        f"process_data.py as --columns {','.join(FIELDS[mode])}.{one_text_a_line}"
    )

"""The rows of one file of a local task."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from verl.data.columns import find_value, names_of
from verl.data.lines import read_lines
from verl.data.rows import read_rows
from verl.errors import UserError

Columns = Mapping[str, Callable[[Any], Any]]
"""By column, the function of `verl.evaluation.cells` that reads it."""

_SHOWN_CHARS = 60


class Row(NamedTuple):
    where: str
    """File and line, for messages."""
    values: dict[str, Any]
    """By column."""


def read_part(file: Path, columns: Columns) -> list[Row]:
    """The rows of a file with `columns` under their own names.

    Raises:
        UserError: the file is empty or cannot be read, or a cell is not what its column needs.
    """
    records = _tsv_rows(file, list(columns)) if file.suffix == ".tsv" else read_rows(file)
    rows = [_read_row(where, record, columns) for where, record in records]
    if not rows:
        raise UserError(f"{file} is empty")
    return rows


def _read_row(where: str, record: dict[str, Any], columns: Columns) -> Row:
    info = record.get("extra_info")
    if isinstance(info, dict) and "positive_example" in info:  # a row of process_data.py
        record = {"query": info.get("original_query"), "positive": info["positive_example"],
                  "negative": info.get("negative_example")}  # fmt: skip
    values = {}
    for column, read in columns.items():
        _, value = find_value(record, column)
        try:
            values[column] = read(value)
        except ValueError as error:
            raise UserError(f"{where}: {'|'.join(names_of(column))} is {_shown(value)}, and must be {error}") from None
    return Row(where, values)


def _tsv_rows(file: Path, header: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a table whose first line is `header`; cells are not quoted."""
    with file.open("rb") as opened:
        for line in read_lines(opened):
            where = f"{file}, line {line.line_idx + 1}"
            cells = line.text.rstrip("\r\n").split("\t")
            if line.problem:
                raise UserError(f"{where}: {line.problem}")
            if line.line_idx == 0 and cells != header:
                raise UserError(
                    f"{where}: the header is {_shown(cells)}, and must be {', '.join(header)}, tabs between"
                )
            if line.line_idx == 0 or cells == [""]:
                continue
            if len(cells) != len(header):
                raise UserError(f"{where}: {len(cells)} cells, and must be {len(header)}: {', '.join(header)}")
            yield where, dict(zip(header, cells, strict=True))


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= _SHOWN_CHARS else f"{shown[:_SHOWN_CHARS]}..."

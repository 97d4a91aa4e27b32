"""Rows of JSON lines or parquet for readers that accept no bad row: the first one is an error."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from verl.data.lines import read_objects
from verl.data.parquet import open_parquet
from verl.errors import UserError

_BATCH_ROWS = 1_000


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row with its place for messages, `FILE, line 3` or, in a .parquet file, `FILE, row 3` (from 1).

    Every file that does not end in .parquet is read as JSON lines, whose blank lines are skipped.

    Raises:
        UserError: a line is not a JSON object, is not UTF-8 or is too long; or the parquet file cannot be read.
        OSError: the file cannot be opened.
    """
    return _parquet_rows(path) if path.suffix.lower() == ".parquet" else _json_rows(path)


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as file:
        for record in read_objects(file):
            place = f"{path}, line {record.line_idx + 1}"
            if record.problem:
                raise UserError(f"{place}: {record.problem}")
            if record.fields is not None:
                yield place, record.fields


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    with open_parquet(path) as file:
        try:
            for batch in file.iter_batches(_BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise UserError(f"{path} is damaged after row {number}: {error}") from error

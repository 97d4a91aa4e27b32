"""Rows of a parquet file as records, in bounded memory."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from verl.data.lines import MAX_LINE_BYTES, Record
from verl.data.parquet import is_list, is_text, open_parquet
from verl.errors import UserError

_BATCH_ROWS = 2_000


class ParquetRows:
    """The rows of an open parquet file.

    Raises:
        UserError: it is not parquet.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._path = path
        self._parquet = open_parquet(path, file)
        self.names: list[str] = self._parquet.schema_arrow.names
        self._num_read = 0

    def share_read(self, size: int) -> int:
        """The part of `size` that the rows read so far are of all rows."""
        return size * self._num_read // max(self._parquet.metadata.num_rows, 1)

    def records(self, accepted: Collection[str]) -> Iterator[Record]:
        """Yield a record per row, of the `accepted` columns that there are.

        Raises:
            UserError: the file is damaged.
        """
        columns = [name for name in self.names if name in accepted]
        try:
            for batch in self._parquet.iter_batches(_BATCH_ROWS, columns=columns):
                cells = [_undecoded(column).to_pylist() for column in batch.columns]
                for row in zip(*cells, strict=True):
                    yield _record(self._num_read, columns, row)
                    self._num_read += 1
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self._path} is damaged after row {self._num_read}: {error}") from error


def _undecoded(column: pa.Array) -> pa.Array:
    """`column` with its strings as bytes: parquet does not promise that they are UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if is_text(column.type):
        return column.cast(pa.large_binary())
    if is_list(column.type) and is_text(column.type.value_type):
        return column.cast(pa.large_list(pa.large_binary()))
    return column


def _record(index: int, columns: list[str], row: tuple[Any, ...]) -> Record:
    try:
        cells = [_decoded(cell) for cell in row]
    except UnicodeDecodeError as error:
        problem = f"not UTF-8: byte 0x{error.object[error.start]:02x} at byte {error.start + 1} of a cell"
        return Record(index, None, problem, _excerpt(row))
    if sum(len(cell) for cell in row if isinstance(cell, bytes)) > MAX_LINE_BYTES:
        return Record(index, None, f"the row is longer than {MAX_LINE_BYTES >> 20} MB", _excerpt(row))
    return Record(index, dict(zip(columns, cells, strict=True)), None, _excerpt(row))


def _decoded(cell: Any) -> Any:
    if isinstance(cell, bytes):
        return cell.decode()
    if isinstance(cell, list):
        return [_decoded(item) for item in cell]
    return cell


def _excerpt(row: tuple[Any, ...]) -> str:
    return " | ".join(cell[:40].decode(errors="replace") if isinstance(cell, bytes) else "" for cell in row)

"""Writers that take record batches as they come and keep only a bounded number in memory."""

from pathlib import Path
from types import TracebackType
from typing import Self

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

_GROUP_ROWS = 20_000
_GROUP_BYTES = 32 * 2**20


class ParquetSink:
    """A parquet file whose row groups have a useful size, however small the batches are.

    The file exists, with its schema, even when no row is added.

    Args:
        dictionary: parquet paths of the columns whose values repeat, or True to try all.
    """

    def __init__(self, path: Path, schema: pa.Schema, dictionary: list[str] | bool = True) -> None:
        self._schema = schema
        self._writer = pq.ParquetWriter(str(path), schema, use_dictionary=dictionary)
        self._pending: list[pa.RecordBatch] = []
        self._pending_rows = self._pending_bytes = 0
        self.num_rows = 0

    def add(self, batch: pa.RecordBatch) -> None:
        if len(batch) == 0:
            return
        self._pending.append(batch)
        self._pending_rows += len(batch)
        self._pending_bytes += batch.nbytes
        self.num_rows += len(batch)
        if self._pending_rows >= _GROUP_ROWS or self._pending_bytes >= _GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_table(pa.Table.from_batches(self._pending, self._schema))
            self._pending, self._pending_rows, self._pending_bytes = [], 0, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self._flush()
        self._writer.close()


class JsonArraySink:
    """One JSON array, an element per row, non-ASCII characters kept."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._separator = b"["

    def add(self, batch: pa.RecordBatch) -> None:
        for row in batch.to_pylist():
            self._file.write(self._separator + b"\n" + orjson.dumps(row, option=orjson.OPT_INDENT_2))
            self._separator = b","

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.write(b"[]\n" if self._separator == b"[" else b"\n]\n")
        self._file.close()

"""Opening parquet files, and the types of their columns."""

from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from verl.errors import UserError


def open_parquet(path: Path, file: BinaryIO | None = None) -> pq.ParquetFile:
    """Open a parquet file for reading with memory that does not grow with its row groups.

    Args:
        file: the file where it is open already; then `path` is its name in messages.

    Raises:
        UserError: it is not a parquet file.
        OSError: it cannot be opened.
    """
    try:
        # With a read buffer pyarrow streams; without one it loads the column chunks of a row group whole.
        return pq.ParquetFile(path if file is None else file, buffer_size=2**20)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is not a readable parquet file: {error}") from error


def is_text(type_: pa.DataType) -> bool:
    return pa.types.is_string(type_) or pa.types.is_large_string(type_)


def is_list(type_: pa.DataType) -> bool:
    return pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_)

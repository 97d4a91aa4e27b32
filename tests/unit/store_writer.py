"""Adds rows to a store until it is killed; prints how many it flushed: store_writer.py FOLDER FIRST_ROW [COUNT]."""

import sys
from pathlib import Path

import numpy as np

from verl.encoder.record import Rationale
from verl.encoder.store import EmbeddingStore, row_key

DIM = 8


def rationale_of(row: int) -> Rationale:
    return Rationale(tuple(range(row % 7, row % 7 + 5)), truncated=row % 3 == 0)


def vector_of(row: int) -> np.ndarray:
    return np.arange(row, row + DIM, dtype=np.float32)


def keys_of(row: int) -> tuple[bytes, bytes]:
    return row_key(b"rationales", [row]), row_key(b"vectors", [row])


def add(store: EmbeddingStore, row: int) -> None:
    rationale_key, vector_key = keys_of(row)
    store.add_rationale(b"rationales", rationale_key, rationale_of(row), f"text {row}", f"rationale {row}")
    store.add_vector(b"vectors", vector_key, vector_of(row))


if __name__ == "__main__":
    folder, first = Path(sys.argv[1]), int(sys.argv[2])
    last = first + int(sys.argv[3]) if len(sys.argv) > 3 else sys.maxsize
    store = EmbeddingStore(folder)
    row = first
    while row < last:
        add(store, row)
        row += 1
        if row % 50 == 0:
            store.flush()
            print(row, flush=True)
    store.close()
    print(row, flush=True)

"""Rationales and vectors on disk, so that no text is thought about twice and a killed run loses little.

The store is an SQLite database in write-ahead mode. Processes of one machine may share it, also while they write; a
`kill -9` at any moment leaves it whole and takes at most what was added since the last flush. A file system
shared by several machines is not supported by SQLite's write-ahead mode: give each machine a store of its own.

A row is found by a key: the hash of everything that decides its content. A rationale's key covers weights, sampling and
the ids of the rendered prompt (in which system prompt, template, role and text are); a vector's covers the rationale's
key and the pooling. So another pooling re-uses rationales, and no setting ever finds what another one made.
"""

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

FILE_NAME = "store.sqlite"
FLUSH_ROWS = 1000
FLUSH_SECONDS = 5.0
_VERSION = 1
_BUSY_SECONDS = 60
# Keys of one query; SQLite's own limit is 32,766.
_LOOKUP = 500
_SCHEMA = """
CREATE TABLE context (key BLOB PRIMARY KEY, description TEXT NOT NULL);
CREATE TABLE rationale (key BLOB PRIMARY KEY, context BLOB NOT NULL, text TEXT NOT NULL, rationale TEXT NOT NULL,
                        ids BLOB NOT NULL, truncated INTEGER NOT NULL);
CREATE TABLE vector (key BLOB PRIMARY KEY, context BLOB NOT NULL, vector BLOB NOT NULL);
"""


class StoreError(RuntimeError):
    """The store cannot be used; the message names its file and a way out."""


class Rationale(NamedTuple):
    """What the model wrote about one text."""

    ids: tuple[int, ...]
    """Token ids, the end token included when there is one."""
    truncated: bool
    """Whether it hit the length limit."""


class StoredRationale(NamedTuple):
    """A rationale with what a reader of the store wants to see."""

    rationale: Rationale
    text: str
    decoded: str


class EmbeddingStore:
    """The rationales and vectors of any number of models and settings.

    Args:
        folder: made when it is not there.

    Raises:
        StoreError: the folder or its database cannot be opened, or another version wrote it.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / FILE_NAME
        self._rationales: dict[bytes, tuple[bytes, StoredRationale]] = {}
        self._vectors: dict[bytes, tuple[bytes, np.ndarray]] = {}
        self._flushed_at = time.monotonic()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self.file, timeout=_BUSY_SECONDS, isolation_level=None)
            self._prepare()
        except (OSError, sqlite3.Error) as error:
            raise self._explained(error) from error

    def open_context(self, description: Mapping[str, Any]) -> bytes:
        """The key of a set of settings, which is kept in words beside it."""
        text = json.dumps(description, sort_keys=True, ensure_ascii=False)
        key = hashlib.sha256(text.encode()).digest()
        self._write("INSERT OR IGNORE INTO context VALUES (?, ?)", [(key, text)])
        return key

    def find_rationales(self, keys: Sequence[bytes]) -> dict[bytes, Rationale]:
        """Those of `keys` that are there."""
        found = {key: self._rationales[key][1].rationale for key in keys if key in self._rationales}
        for key, ids, truncated in self._look_up("SELECT key, ids, truncated FROM rationale WHERE key IN", keys):
            found[key] = Rationale(tuple(np.frombuffer(ids, "<i4").tolist()), bool(truncated))
        return found

    def find_vectors(self, keys: Sequence[bytes]) -> dict[bytes, np.ndarray]:
        """Those of `keys` that are there: [H] float32 each."""
        found = {key: self._vectors[key][1] for key in keys if key in self._vectors}
        for key, vector in self._look_up("SELECT key, vector FROM vector WHERE key IN", keys):
            found[key] = np.frombuffer(vector, "<f4")
        return found

    def add_rationales(self, context: bytes, rationales: Mapping[bytes, StoredRationale]) -> None:
        """Keep rationales under their keys; on disk after the next flush."""
        self._rationales |= {key: (context, stored) for key, stored in rationales.items()}
        self._flush_if_due()

    def add_vectors(self, context: bytes, vectors: Mapping[bytes, np.ndarray]) -> None:
        """Keep [H] float32 vectors under their keys; on disk after the next flush."""
        self._vectors |= {key: (context, vector) for key, vector in vectors.items()}
        self._flush_if_due()

    def flush(self) -> None:
        """Write what was added, in one transaction.

        Raises:
            StoreError: it could not be written; the disk may be full.
        """
        # A key that another process wrote first keeps that row.
        self._write(
            "INSERT OR IGNORE INTO rationale VALUES (?, ?, ?, ?, ?, ?)",
            [
                (key, context, r.text, r.decoded, np.array(r.rationale.ids, "<i4").tobytes(), r.rationale.truncated)
                for key, (context, r) in self._rationales.items()
            ],
        )
        self._write(
            "INSERT OR IGNORE INTO vector VALUES (?, ?, ?)",
            [(key, context, vector.astype("<f4").tobytes()) for key, (context, vector) in self._vectors.items()],
        )
        self._rationales.clear()
        self._vectors.clear()
        self._flushed_at = time.monotonic()

    def count(self) -> tuple[int, int]:
        """Rationales and vectors on disk."""
        (rationales,), (vectors,) = (
            self._database.execute(f"SELECT count(*) FROM {table}").fetchone() for table in ("rationale", "vector")
        )
        return rationales, vectors

    def close(self) -> None:
        self.flush()
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _prepare(self) -> None:
        database = self._database
        database.execute("PRAGMA journal_mode = WAL")
        # In write-ahead mode this survives a killed process; only a power cut can take the last transactions.
        database.execute("PRAGMA synchronous = NORMAL")
        database.execute("BEGIN IMMEDIATE")
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version == 0:
            for statement in filter(str.strip, _SCHEMA.split(";")):
                database.execute(statement)
            database.execute(f"PRAGMA user_version = {_VERSION}")
        database.execute("COMMIT")
        if version not in (0, _VERSION):
            raise StoreError(
                f"{self.file} was written by version {version} of the store, and this is version {_VERSION}; "
                "give another folder"
            )

    def _flush_if_due(self) -> None:
        waiting = max(len(self._rationales), len(self._vectors))
        if waiting >= FLUSH_ROWS or time.monotonic() - self._flushed_at >= FLUSH_SECONDS:
            self.flush()

    def _look_up(self, query: str, keys: Sequence[bytes]) -> Iterator[tuple[Any, ...]]:
        for start in range(0, len(keys), _LOOKUP):
            some = keys[start : start + _LOOKUP]
            places = ",".join("?" * len(some))
            try:
                yield from self._database.execute(f"{query} ({places})", some).fetchall()
            except sqlite3.Error as error:
                raise self._explained(error) from error

    def _write(self, statement: str, rows: Iterable[tuple[Any, ...]]) -> None:
        rows = list(rows)
        if not rows:
            return
        try:
            self._database.execute("BEGIN IMMEDIATE")
            self._database.executemany(statement, rows)
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise self._explained(error) from error

    def _explained(self, error: Exception) -> StoreError:
        return StoreError(
            f"the store {self.file} cannot be used: {error}. Is the disk full, is it another kind of file, or does "
            f"another process hold it for more than {_BUSY_SECONDS} s? Give another folder, or end that process."
        )


def row_key(context: bytes, *parts: bytes | Sequence[int]) -> bytes:
    """The key of one row: its context and what is its own (bytes, or token ids)."""
    digest = hashlib.sha256(context)
    for part in parts:
        digest.update(part if isinstance(part, bytes) else np.array(part, "<i4").tobytes())
    return digest.digest()

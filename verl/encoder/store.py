"""Rationales and vectors on disk, so that none is generated twice and a killed run loses little.

The store is an SQLite database in write-ahead mode. Processes of one machine may share it, also while they write; a
`kill -9` at any moment leaves it intact and loses at most what was added since the last flush. SQLite's write-ahead
mode does not work between machines that share a file system, so a store is open on one machine at a time.

A row is found by a key: the hash of everything that decides its content. A rationale's key covers weights, sampling and
the ids of the rendered prompt (which hold system prompt, template, role and text); a vector's key covers the
rationale's key and the pooling. So another pooling reuses rationales, and no setting finds what another one made.
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

from verl.encoder.record import Rationale
from verl.utils.locks import HeldError, NoLocksError, share_on_this_machine

FILE_NAME = "store.sqlite"
LOCK = "store.lock"
FLUSH_ROWS = 1000
FLUSH_SECONDS = 5.0
_VERSION = 1
_BUSY_SECONDS = 60
# Most keys of one query; SQLite's own limit is 32,766.
_LOOKUP_KEYS = 500
_SCHEMA = """
CREATE TABLE context (key BLOB PRIMARY KEY, description TEXT NOT NULL);
CREATE TABLE rationale (key BLOB PRIMARY KEY, context BLOB NOT NULL, text TEXT NOT NULL, rationale TEXT NOT NULL,
                        ids BLOB NOT NULL, truncated INTEGER NOT NULL);
CREATE TABLE vector (key BLOB PRIMARY KEY, context BLOB NOT NULL, vector BLOB NOT NULL);
"""


class StoreError(RuntimeError):
    """The store cannot be used; the message names its file and a way out."""


class _Pending(NamedTuple):
    """A rationale that is not on disk yet."""

    context: bytes
    rationale: Rationale
    text: str
    decoded: str


def store_beside(output: Path) -> Path:
    """The folder of the store that a program keeps until an output is written; nobody else's has such a name."""
    return output.with_name(f".{output.name}.store")


class EmbeddingStore:
    """The rationales and vectors of any number of models and settings.

    Args:
        folder: created when it does not exist.

    Raises:
        StoreError: the folder or its database cannot be opened, another machine uses it, or another version of the
            store wrote it.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / FILE_NAME
        self._rationales: dict[bytes, _Pending] = {}
        self._vectors: dict[bytes, tuple[bytes, np.ndarray]] = {}
        self._flushed_at = time.monotonic()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = share_on_this_machine(folder / LOCK)
            self._database = sqlite3.connect(self.file, timeout=_BUSY_SECONDS, isolation_level=None)
            self._prepare()
        except HeldError as error:
            raise StoreError(
                f"the store {self.file} is in use on another machine ({error}); only processes of one machine can "
                "share a store. Give this machine another folder, or wait"
            ) from None
        except (OSError, NoLocksError, sqlite3.Error) as error:
            raise self._explained(error) from error

    def open_context(self, description: Mapping[str, Any]) -> bytes:
        """The key of a set of settings; the settings are stored with it as JSON."""
        text = json.dumps(description, sort_keys=True, ensure_ascii=False)
        key = hashlib.sha256(text.encode()).digest()
        self._write("INSERT OR IGNORE INTO context VALUES (?, ?)", [(key, text)])
        return key

    def find_rationales(self, keys: Sequence[bytes]) -> dict[bytes, Rationale]:
        """The rationales of those `keys` that are stored."""
        found = {key: self._rationales[key].rationale for key in keys if key in self._rationales}
        for key, ids, truncated in self._look_up("SELECT key, ids, truncated FROM rationale WHERE key IN", keys):
            found[key] = Rationale(tuple(np.frombuffer(ids, "<i4").tolist()), bool(truncated))
        return found

    def find_vectors(self, keys: Sequence[bytes]) -> dict[bytes, np.ndarray]:
        """The vectors of those `keys` that are stored: [H] float32 each."""
        found = {key: self._vectors[key][1] for key in keys if key in self._vectors}
        for key, vector in self._look_up("SELECT key, vector FROM vector WHERE key IN", keys):
            found[key] = np.frombuffer(vector, "<f4")
        return found

    def add_rationale(self, context: bytes, key: bytes, rationale: Rationale, text: str, decoded: str) -> None:
        """Keep a rationale under its key; on disk after the next flush.

        Args:
            context: from `open_context`.
            text, decoded: what was embedded, and the rationale as text, for people who read the database.
        """
        self._rationales[key] = _Pending(context, rationale, text, decoded)
        self._flush_if_due()

    def add_vector(self, context: bytes, key: bytes, vector: np.ndarray) -> None:
        """Keep an [H] float32 vector under its key; on disk after the next flush."""
        self._vectors[key] = (context, vector)
        self._flush_if_due()

    def flush(self) -> None:
        """Write what was added: the rationales in one transaction, the vectors in another.

        Raises:
            StoreError: it could not be written; the disk may be full.
        """
        # OR IGNORE: a row that another process wrote first under the same key stays.
        self._write(
            "INSERT OR IGNORE INTO rationale VALUES (?, ?, ?, ?, ?, ?)",
            [
                (key, r.context, r.text, r.decoded, np.array(r.rationale.ids, "<i4").tobytes(), r.rationale.truncated)
                for key, r in self._rationales.items()
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
        """How many rationales and how many vectors are on disk."""
        (rationales,), (vectors,) = (
            self._database.execute(f"SELECT count(*) FROM {table}").fetchone() for table in ("rationale", "vector")
        )
        return rationales, vectors

    def close(self) -> None:
        self.flush()
        self._database.close()
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _prepare(self) -> None:
        database = self._database
        database.execute("PRAGMA journal_mode = WAL")
        # In write-ahead mode this survives a killed process; only a power cut can lose the last transactions.
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
        for start in range(0, len(keys), _LOOKUP_KEYS):
            some = keys[start : start + _LOOKUP_KEYS]
            marks = ",".join("?" * len(some))
            try:
                yield from self._database.execute(f"{query} ({marks})", some).fetchall()
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
    """The key of one row: a hash of its context and of the parts (bytes, or token ids) that are its own."""
    digest = hashlib.sha256(context)
    for part in parts:
        digest.update(part if isinstance(part, bytes) else np.array(part, "<i4").tobytes())
    return digest.digest()

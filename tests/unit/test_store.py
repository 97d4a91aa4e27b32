"""The store: flushed rows survive every kill, several processes share it, and errors say what to do."""

import random
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from store_writer import add, keys_of, rationale_of, vector_of

import verl.encoder.store as store_module
from verl.encoder.store import EmbeddingStore, StoreError, row_key

WRITER = Path(__file__).parent / "store_writer.py"
KILLS = 24


def check_rows(store: EmbeddingStore, rows: range) -> None:
    """Every row is stored, with its own content."""
    keys = [keys_of(row) for row in rows]
    rationales = store.find_rationales([key for key, _ in keys])
    vectors = store.find_vectors([key for _, key in keys])
    for row, (rationale_key, vector_key) in zip(rows, keys, strict=True):
        assert rationales[rationale_key] == rationale_of(row), row
        np.testing.assert_array_equal(vectors[vector_key], vector_of(row))


def test_added_rows_are_found_before_and_after_a_flush_and_by_a_later_process(tmp_path):
    with EmbeddingStore(tmp_path) as store:
        for row in range(3):
            add(store, row)
        check_rows(store, range(3))
        store.flush()
        check_rows(store, range(3))
        assert store.find_vectors([row_key(b"vectors", [99])]) == {}
    with EmbeddingStore(tmp_path) as store:
        check_rows(store, range(3))
        assert store.count() == (3, 3)


def test_a_flush_follows_a_thousand_rows_or_some_seconds(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(store_module.time, "monotonic", lambda: clock[0])
    store, reader = EmbeddingStore(tmp_path), EmbeddingStore(tmp_path)
    for row in range(999):
        add(store, row)
    assert reader.count() == (0, 0)
    add(store, 999)
    assert reader.count() == (1000, 999)
    add(store, 1000)
    clock[0] += store_module.FLUSH_SECONDS
    add(store, 1001)
    rationales, vectors = reader.count()
    assert rationales == 1002 and vectors >= 1001
    assert store_module.FLUSH_ROWS <= 1000 and store_module.FLUSH_SECONDS <= 60


def test_a_killed_writer_loses_at_most_what_it_had_not_flushed(tmp_path):
    """The writer is killed many times at random moments; all rows that it reported as flushed are stored and intact."""
    draw = random.Random(0)
    flushed = 0
    for kill in range(KILLS):
        process = subprocess.Popen(
            [sys.executable, str(WRITER), str(tmp_path), str(flushed)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(draw.randint(1, 40)):
            flushed = int(process.stdout.readline())
        process.kill()
        flushed = max([flushed, *map(int, process.stdout.read().split())])
        assert process.wait() == -9
        with EmbeddingStore(tmp_path) as store:
            check_rows(store, range(flushed))
            (state,) = store._database.execute("PRAGMA integrity_check").fetchone()
            assert state == "ok", f"after kill {kill}"
    assert flushed > 1000


def test_processes_that_start_and_write_together_share_a_store(tmp_path):
    writers = [
        subprocess.Popen([sys.executable, str(WRITER), str(tmp_path), str(first), "400"], stdout=subprocess.PIPE)
        for first in (0, 200, 600, 0)
    ]
    assert [writer.wait() for writer in writers] == [0, 0, 0, 0]
    with EmbeddingStore(tmp_path) as store:
        check_rows(store, range(1000))
        assert store.count() == (1000, 1000)


def test_the_first_of_two_rows_with_the_same_key_stays(tmp_path):
    first, second = EmbeddingStore(tmp_path), EmbeddingStore(tmp_path)
    key = row_key(b"vectors", [1])
    first.add_vector(b"vectors", key, vector_of(1))
    first.flush()
    second.add_vector(b"vectors", key, vector_of(2))
    second.flush()
    np.testing.assert_array_equal(EmbeddingStore(tmp_path).find_vectors([key])[key], vector_of(1))


def test_keys_differ_by_context_and_parts():
    keys = [
        row_key(b"a", [1, 2]), row_key(b"a", [1, 3]), row_key(b"b", [1, 2]), row_key(b"a", [1, 2], [3]),
        row_key(b"a", b"x", [1]), row_key(b"a", b"x", [2]),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)


def test_a_context_is_stored_as_json(tmp_path):
    with EmbeddingStore(tmp_path) as store:
        key = store.open_context({"weights": "abc", "seed": 1})
        assert key == store.open_context({"seed": 1, "weights": "abc"}) != store.open_context({"seed": 2})
        rows = dict(store._database.execute("SELECT key, description FROM context").fetchall())
    assert rows[key] == '{"seed": 1, "weights": "abc"}'


def test_another_kind_of_file_is_rejected_and_not_changed(tmp_path):
    (tmp_path / "store.sqlite").write_text("not a database, and longer than a header of one hundred bytes " * 9)
    with pytest.raises(StoreError, match=r"store\.sqlite cannot be used: file is not a database.* Give another folder"):
        EmbeddingStore(tmp_path)
    assert (tmp_path / "store.sqlite").read_text().startswith("not a database")


def test_a_store_of_another_version_is_rejected(tmp_path):
    EmbeddingStore(tmp_path).close()
    with sqlite3.connect(tmp_path / "store.sqlite") as database:
        database.execute("PRAGMA user_version = 7")
    with pytest.raises(StoreError, match="written by version 7 of the store, and this is version 1"):
        EmbeddingStore(tmp_path)


def test_a_full_disk_is_an_error_and_flushed_rows_stay(tmp_path):
    store = EmbeddingStore(tmp_path)
    for row in range(10):
        add(store, row)
    store.flush()
    (pages,) = store._database.execute("PRAGMA page_count").fetchone()
    store._database.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreError, match="database or disk is full"):
        for row in range(10, 2000):
            add(store, row)
    with EmbeddingStore(tmp_path) as again:
        check_rows(again, range(10))


def test_a_store_is_open_on_one_machine_at_a_time(tmp_path, monkeypatch):
    """SQLite's write-ahead mode goes wrong between machines, without a word."""
    with EmbeddingStore(tmp_path), EmbeddingStore(tmp_path):
        monkeypatch.setattr("verl.utils.locks._boot_id", lambda: "another machine")
        with pytest.raises(StoreError, match=r"in use on another machine \(pid .* Give this machine another"):
            EmbeddingStore(tmp_path)
    EmbeddingStore(tmp_path).close()

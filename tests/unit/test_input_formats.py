"""process_data.py: formats, and names of columns, that it reads."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import reference_text, reference_triplet, rows_of, run, triplet, write_jsonl, write_texts


@pytest.mark.parametrize(
    "record",
    [
        {"query": "q", "positive": "p", "negative": "n"},
        {"anchor": "q", "pos": "p", "neg": "n"},
        {"anchor": ["q"], "pos": ["", "  ", "p", "p2"], "negatives": [None, "n", "n2"]},
        {"query": None, "anchor": "q", "positive": "p", "negative": None, "neg": ["n"]},
    ],
)
def test_aliases_and_lists(tmp_path: Path, record: dict[str, Any]) -> None:
    assert run("supervised", write_jsonl(tmp_path / "in.jsonl", [record]), tmp_path) == 0
    assert rows_of(tmp_path, "train") == [reference_triplet("train", 0, 0, ("q", "p", "n"), None)]


def test_csv_and_parquet_give_the_rows_of_jsonl(tmp_path: Path) -> None:
    records = [triplet(i, source="s") for i in range(5)]
    records[2]["positive"] = 'two\nlines, "quoted", naïve'
    write_jsonl(tmp_path / "in.jsonl", records)
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "in.parquet")
    with (tmp_path / "in.CSV").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["source", "negative", "query", "positive"])  # read by name, not position
        writer.writeheader()
        writer.writerows(records)
    for name in ("in.jsonl", "in.parquet", "in.CSV"):
        assert run("supervised", tmp_path / name, tmp_path / name.replace(".", "_")) == 0
    expected = rows_of(tmp_path / "in_jsonl", "train")
    assert [row["extra_info"]["positive_example"] for row in expected][2] == records[2]["positive"]
    assert rows_of(tmp_path / "in_parquet", "train") == expected
    from_csv = rows_of(tmp_path / "in_CSV", "train")
    # Physical lines of the CSV: the header is one, and the third record covers two.
    assert [row["extra_info"].pop("line_idx") for row in from_csv] == [1, 2, 3, 5, 6]
    for row in expected:
        del row["extra_info"]["line_idx"]
    assert from_csv == expected


@pytest.mark.parametrize(
    "column",
    [
        pa.array([["", "n"], ["n"], [None, "n"]], pa.list_(pa.string())),
        pa.array([["n"]] * 3, pa.large_list(pa.large_string())),
        pa.array(["n"] * 3).dictionary_encode(),
        pa.array(["n"] * 3, pa.large_string()),
    ],
)
def test_parquet_column_types(tmp_path: Path, column: pa.Array) -> None:
    table = pa.table({"anchor": ["q"] * 3, "pos": ["p"] * 3, "negatives": column, "unused": [1, 2, 3]})
    pq.write_table(table, tmp_path / "in.parquet")
    assert run("supervised", tmp_path / "in.parquet", tmp_path) == 0
    expected = [reference_triplet("train", i, i, ("q", "p", "n"), None) for i in range(3)]
    assert rows_of(tmp_path, "train") == expected


def test_txt_is_texts_or_json_lines_by_mode(tmp_path: Path) -> None:
    line = json.dumps(triplet(0))
    source = write_texts(tmp_path / "in.TXT", [f"  {line} "])
    assert run("unsupervised", source, tmp_path / "u") == 0
    assert rows_of(tmp_path / "u", "train") == [reference_text("train", 0, 0, line, "wiki1m")]
    assert run("supervised", source, tmp_path / "s") == 0
    expected = reference_triplet("train", 0, 0, ("query 0", "positive 0", "negative 0"), None)
    assert rows_of(tmp_path / "s", "train") == [expected]

"""process_data.py: the rows and the schema that it writes, against plain-Python references."""

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import reference_text, reference_triplet, rows_of, run, triplet, write_jsonl, write_texts


def test_supervised_rows_equal_the_reference(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    lines = [
        json.dumps(triplet(0, source="nli", ignored=[1])),
        "",
        json.dumps({"query": " q \n", "positive": "\tüber p", "negative": "n\u2028", "source": None}),
        "   \t",
        json.dumps(triplet(2, source="")),
        json.dumps(triplet(3)),
    ]
    source.write_text("\n".join(lines), encoding="utf-8")  # no newline at the end
    assert run("supervised", source, tmp_path / "out", "--test_ratio", 0.3) == 0
    texts = [("query 0", "positive 0", "negative 0"), ("q", "über p", "n")]
    texts += [(f"query {i}", f"positive {i}", f"negative {i}") for i in (2, 3)]
    assert rows_of(tmp_path / "out", "test") == [reference_triplet("test", 0, 0, texts[0], "nli")]
    assert rows_of(tmp_path / "out", "train") == [
        reference_triplet("train", 0, 2, texts[1], None),
        reference_triplet("train", 1, 4, texts[2], ""),
        reference_triplet("train", 2, 5, texts[3], None),
    ]


def test_unsupervised_rows_equal_the_reference_across_batches(tmp_path: Path) -> None:
    rng = random.Random(3)
    words = ["otter", "naïve", "港", "{json}", '"quoted"', "😀"]
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(9_000)]  # more than one batch
    source = write_jsonl(tmp_path / "in.json", [{"text": f" {t}\n", "source": t[:3]} for t in texts])
    assert run("unsupervised", source, tmp_path / "out", "--test_ratio", 0.955) == 0
    expected_test = [reference_text("test", i, i, t, t[:3]) for i, t in enumerate(texts[:8595])]
    expected_train = [reference_text("train", i, i + 8595, t, t[:3]) for i, t in enumerate(texts[8595:])]
    assert rows_of(tmp_path / "out", "test") == expected_test
    assert rows_of(tmp_path / "out", "train") == expected_train


MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
EXTRA = [("split", pa.string()), ("index", pa.int64())]
ENDS = [("source", pa.string()), ("line_idx", pa.int64())]
COMMON = [
    ("data_source", pa.string()),
    ("prompt", MESSAGES),
    ("ability", pa.string()),
    ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
]
TRIPLET_TEXTS = [(name, pa.string()) for name in ("original_query", "positive_example", "negative_example")]
TRIPLET = [(name, pa.string()) for name in ("query", "instruction", "negative_document")]
EXPECTED_SCHEMAS = {
    "supervised": pa.schema(
        [
            *COMMON,
            ("extra_info", pa.struct(EXTRA + TRIPLET_TEXTS + ENDS)),
            ("multi_input", pa.struct(TRIPLET)),
            ("positives", pa.list_(pa.string())),
            ("negatives", pa.list_(pa.string())),
        ]
    ),
    "unsupervised": pa.schema([*COMMON, ("extra_info", pa.struct([*EXTRA, ("text", pa.string()), *ENDS]))]),
}


@pytest.mark.parametrize("mode", ["supervised", "unsupervised"])
@pytest.mark.parametrize("ratio", [0, 0.5])
def test_both_splits_have_the_schema_even_if_empty_or_without_sources(tmp_path: Path, mode: str, ratio: float) -> None:
    good = [triplet(i) | {"text": f"t {i}"} for i in range(4)]  # no source anywhere
    assert run(mode, write_jsonl(tmp_path / "in.jsonl", good), tmp_path, "--test_ratio", ratio) == 0
    for split, rows in (("train", 4 - int(4 * ratio)), ("test", int(4 * ratio))):
        table = pq.read_table(tmp_path / f"{split}.parquet")
        assert table.schema.equals(EXPECTED_SCHEMAS[mode])
        assert table.num_rows == rows


def test_an_empty_split_replaces_the_file_of_an_earlier_run(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "in.txt", ["a", "b"])
    assert run("unsupervised", source, tmp_path, "--test_ratio", 0.5) == 0
    assert len(rows_of(tmp_path, "test")) == 1
    assert run("unsupervised", source, tmp_path, "--test_ratio", 0) == 0
    assert rows_of(tmp_path, "test") == []

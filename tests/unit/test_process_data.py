"""process_data.py against plain-Python references, and against every bad input it promises to survive."""

import csv
import hashlib
import importlib.util
import io
import json
import os
import pty
import random
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl.data.lines import MAX_LINE_BYTES, read_lines
from verl.data.split import build_splitter
from verl.embedding.prompts import SYSTEM_PROMPT

ROOT = Path(__file__).resolve().parents[2]


def load_program(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


process_data = load_program("process_data")


def run(mode: str, input_file: Path, local_dir: Path, *more: object) -> int:
    argv = ["--mode", mode, "--input_file", input_file, "--local_dir", local_dir, *more]
    return process_data.main([str(a) for a in argv])


def rows_of(local_dir: Path, split: str) -> list[dict[str, Any]]:
    return pq.read_table(local_dir / f"{split}.parquet").to_pylist()


def counts_of(local_dir: Path) -> dict[str, int]:
    return json.loads((local_dir / "manifest.json").read_text())["counts"]


def write_jsonl(path: Path, objects: list[Any]) -> Path:
    path.write_text("".join(json.dumps(o, ensure_ascii=False) + "\n" for o in objects), encoding="utf-8")
    return path


def write_texts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return path


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": text}]


def reference_triplet(split: str, index: int, line_idx: int, texts: tuple[str, str, str], source: str | None) -> dict:
    query, positive, negative = texts
    return {
        "data_source": "supervised",
        "prompt": chat(positive),
        "ability": "natural_language_inference",
        "reward_model": {"style": "multi_input", "ground_truth": positive},
        "extra_info": {
            "split": split,
            "index": index,
            "original_query": query,
            "positive_example": positive,
            "negative_example": negative,
            "source": source,
            "line_idx": line_idx,
        },
        "multi_input": {"query": query, "instruction": positive, "negative_document": negative},
    }


def reference_text(split: str, index: int, line_idx: int, text: str, source: str | None) -> dict:
    return {
        "data_source": "unsupervised",
        "prompt": chat(text),
        "ability": "natural_language_inference",
        "reward_model": {"style": "unsupervised", "ground_truth": ""},
        "extra_info": {"split": split, "index": index, "text": text, "source": source, "line_idx": line_idx},
    }


def triplet(i: int, **more: Any) -> dict[str, Any]:
    return {"query": f"query {i}", "positive": f"positive {i}", "negative": f"negative {i}", **more}


# ---- rows and schema ----


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


# ---- formats and names ----


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


# ---- split, duplicates ----


@pytest.mark.parametrize(("num", "ratio"), [(7, 0.3), (100, 0.01), (99, 0.01), (3, 0.999), (10, 0.7), (1, 0.5)])
def test_leading_split(tmp_path: Path, num: int, ratio: float) -> None:
    texts = [f"text {i}" for i in range(num)]
    assert run("unsupervised", write_texts(tmp_path / "in.txt", texts), tmp_path, "--test_ratio", ratio) == 0
    infos = {split: [row["extra_info"] for row in rows_of(tmp_path, split)] for split in ("test", "train")}
    assert [info["text"] for info in infos["test"]] == texts[: int(num * ratio)]
    assert [info["text"] for info in infos["train"]] == texts[int(num * ratio) :]
    for split, rows in infos.items():
        assert [info["index"] for info in rows] == list(range(len(rows)))
        assert {info["split"] for info in rows} <= {split}


def test_seeded_split_is_exact_repeatable_and_keeps_the_order(tmp_path: Path) -> None:
    num = 20_000
    source = write_texts(tmp_path / "in.txt", [f"text {i}" for i in range(num)])
    chosen = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run("unsupervised", source, tmp_path / name, "--test_ratio", 0.013, "--seed", seed) == 0
        test, train = (
            [row["extra_info"]["line_idx"] for row in rows_of(tmp_path / name, split)] for split in ("test", "train")
        )
        assert len(test) == int(num * 0.013)
        assert sorted(test + train) == list(range(num))
        assert (test, train) == (sorted(test), sorted(train))
        chosen[name] = test
    assert chosen["a"] == chosen["b"] != chosen["c"]
    digests = [hashlib.sha256((tmp_path / n / "train.parquet").read_bytes()).hexdigest() for n in "ab"]
    assert digests[0] == digests[1]


def test_seeded_split_is_fair() -> None:
    hits: Counter[int] = Counter()
    for seed in range(2_000):
        split = build_splitter(10, 0.3, seed)
        mask = [*split(4), *split(0), *split(6)]
        assert sum(mask) == 3
        hits.update(i for i, is_test in enumerate(mask) if is_test)
    # 600 expected each, standard deviation 20.5.
    assert all(abs(hits[i] - 600) < 100 for i in range(10)), hits


@pytest.mark.parametrize("seed", [None, 4])
def test_duplicates_and_overlap_equal_brute_force(tmp_path: Path, seed: int | None) -> None:
    rng = random.Random(0)
    records = [
        {k: str(rng.randint(0, 6)) for k in ("query", "positive", "negative")} | {"source": f"s{i}"} for i in range(600)
    ]
    source = write_jsonl(tmp_path / "in.jsonl", records)
    more = [] if seed is None else ["--seed", seed]
    assert run("supervised", source, tmp_path, "--test_ratio", 0.1, *more) == 0
    parts = {
        split: [tuple(row["multi_input"].values()) for row in rows_of(tmp_path, split)] for split in ("train", "test")
    }
    counts = counts_of(tmp_path)
    assert counts["duplicates"] == 600 - len(set(parts["train"] + parts["test"])) > 0
    assert counts["test_also_in_train"] == sum(t in set(parts["train"]) for t in parts["test"]) > 0


def test_max_samples_stops_reading(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "in.txt", ["a", "", "b\0", "c", "d", "\0", "\0"])
    assert run("unsupervised", source, tmp_path, "--max_samples", 2, "--max_rejected", 0.5) == 0
    assert [row["extra_info"]["text"] for row in rows_of(tmp_path, "train")] == ["a", "c"]
    counts = counts_of(tmp_path)
    assert [counts[k] for k in ("lines", "blank", "accepted", "rejected")] == [4, 1, 2, 1]


# ---- bad lines ----

BAD_JSON_LINES = [
    (b"{", "not valid JSON"),
    (b"12", "a JSON int instead of an object"),
    (b"null", "a JSON NoneType instead of an object"),
    (b'["query"]', "a JSON list instead of an object"),
    (b'"text"', "a JSON str instead of an object"),
    (b'{"query": "q", "positive": "p"}', "no negative (negative|neg|negatives)"),
    (b'{"query": "q", "positive": "p", "negative": null}', "negative is empty"),
    (b'{"query": "q", "positive": "p", "negatives": []}', "negatives is empty"),
    (b'{"query": "q", "positive": "p", "neg": ["", " "]}', "neg is empty"),
    (b'{"query": "  ", "positive": "p", "negative": "n"}', "query is empty"),
    (b'{"query": 5, "positive": "p", "negative": "n"}', "query is or holds int, not a string"),
    (b'{"query": "q", "positive": [["p"]], "negative": "n"}', "positive is or holds list"),
    (b'{"query": "q", "positive": "p\\u0000", "negative": "n"}', "positive holds a NUL character"),
    (b'{"query": "q", "positive": "\\ud800", "negative": "n"}', "not valid JSON"),
    (b'{"query": "q", "positive": "\xff", "negative": "n"}', "not UTF-8: byte 0xff at byte 29"),
    (b'{"query": "q", "positive": "p", "negative": "n", "source": 3}', "source is or holds int"),
    (b'{"query": "' + b"q" * MAX_LINE_BYTES + b'"}', "the line is longer than 10 MB"),
    (b"[" * 5_000, "not valid JSON"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD_JSON_LINES, ids=[r for _, r in BAD_JSON_LINES])
def test_a_bad_line_is_rejected_and_the_rest_is_kept(tmp_path: Path, bad: bytes, reason: str) -> None:
    good = [json.dumps(triplet(i)).encode() for i in range(200)]
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\n".join([*good[:50], bad, *good[50:]]) + b"\n")
    assert run("supervised", source, tmp_path / "out") == 0
    (entry,) = map(json.loads, (tmp_path / "out" / "rejected.jsonl").read_text("utf-8").splitlines())
    assert entry["line"] == 51
    assert entry["reason"].startswith(reason)
    assert entry["excerpt"] == bad[:120].decode(errors="replace")
    counts = counts_of(tmp_path / "out")
    assert (counts["lines"], counts["accepted"], counts["rejected"]) == (201, 200, 1)
    lines = [row["extra_info"]["line_idx"] for split in ("test", "train") for row in rows_of(tmp_path / "out", split)]
    assert lines == [*range(50), *range(51, 201)]


def test_bad_csv_rows(tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    rows = [
        b"text,source",
        b"one,a",
        b"",
        b"two",
        b"th\xffee,a",
        b'"fo"ur,a',
        b",a",
        b"five,",
        b'"open,a',
        b"six,a",
    ]
    source.write_bytes(b"\r\n".join(rows) + b"\r\n")
    assert run("unsupervised", source, tmp_path, "--max_rejected", 1, "--test_ratio", 0) == 0
    found = [(r["extra_info"]["text"], r["extra_info"]["source"]) for r in rows_of(tmp_path, "train")]
    assert found == [("one", "a"), ("five", None)]
    rejects = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text("utf-8").splitlines()]
    # The open quote swallows the rest of the file, and each swallowed line counts.
    assert [r["line"] for r in rejects] == [4, 5, 6, 7, 9, 10]
    assert "1 cells, but the header has 2 columns" in rejects[0]["reason"]
    assert "not UTF-8" in rejects[1]["reason"]
    assert "not valid CSV" in rejects[2]["reason"]
    assert "text is empty" in rejects[3]["reason"]
    counts = counts_of(tmp_path)
    assert [counts[k] for k in ("lines", "blank", "accepted", "rejected")] == [9, 1, 2, 6]


@pytest.mark.parametrize("dictionary", [False, True])
def test_bad_parquet_cells(tmp_path: Path, dictionary: bool) -> None:
    cells = pa.array([b"one", b"\xff", None, b" ", b"x" * (MAX_LINE_BYTES + 1), b"six"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(cells), cells.buffers(), cells.null_count)
    table = pa.table({"text": text.dictionary_encode() if dictionary else text})
    pq.write_table(table, tmp_path / "in.parquet")
    assert run("unsupervised", tmp_path / "in.parquet", tmp_path, "--max_rejected", 1) == 0
    assert [row["extra_info"]["line_idx"] for row in rows_of(tmp_path, "train")] == [0, 5]
    rejects = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text("utf-8").splitlines()]
    assert [(r["line"], r["reason"].split(":")[0]) for r in rejects] == [
        (2, "not UTF-8"),
        (3, "text is empty"),
        (4, "text is empty"),
        (5, "the row is longer than 10 MB"),
    ]


class OneLine(io.RawIOBase):
    """300 MB without a newline, then a short line."""

    def __init__(self) -> None:
        self.left = 300 * 2**20

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.left <= 0:
            data = b"\nend" if self.left == 0 else b""
            self.left = -1
            buffer[: len(data)] = data
            return len(data)
        size = min(len(buffer), self.left)
        buffer[:size] = b"x" * size
        self.left -= size
        return size


def test_a_giant_line_is_never_held() -> None:
    tracemalloc.start()
    lines = list(read_lines(io.BufferedReader(OneLine(), 2**20)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(line.line_idx, line.problem is None) for line in lines] == [(0, False), (1, True)]
    assert lines[1].text == "end"
    assert peak < 40 * 2**20


LINES = st.lists(st.binary(max_size=30).map(lambda b: b.replace(b"\n", b"")), max_size=30)
JSONISH = st.lists(
    st.one_of(
        st.binary(max_size=12).map(lambda b: b.replace(b"\n", b"")),
        st.dictionaries(st.sampled_from(["text", "sentence", "source"]), st.text(max_size=5)).map(
            lambda d: json.dumps(d).encode()
        ),
    ),
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(extension=st.sampled_from(["txt", "jsonl", "csv"]), lines=st.one_of(LINES, JSONISH))
def test_every_line_is_accepted_rejected_or_blank(
    tmp_path_factory: pytest.TempPathFactory, extension: str, lines: list[bytes]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    first = {"txt": [b"fine"], "jsonl": [b'{"text": "fine"}'], "csv": [b"text", b"fine"]}[extension]
    data = b"\n".join([*first, *lines])
    (folder / f"in.{extension}").write_bytes(data)
    assert run("unsupervised", folder / f"in.{extension}", folder, "--max_rejected", 1) == 0
    counts = counts_of(folder)
    assert counts["accepted"] + counts["rejected"] + counts["blank"] == counts["lines"]
    assert counts["train"] + counts["test"] == counts["accepted"]
    assert counts["rejected"] == len((folder / "rejected.jsonl").read_bytes().splitlines())
    physical = data.split(b"\n")
    if physical[-1] == b"":
        physical.pop()
    if extension != "csv":
        assert counts["lines"] == len(physical)
    if extension == "txt":
        assert counts["accepted"] == sum(map(is_usable_text, physical))


def is_usable_text(line: bytes) -> bool:
    try:
        text = line.decode().strip()
    except UnicodeDecodeError:
        return False
    return bool(text) and "\0" not in text


# ---- runs that fail ----


def one_complaint(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.startswith("process_data: ")
    assert error.count("\n") == 1
    return error


def test_too_many_bad_lines_fail_and_leave_only_the_evidence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"text {i}" for i in range(95)] + ["\0"] * 5
    source = write_texts(tmp_path / "in.txt", lines)
    out = tmp_path / "out"
    assert run("unsupervised", source, out, "--max_rejected", 0.04) == 2
    message = one_complaint(capsys)
    reasons = "line 96: text holds a NUL character; line 97: text holds a NUL character; line 98: text holds"
    for part in ("5 of 100 lines", "5.0%", "--max_rejected 0.04", reasons, str(out / "rejected.jsonl")):
        assert part in message
    assert "line 99" not in message
    assert [path.name for path in out.iterdir()] == ["rejected.jsonl"]
    assert len((out / "rejected.jsonl").read_text().splitlines()) == 5
    assert run("unsupervised", source, out, "--max_rejected", 0.05) == 0
    assert len(rows_of(out, "train")) == 95


def test_a_failing_run_leaves_the_earlier_outputs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("unsupervised", write_texts(tmp_path / "good.txt", ["a"]), out) == 0
    before = {name: (out / name).read_bytes() for name in ("train.parquet", "test.parquet", "manifest.json")}
    assert run("unsupervised", write_texts(tmp_path / "bad.txt", ["b", "\0"]), out) == 2
    assert {name: (out / name).read_bytes() for name in before} == before


FAILURES = [
    ("unsupervised", "in.txt", None, [], "in.txt does not exist"),
    ("unsupervised", "in.txt", b"", [], "in.txt is empty"),
    ("unsupervised", "in.txt", b"\n  \n", [], "has no sample: 2 lines are blank, 0 rejected"),
    (
        "unsupervised",
        "in.txt",
        b"\0\n",
        ["--max_rejected", "1"],
        "has no sample: 0 lines are blank, 1 rejected",
    ),
    (
        "unsupervised",
        "in.jsonl",
        b'{"title": 1, "body": "b"}\n' * 3,
        [],
        "found title, body, need text|sentence",
    ),
    ("supervised", "in.jsonl", b'{"query": "q", "pos": "p"}\n', [], "found query, pos, need query|anchor,"),
    (
        "supervised",
        "in.csv",
        b"query,positive\na,b\n",
        [],
        "has the columns query, positive; --mode supervised",
    ),
    ("supervised", "in.csv", b'a"b\n"', [], "--mode supervised needs"),
    ("unsupervised", "in.csv", b"te\xffxt\na\n", [], "not UTF-8"),
    ("unsupervised", "in.parquet", b"not parquet", [], "is not a readable parquet file"),
    ("unsupervised", "in.txt", b"a\n", ["--test_ratio", "1"], "--test_ratio is 1.0"),
    ("unsupervised", "in.txt", b"a\n", ["--test_ratio", "-0.1"], "--test_ratio is -0.1"),
    ("unsupervised", "in.txt", b"a\n", ["--test_ratio", "nan"], "--test_ratio is nan"),
    ("unsupervised", "in.txt", b"a\n", ["--max_samples", "0"], "--max_samples is 0"),
    ("unsupervised", "in.txt", b"a\n", ["--max_rejected", "2"], "--max_rejected is 2.0"),
]


@pytest.mark.parametrize(("mode", "name", "content", "more", "message"), FAILURES)
def test_failures_are_one_line_and_exit_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    mode: str,
    name: str,
    content: bytes | None,
    more: list[str],
    message: str,
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert run(mode, tmp_path / name, tmp_path / "out", *more) == 2
    assert message in one_complaint(capsys)
    left = {path.name for path in (tmp_path / "out").iterdir()} if (tmp_path / "out").exists() else set()
    assert left <= {"rejected.jsonl"}


def test_wrong_parquet_columns_folders_and_overwriting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.table({"title": ["a"]}), tmp_path / "in.parquet")
    assert run("unsupervised", tmp_path / "in.parquet", tmp_path / "out") == 2
    assert "has the columns title; --mode unsupervised needs text|sentence" in one_complaint(capsys)
    assert run("unsupervised", tmp_path, tmp_path / "out") == 2
    assert "is not a file" in one_complaint(capsys)
    source = write_jsonl(tmp_path / "train.json", [{"text": "a"}])
    assert run("unsupervised", source, tmp_path) == 2
    assert "would be overwritten" in one_complaint(capsys)
    assert source.exists()
    assert run("unsupervised", source, source) == 2
    assert "is not a folder" in one_complaint(capsys)


def test_damaged_parquet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "in.parquet"
    texts = [f"text {random.Random(i).random()}" for i in range(5_000)]
    pq.write_table(pa.table({"text": texts}), path, use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[4:2_000] = b"\xff" * 1_996
    path.write_bytes(data)
    assert run("unsupervised", path, tmp_path / "out") == 2
    one_complaint(capsys)
    assert not list((tmp_path / "out").glob("*.parquet"))


# ---- other outputs ----


def test_manifest_describes_the_files(tmp_path: Path) -> None:
    lines = ["a", "", "b", "a", "c\0"]
    source = write_texts(tmp_path / "in.txt", lines)
    out = tmp_path / "out"
    assert run("unsupervised", source, out, "--test_ratio", 0.4, "--max_rejected", 0.5, "--write_json") == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["counts"] == {
        "lines": 5,
        "blank": 1,
        "accepted": 3,
        "rejected": 1,
        "train": 2,
        "test": 1,
        "duplicates": 1,
        "test_also_in_train": 1,
    }
    names = {"train.parquet", "test.parquet", "train.json", "test.json", "rejected.jsonl"}
    assert set(manifest["outputs"]) == names
    assert {path.name for path in out.iterdir()} == names | {"manifest.json"}
    for path, entry in [(source, manifest["input"]), *((out / n, manifest["outputs"][n]) for n in names)]:
        data = path.read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert manifest["arguments"]["test_ratio"] == 0.4
    assert manifest["versions"]["pyarrow"] == pa.__version__


def test_json_arrays_hold_the_parquet_rows_and_do_not_go_stale(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [triplet(i, source="süß") for i in range(3)])
    assert run("supervised", source, tmp_path / "out", "--write_json", "--test_ratio", 0) == 0
    train = (tmp_path / "out" / "train.json").read_text("utf-8")
    assert json.loads(train) == rows_of(tmp_path / "out", "train")
    assert "süß" in train
    assert json.loads((tmp_path / "out" / "test.json").read_text()) == []
    assert run("supervised", source, tmp_path / "out") == 0
    assert [path.name for path in (tmp_path / "out").glob("*.json")] == ["manifest.json"]


def test_copies(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "in.txt", ["a", "b"])
    out, existing = tmp_path / "out", tmp_path / "existing"
    existing.mkdir()
    names = {"train.parquet", "test.parquet", "rejected.jsonl", "manifest.json"}
    for target in (str(existing), f"file://{tmp_path}/new/deep/", "memory://copies/here"):
        assert run("unsupervised", source, out, "--hdfs_dir", target) == 0
        filesystem, folder = fsspec.core.url_to_fs(target)
        found = {Path(path).name: filesystem.cat_file(path) for path in filesystem.ls(folder, detail=False)}
        assert found == {name: (out / name).read_bytes() for name in names}


def test_failing_copies(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_texts(tmp_path / "in.txt", ["a", "b"])
    for target, cause in [(str(source), "FileExistsError"), ("nosuch://x/y", "Protocol not known: nosuch")]:
        assert run("unsupervised", source, tmp_path / "out", "--hdfs_dir", target) == 2
        message = one_complaint(capsys)
        assert target in message
        assert cause in message
        assert len(rows_of(tmp_path / "out", "train")) == 2
    monkeypatch.setattr(fsspec.implementations.memory.MemoryFileSystem, "size", lambda *_: 1)
    assert run("unsupervised", source, tmp_path / "out", "--hdfs_dir", "memory://short") == 2
    assert "has 1 bytes there" in one_complaint(capsys)


def test_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_texts(tmp_path / "in.txt", ["first text", "second text", "", "second text"])
    assert run("unsupervised", source, tmp_path, "--test_ratio", 0.4) == 0
    captured = capsys.readouterr()
    assert "4 lines, 3 accepted, 1 blank, 0 rejected" in captured.out
    assert "train 2 rows, test 1 rows" in captured.out
    assert "1 samples repeat an earlier one; 0 test samples" in captured.out
    assert "'second text'" in captured.out
    assert captured.err == ""


# ---- as a program ----


def program(*argv: object) -> list[str]:
    return [sys.executable, str(ROOT / "process_data.py"), *map(str, argv)]


def test_imports_are_light() -> None:
    code = (
        "import sys, process_data; print([m for m in ('torch', 'ray', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_progress_shows_on_a_terminal_and_only_there(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "in.txt", ["text"] * 20)
    argv = program("--mode", "unsupervised", "--input_file", source, "--local_dir", tmp_path)
    assert subprocess.run(argv, capture_output=True, text=True, check=True).stderr == ""
    ours, theirs = pty.openpty()
    subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=theirs, check=True, env=os.environ | {"TERM": "xterm"})
    os.close(theirs)
    assert b"reading" in os.read(ours, 65_536)
    os.close(ours)


def peak_mb(argv: list[str]) -> float:
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss / 1024


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    peaks = []
    for num in (80_000, 320_000):  # 48 and 192 MB: were the texts held once, the peaks would be 144 MB apart
        source = tmp_path / f"{num}.txt"
        with source.open("w") as file:
            file.writelines(f"{i:09d} {'word ' * 118}\n" for i in range(num))
        peaks.append(peak_mb(program("--mode", "unsupervised", "--input_file", source, "--local_dir", tmp_path)))
        source.unlink()
    assert peaks[1] - peaks[0] < 72, peaks

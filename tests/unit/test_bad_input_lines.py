"""process_data.py: lines, rows and cells that cannot be used are rejected with their reason, and the rest is kept."""

import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import counts_of, rows_of, run, triplet
from hypothesis import given, settings
from hypothesis import strategies as st

from verl.data.lines import MAX_LINE_BYTES, read_lines

BAD_JSON_LINES = [
    (b"{", "not valid JSON"),
    (b"12", "a JSON int instead of an object"),
    (b"null", "a JSON NoneType instead of an object"),
    (b'["query"]', "a JSON list instead of an object"),
    (b'"text"', "a JSON str instead of an object"),
    (b'{"query": "q", "positive": "p"}', "no negative (negative|neg|negatives|"),
    (b'{"query": "q", "positive": "p", "negative": null}', "negative is empty"),
    (b'{"query": "q", "positive": "p", "negatives": []}', "negatives is empty"),
    (b'{"query": "q", "positive": "p", "neg": ["", " "]}', "neg is empty"),
    (b'{"query": "  ", "positive": "p", "negative": "n"}', "query is empty"),
    (b'{"query": 5, "positive": "p", "negative": "n"}', "query is or holds int, not a string"),
    (b'{"query": "q", "positive": [["p"]], "negative": "n"}', "positive is or holds list"),
    (b'{"query": "q", "positive": "p\\u0000", "negative": "n"}', "positive holds a NUL character"),
    (b'{"query": "q", "positive": "\\ud800", "negative": "n"}', "not valid JSON"),
    (b'{"query": "q", "positive": "\xff", "negative": "n"}', "not UTF-8: byte 0xff at byte 29"),
    (b'{"query": ["q", "q2"], "positive": "p", "negative": "n"}', "query is a list of 2 texts, and a sample has one"),
    (b'{"query": "q", "positive": ["p", 5], "negative": "n"}', "positive is or holds int"),
    (b'{"query": {"0": "q"}, "positive": "p", "negative": "n"}', "query is or holds dict"),
    (b'{"query": "q", "positive": "p", "negative": NaN}', "not valid JSON"),
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
    assert "1 values, but 2 columns" in rejects[0]["reason"]
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

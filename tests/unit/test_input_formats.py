"""process_data.py: formats, and names of columns, that it reads."""

import bz2
import csv
import gzip
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import counts_of, reference_text, reference_triplet, rows_of, run, triplet, write_jsonl, write_texts

from verl.data.json_values import read_values


@pytest.mark.parametrize(
    ("record", "several"),
    [
        ({"query": "q", "positive": "p", "negative": "n"}, {}),
        ({"anchor": "q", "pos": "p", "neg": "n"}, {}),
        (
            {"anchor": ["q"], "pos": ["", "  ", "p", "p2"], "negatives": [None, "n", "n2"]},
            {"positives": ["p", "p2"], "negatives": ["n", "n2"]},
        ),
        ({"query": None, "anchor": "q", "positive": "p", "negative": None, "neg": ["n"]}, {}),
    ],
)
def test_aliases_and_lists(tmp_path: Path, record: dict[str, Any], several: dict[str, list[str]]) -> None:
    assert run("supervised", write_jsonl(tmp_path / "in.jsonl", [record]), tmp_path) == 0
    assert rows_of(tmp_path, "train") == [reference_triplet("train", 0, 0, ("q", "p", "n"), None, **several)]


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


TRIPLETS = [triplet(0, source="s"), triplet(1, positive='two words, "quoted"; naïve'), triplet(2)]
NAMES = ["query", "positive", "negative"]
LISTS = [[record[name] for name in NAMES] for record in TRIPLETS]
LINES = "".join(json.dumps(record) + "\n" for record in TRIPLETS).encode()
BOM = b"\xef\xbb\xbf"
BY_NAME = ("--columns", ",".join(NAMES))


def table(separator: str, header: bool = True, line_end: str = "\n") -> bytes:
    file = io.StringIO()
    writer = csv.writer(file, delimiter=separator, lineterminator=line_end)
    writer.writerows([NAMES] * header + LISTS)
    return file.getvalue().encode()


FORMS: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "lines with a byte order mark": ("in.jsonl", BOM + LINES, ()),
    "lines that end in carriage returns": ("in.jsonl", LINES.replace(b"\n", b"\r"), ()),
    "lines of another name": ("in.dat", LINES, ()),
    "lines of a misleading name": ("in.csv", LINES, ()),
    "gzip": ("in.jsonl.gz", gzip.compress(LINES), ()),
    "two gzip files in one": ("in.jsonl.gz", gzip.compress(LINES[:50]) + gzip.compress(LINES[50:]), ()),
    "gzip without a suffix": ("in.jsonl", gzip.compress(LINES), ()),
    "zstd": ("in.jsonl.zst", pa.compress(LINES, "zstd", asbytes=True), ()),
    "bzip2": ("in.jsonl.bz2", bz2.compress(LINES), ()),
    "a gzipped table": ("in.csv.gz", gzip.compress(table(",")), ()),
    "an array": ("in.json", json.dumps(TRIPLETS).encode(), ()),
    "an indented array": ("in.json", BOM + json.dumps(TRIPLETS, indent=2).encode(), ()),
    "an array named .jsonl": ("in.jsonl", json.dumps(TRIPLETS, indent=1).encode(), ()),
    "an array, an object a line": ("in.json", b"[\n" + b",\n".join(LINES.splitlines()) + b"\n]\n", ()),
    "indented objects": ("in.jsonl", "\n".join(json.dumps(r, indent=2) for r in TRIPLETS).encode(), ()),
    "indented objects after an empty line": ("in.json", ("\n" + json.dumps(TRIPLETS, indent=4)).encode(), ()),
    "an array of lists": ("in.json", json.dumps(LISTS).encode(), BY_NAME),
    "an array of lists with a header": ("in.json", json.dumps([NAMES, *LISTS], indent=1).encode(), BY_NAME),
    "a list a line": ("in.jsonl", "".join(json.dumps(row) + "\n" for row in LISTS).encode(), BY_NAME),
    "tabs": ("in.tsv", table("\t"), ()),
    "tabs, another name": ("in.txt", table("\t"), ()),
    "tabs under the name of commas": ("in.csv", table("\t"), ()),
    "semicolons": ("in.csv", BOM + table(";"), ()),
    "commas that end in carriage returns": ("in.csv", table(",", line_end="\r"), ()),
    "tabs without a header": ("in.tsv", table("\t", header=False), BY_NAME),
    "tabs without a header, gzipped": ("in.tsv.gz", gzip.compress(table("\t", header=False)), BY_NAME),
    "commas without a header": ("in.csv", table(",", header=False), BY_NAME),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_content_says_what_a_file_is(tmp_path: Path, form: str) -> None:
    name, content, more = FORMS[form]
    (tmp_path / name).write_bytes(content)
    assert run("supervised", tmp_path / name, tmp_path / "out", *more) == 0
    found = [row["multi_input"] for row in rows_of(tmp_path / "out", "train")]
    assert [[row["query"], row["instruction"], row["negative_document"]] for row in found] == LISTS
    assert counts_of(tmp_path / "out")["rejected"] == 0


def test_parquet_is_known_by_its_content(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(TRIPLETS), tmp_path / "in.bin")
    assert run("supervised", tmp_path / "in.bin", tmp_path / "out") == 0
    assert len(rows_of(tmp_path / "out", "train")) == 3
    (tmp_path / "in.txt").write_text("PAR1 is a gene.")
    assert run("unsupervised", tmp_path / "in.txt", tmp_path / "texts") == 0
    assert rows_of(tmp_path / "texts", "train")[0]["extra_info"]["text"] == "PAR1 is a gene."


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (b"one\rtwo\rthree\r", ["one", "two", "three"]),
        (b"one\r\ntwo\r\n", ["one", "two"]),
        (b"one\rtwo\rthree\r\n", ["one", "two", "three"]),
        (b"on\re\ntwo\nthree\n", ["on\re", "two", "three"]),
    ],
)
def test_line_ends_of_texts(tmp_path: Path, content: bytes, texts: list[str]) -> None:
    (tmp_path / "in.txt").write_bytes(content)
    assert run("unsupervised", tmp_path / "in.txt", tmp_path / "out") == 0
    assert [row["extra_info"]["text"] for row in rows_of(tmp_path / "out", "train")] == texts


NOT_A_TEXT = "is neither a text nor a list in the notation of JSON or Python"
CELLS = [
    ('["a b", "c"]', "a b"),
    ("['a b', 'c']", "a b"),
    ("""["it's", 'a "c"']""", "it's"),
    ("[None, 'a b']", "a b"),
    (' ["", "a b"] ', "a b"),
    ("['a' 'b']", NOT_A_TEXT),  # NumPy's notation
    ("[array(['a'], dtype=object)]", NOT_A_TEXT),
    ("['a', nan]", NOT_A_TEXT),
    ("[nan, 'a']", NOT_A_TEXT),
    ('["a", "b]', NOT_A_TEXT),
    ("('a', 'b')", NOT_A_TEXT),
    ("{'text': 'a'}", NOT_A_TEXT),
    ('{"text": "a"}', NOT_A_TEXT),
    ("[1, 2]", "pos is or holds int"),
    ('[["a"]]', "pos is or holds list"),
    ("[]", "pos is empty"),
    ("[citation needed]", "[citation needed]"),
    ("(see below)", "(see below)"),
    ("{{}}", "{{}}"),
    ('{{"name"}}', '{{"name"}}'),
    ("{[1]: 2}", "{[1]: 2}"),
    ("5", "5"),
]


@pytest.mark.parametrize("separator", [",", "\t"])
def test_lists_in_the_cells_of_a_table(tmp_path: Path, separator: str) -> None:
    with (tmp_path / "in.csv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerows([("query", "pos", "neg"), *(("q", cell, "n") for cell, _ in CELLS)])
    assert run("supervised", tmp_path / "in.csv", tmp_path, "--max_rejected", 1) == 0
    found = {row["extra_info"]["line_idx"]: row["multi_input"]["instruction"] for row in rows_of(tmp_path, "train")}
    rejects = map(json.loads, (tmp_path / "rejected.jsonl").read_text("utf-8").splitlines())
    found |= {reject["line"] - 1: reject["reason"] for reject in rejects}
    for index, (cell, expected) in enumerate(CELLS, 1):
        assert expected in found[index], cell


@pytest.mark.parametrize(
    ("column", "reason"),
    [("pos", "character 1 of pos is a lone surrogate, half of a character"), ("source", "source cannot be written as")],
)
def test_half_a_character_in_a_list_is_rejected(tmp_path: Path, column: str, reason: str) -> None:
    cells = {"query": "q", "pos": "p", "neg": "n", "source": "s"}
    with (tmp_path / "in.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, cells)
        writer.writeheader()
        writer.writerows([cells, cells | {column: r"['\ud83d a', 'b']"}])
    assert run("supervised", tmp_path / "in.csv", tmp_path, "--max_rejected", 1) == 0
    (reject,) = map(json.loads, (tmp_path / "rejected.jsonl").read_text("utf-8").splitlines())
    assert reject["line"] == 3 and reject["reason"].startswith(reason)
    assert len(rows_of(tmp_path, "train")) == 1


def test_quotes_in_a_tsv_file(tmp_path: Path) -> None:
    lines = [
        "query\tpos\tneg",
        'q\t"p ""1"" x"\tn',
        'q\t"Weird" people\tn',
        'q\tthe 5" disk\tn',
        'q\tp\t"open',
        "q\tp\tn",
    ]
    (tmp_path / "in.tsv").write_text("\n".join(lines) + "\n")
    assert run("supervised", tmp_path / "in.tsv", tmp_path, "--max_rejected", 1) == 0
    found = [row["multi_input"]["instruction"] for row in rows_of(tmp_path, "train")]
    assert found == ['p "1" x', '"Weird" people', 'the 5" disk', "p"]
    (reject,) = map(json.loads, (tmp_path / "rejected.jsonl").read_text("utf-8").splitlines())
    assert (reject["line"], reject["reason"][:7]) == (5, "a quote")


@pytest.mark.parametrize(
    ("source", "kept"),
    [(3, "3"), (2.5, "2.5"), (True, "true"), (["a", 1], '["a",1]'), ({"a": None}, '{"a":null}'), (None, None)],
)
def test_a_source_of_another_type_is_kept_as_json(tmp_path: Path, source: Any, kept: str | None) -> None:
    assert run("supervised", write_jsonl(tmp_path / "in.jsonl", [triplet(0, source=source)]), tmp_path) == 0
    assert rows_of(tmp_path, "train")[0]["extra_info"]["source"] == kept
    pq.write_table(pa.table({"text": ["a", "b"], "source": [float("nan"), 1.5]}), tmp_path / "in.parquet")
    assert run("unsupervised", tmp_path / "in.parquet", tmp_path / "p") == 0
    assert [row["extra_info"]["source"] for row in rows_of(tmp_path / "p", "train")] == [None, "1.5"]


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        (pa.array([["q", "i"]], pa.list_(pa.string(), 2)), "query is a list of 2 texts"),
        (pa.array([["i", "q"]], pa.list_(pa.string())), "query is a list of 2 texts"),
        (pa.array([{"instruction": "i", "text": "q"}]), "query is or holds dict"),
        (pa.array([[{"text": "q"}]]), "query is or holds dict"),
        (pa.array([5]), "query is or holds int"),
        (pa.array([float("nan")]), "query is or holds float"),
        (pa.nulls(1), "query is empty"),
    ],
)
def test_a_parquet_cell_that_is_not_one_text_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], column: pa.Array, reason: str
) -> None:
    pq.write_table(pa.table({"query": column, "pos": ["p"], "neg": ["n"]}), tmp_path / "in.parquet")
    assert run("supervised", tmp_path / "in.parquet", tmp_path) == 2
    assert f"line 1: {reason}" in capsys.readouterr().err


ALIKE = [{"query": f"q {i}", "pos": ["Represent the passage", f"p {i}"], "neg": "n"} for i in range(3)]
REFUSED = [
    ("in.tsv", table("\t", header=False), (), "--columns query,positive,negative"),
    ("in.jsonl", b"a text\nanother\n", (), "neither JSON nor a table"),
    ("in.jsonl", b'["q", "p", "n"]\n["q", "p", "n"]\n', (), "name its values with --columns"),
    ("in.json", json.dumps(LISTS).encode(), (), "name its values with --columns"),
    ("in.jsonl", LINES, BY_NAME, "leave --columns out"),
    ("in.tsv", table("\t", header=False), ("--columns", "query,positive"), "--mode supervised needs"),
    ("in.tsv", table("\t", header=False), ("--columns", "id,query,positive,negative"), "3 between tabs"),
    ("in.json", json.dumps({name: ["a", "b"] for name in NAMES}).encode(), (), "query is a list of 2 texts"),
    ("in.json", json.dumps({name: {"0": "a"} for name in NAMES}, indent=1).encode(), (), "query is or holds dict"),
    ("in.json", json.dumps({"data": TRIPLETS}).encode(), (), "found data; --mode supervised needs query|anchor"),
    ("in.json", json.dumps(TRIPLETS).encode()[:-1], (), "line 1: the array is not closed; is the file cut off?"),
    ("in.json", json.dumps(TRIPLETS, indent=0).encode()[:-9], (), "the JSON value that begins here is not valid"),
    ("in.json", json.dumps(TRIPLETS).encode() * 2, (), "there is more after the end of the array"),
    ("in.jsonl", "".join(json.dumps(r) + "\n" for r in ALIKE).encode(), (), "begins with 'Represent the passage'"),
    ("in.jsonl.gz", gzip.compress(LINES * 200)[:-20], (), "is damaged, or cut off"),
    ("in.jsonl", LINES.decode().encode("utf-16"), (), "is UTF-16 text"),
    ("in.xlsx", b"PK\x03\x04" + bytes(60), (), "a zip archive or an Excel workbook"),
    ("in.jsonl.xz", b"\xfd7zXZ\0" + bytes(60), (), "compressed with xz"),
    ("in.tar.gz", gzip.compress(bytes(257) + b"ustar" + bytes(250)), (), "a tar archive"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "more", "message"), REFUSED, ids=[case[-1] for case in REFUSED])
def test_other_forms_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, more: tuple[str, ...], message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert run("supervised", tmp_path / name, tmp_path / "out", *more) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert "mend them, or raise --max_rejected" not in error
    assert not list(tmp_path.glob("out/*.parquet"))


def test_a_bad_value_of_an_array_is_rejected_with_its_line(tmp_path: Path) -> None:
    values = [json.dumps(record).encode() for record in TRIPLETS]
    values[1:1] = [b'{"query": "\xff"}', b"[]", b'{"query": NaN}', b'{"query": "q"}']
    (tmp_path / "in.json").write_bytes(b"[\n" + b",\n".join(values) + b"]")
    assert run("supervised", tmp_path / "in.json", tmp_path, "--max_rejected", 0.9) == 0
    assert [row["extra_info"]["line_idx"] for row in rows_of(tmp_path, "train")] == [1, 6, 7]
    rejects = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text("utf-8").splitlines()]
    assert [(reject["line"], reject["reason"][:14]) for reject in rejects] == [
        (3, "not UTF-8: byt"), (4, "a JSON list in"), (5, "not valid JSON"), (6, "no positive (p"),
    ]  # fmt: skip


def test_an_array_is_never_held(tmp_path: Path) -> None:
    value = b'{"text": "' + b"x" * 988 + b'"}'
    with (tmp_path / "in.json").open("wb") as file:
        file.write(b"[" + value)
        file.writelines(b",\n" + value for _ in range(20_000))
        file.write(b"]")
    tracemalloc.start()
    with (tmp_path / "in.json").open("rb") as file:
        count = sum(value.line_idx == index for index, value in enumerate(read_values(file, tmp_path / "in.json")))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_001
    assert peak < 10 * 2**20

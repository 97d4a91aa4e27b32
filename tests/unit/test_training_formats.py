"""process_data.py: the forms in which other programs keep training data, in every container, with all their texts."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import chat, rows_of, run, triplet, write_jsonl
from training_formats import DATA, FORMATS, Texts, options_of

from verl.data.readers import read_samples

PAIRS = DATA / "sentence_transformers_pairs.csv"


def held(rows: list[dict[str, Any]]) -> list[Texts]:
    """What the rows hold, after checking that their columns agree about the first positive and negative."""
    for row in rows:
        info, inputs = row["extra_info"], row["multi_input"]
        assert row["prompt"] == chat(info["positive_example"])
        assert row["reward_model"]["ground_truth"] == inputs["instruction"] == info["positive_example"]
        assert (inputs["query"], inputs["negative_document"]) == (info["original_query"], info["negative_example"])
        for name, first in (("positives", info["positive_example"]), ("negatives", info["negative_example"])):
            assert row[name] is None or (row[name][0] == first and len(row[name]) > 1)
    return [
        Texts(
            row["multi_input"]["query"],
            row["positives"] or [row["multi_input"]["instruction"]],
            row["negatives"] or [row["multi_input"]["negative_document"]],
        )
        for row in rows
    ]


@pytest.mark.parametrize("name", FORMATS)
def test_the_files_of_other_programs_are_read_by_the_names_of_their_columns(tmp_path: Path, name: str) -> None:
    assert run("supervised", DATA / name, tmp_path, *options_of(name)) == 0
    assert held(rows_of(tmp_path, "train")) == FORMATS[name]


def records_of(name: str) -> list[dict[str, Any]]:
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in (DATA / name).read_text().splitlines()]
    with (DATA / name).open(newline="") as file:
        return [{key: cell or None for key, cell in row.items()} for row in csv.DictReader(file)]


def write_in(container: str, records: list[dict[str, Any]], file: Path) -> None:
    if container == "parquet":
        pq.write_table(pa.Table.from_pylist(records), file)
    elif container == "json":
        file.write_text(json.dumps(records, indent=1))
    elif container == "jsonl.gz":
        file.write_bytes(gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode()))
    else:
        names = list(dict.fromkeys(name for record in records for name in record))
        with file.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, names, delimiter="\t" if container == "tsv" else ",")
            writer.writeheader()
            writer.writerows(
                {key: json.dumps(value) if isinstance(value, list) else value for key, value in record.items()}
                for record in records
            )


@pytest.mark.parametrize("container", ["parquet", "json", "jsonl.gz", "csv", "tsv"])
@pytest.mark.parametrize("name", [name for name in FORMATS if not name.startswith("msmarco")])
def test_every_form_in_every_container(tmp_path: Path, name: str, container: str) -> None:
    file = tmp_path / f"in.{container}"
    write_in(container, records_of(name), file)
    assert run("supervised", file, tmp_path) == 0
    assert held(rows_of(tmp_path, "train")) == FORMATS[name]


def test_texts_that_are_there_twice_count_once_and_a_plain_negative_precedes_numbered_ones(tmp_path: Path) -> None:
    records = [
        {"query": "q", "pos": ["p", " p ", "p2", "p"], "negative": ["n", "n2"], "negative_2": "n2", "negative_1": "n0"},
        {"query": "q", "pos": "p", "negative_3": "n"},
    ]
    assert run("supervised", write_jsonl(tmp_path / "in.jsonl", records), tmp_path) == 0
    assert held(rows_of(tmp_path, "train")) == [Texts("q", ["p", "p2"], ["n", "n2", "n0"]), Texts("q", ["p"], ["n"])]


def test_samples_that_differ_in_a_later_text_are_no_duplicates(tmp_path: Path) -> None:
    records = [triplet(0, negative=negatives) for negatives in (["n", "a"], ["n", "b"], ["n", "a"])]
    assert run("supervised", write_jsonl(tmp_path / "in.jsonl", records), tmp_path) == 0
    assert json.loads((tmp_path / "manifest.json").read_text())["counts"]["duplicates"] == 1


def test_an_instruction_of_its_own_is_told_and_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("supervised", DATA / "flag_embedding.jsonl", tmp_path / "a") == 0
    assert "the column prompt of 2 samples is not read" in capsys.readouterr().out
    assert run("supervised", DATA / "tevatron.jsonl", tmp_path / "b") == 0
    assert "is not read" not in capsys.readouterr().out


BAD_PASSAGES = [
    ({"docid": "1", "title": "t"}, "positive_passages is or holds dict"),
    ({"text": 5}, "positive_passages.text is or holds int"),
    ({"title": ["t"], "text": "p"}, "positive_passages.title is or holds list"),
    ({"title": "", "text": "  "}, "positive_passages is empty"),
]


@pytest.mark.parametrize(("passage", "reason"), BAD_PASSAGES, ids=[reason for _, reason in BAD_PASSAGES])
def test_a_passage_that_is_none_is_rejected(tmp_path: Path, passage: dict[str, Any], reason: str) -> None:
    bad = {"query": "q", "positive_passages": [passage], "negative_passages": [{"text": "n"}]}
    good = [{**bad, "positive_passages": [{"text": "p"}]}] * 2
    assert run("supervised", write_jsonl(tmp_path / "in.jsonl", [*good, bad]), tmp_path, "--max_rejected", 1) == 0
    (entry,) = map(json.loads, (tmp_path / "rejected.jsonl").read_text().splitlines())
    assert entry["line"] == 3 and entry["reason"].startswith(reason)


REMEDY = "python3 -m verl.mine_negatives finds negatives for pairs"


@pytest.mark.parametrize("container", ["csv", "tsv", "jsonl.gz", "json", "parquet"])
def test_a_file_of_pairs_is_refused_with_the_way_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], container: str
) -> None:
    file = tmp_path / f"in.{container}"
    write_in(container, records_of(PAIRS.name), file)
    assert run("supervised", file, tmp_path / "out") == 2
    assert REMEDY in capsys.readouterr().err


@pytest.mark.parametrize("negatives", [{}, {"neg": []}, {"neg": None}, {"neg": ["", " "]}, {"negative_1": None}])
def test_a_pair_among_triplets_is_rejected_with_the_way_out(tmp_path: Path, negatives: dict[str, Any]) -> None:
    records = [triplet(0), {"query": "q", "pos": ["p"], **negatives}]
    assert run("supervised", write_jsonl(tmp_path / "in.jsonl", records), tmp_path, "--max_rejected", 1) == 0
    (entry,) = map(json.loads, (tmp_path / "rejected.jsonl").read_text().splitlines())
    assert entry["line"] == 2 and REMEDY in entry["reason"]


@pytest.mark.parametrize("container", ["csv", "tsv", "jsonl.gz", "json", "parquet"])
def test_pairs_keep_the_negatives_that_some_of_them_have(tmp_path: Path, container: str) -> None:
    records = [{"query": "a", "pos": "b", "neg": None}, {"query": "c", "pos": "d", "neg": "e"}]
    write_in(container, records, tmp_path / f"in.{container}")
    samples = list(read_samples(tmp_path / f"in.{container}", "pairs"))
    assert [sample.texts for sample in samples] == [("a", "b"), ("c", "d")]
    assert [sample.lists for sample in samples] == [{}, {"negative": ("e",)}]

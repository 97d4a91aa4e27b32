"""python3 -m verl.mine_negatives: real negatives of a real tiny model, compared with similarities of its vectors."""

import json
from pathlib import Path
from typing import Any

import pytest
from data_files import rows_of, run, write_jsonl
from training_formats import DATA

import verl.mine_negatives as program
from verl import GraceEncoder
from verl.encoder import hard_negatives
from verl.encoder.backend import Backend
from verl.export_sentence_transformer import main as export

WORDS = "river stone paper cloud engine garden winter bottle window copper violin market island shadow".split()
QUERIES = [f"what is a {word} in the {WORDS[i - 1]}?" for i, word in enumerate(WORDS)]
# The first query has two positives in a line and one more in another line.
PAIRS: list[dict[str, Any]] = [
    {"anchor": query, "positive": f"a {word} is {' and '.join(WORDS[: 1 + i % 5])}"}
    for i, (query, word) in enumerate(zip(QUERIES, WORDS, strict=True))
]
PAIRS[0] = {"anchor": QUERIES[0], "positive": [PAIRS[0]["positive"], "water that runs to the sea"], "source": "s"}
PAIRS.append({"anchor": QUERIES[0], "positive": "a stream, only larger"})
MARGIN = 0.01


def mine(model: Path, folder: Path, records: list[dict[str, Any]], *more: object) -> list[dict[str, Any]]:
    source, output = write_jsonl(folder / "pairs.jsonl", records), folder / "out.jsonl"
    argv = ["--model", model, "--input", source, "--output", output, "--device", "cpu", *more]
    assert program.main([str(a) for a in argv]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


def positives_of(records: list[dict[str, Any]], query: str) -> set[str]:
    found = [record["positive"] for record in records if record["anchor"] == query]
    return {text for value in found for text in (value if isinstance(value, list) else [value])}


@pytest.mark.parametrize(("think", "k"), [(False, 3), (True, 2)])
def test_negatives_are_the_nearest_texts_that_keep_the_margin(tiny_folder, tmp_path, think, k):
    flags = ["--max_new_tokens", 4, "--seed", 5] if think else ["--no_thinking"]
    rows = mine(tiny_folder, tmp_path, PAIRS, "--num_negatives", k, "--margin", MARGIN, *flags)
    texts = list(
        dict.fromkeys([t for record in PAIRS for t in (record["anchor"], *positives_of(PAIRS, record["anchor"]))])
    )
    with GraceEncoder(tiny_folder, device="cpu", max_new_tokens=4) as encoder:
        vectors = dict(zip(texts, encoder.encode(texts, think=think, seed=5 if think else 0), strict=True))
    corpus = [text for text in texts if text not in QUERIES]
    expected = {}
    for query in QUERIES:
        known = positives_of(PAIRS, query)
        most = min(float(vectors[query] @ vectors[text]) for text in known)
        most -= MARGIN * abs(most)
        near = sorted((-float(vectors[query] @ vectors[t]), t) for t in corpus if t not in known)
        expected[query] = [text for minus, text in near if -minus <= most][:k]
    assert sum(map(bool, expected.values())) >= 5 and any(len(texts) == k for texts in expected.values())
    near = {
        query: [t for _, t in sorted((-float(vectors[query] @ vectors[t]), t) for t in corpus)] for query in QUERIES
    }
    assert any(
        expected[q] and expected[q][0] != next(t for t in near[q] if t not in positives_of(PAIRS, q)) for q in QUERIES
    ), "the margin passes over no text"
    kept = [record for record in PAIRS if expected[record["anchor"]]]
    assert [row["query"] for row in rows] == [record["anchor"] for record in kept]
    for row, record in zip(rows, kept, strict=True):
        assert row["neg"] == expected[row["query"]]
        assert not set(row["neg"]) & (positives_of(PAIRS, row["query"]) | {row["query"]})
        given = record["positive"]
        assert row["pos"] == (given if isinstance(given, list) else [given])
        assert row.get("source") == record.get("source")


def test_the_same_seed_writes_the_same_file_and_process_data_reads_it(tiny_folder, tmp_path):
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        mine(tiny_folder, tmp_path / name, PAIRS, "--max_new_tokens", 3, "--margin", 0, "--range_min", 1)
        files.append((tmp_path / name / "out.jsonl").read_bytes())
    assert files[0] == files[1]
    assert run("supervised", tmp_path / "a" / "out.jsonl", tmp_path / "data", "--test_ratio", 0) == 0
    rows = [json.loads(line) for line in files[0].splitlines()]
    held = rows_of(tmp_path / "data", "train")
    assert [row["negatives"] or [row["multi_input"]["negative_document"]] for row in held] == [r["neg"] for r in rows]


def test_a_model_of_sentence_transformers_finds_what_the_encoder_finds(tiny_folder, tmp_path, capsys):
    exported = tmp_path / "exported"
    assert export(["--model_path", str(tiny_folder), "--output", str(exported)]) == 0
    expected = mine(tiny_folder, tmp_path, PAIRS, "--margin", 0, "--no_thinking")
    assert mine(exported, tmp_path, PAIRS, "--margin", 0) == expected
    argv = ["--model", exported, "--input", tmp_path / "pairs.jsonl", "--output", tmp_path / "o.jsonl", "--no_thinking"]
    assert program.main([str(a) for a in argv]) == 2
    assert "--no_thinking has no effect" in capsys.readouterr().err


def test_the_negatives_of_triplets_are_candidates(tiny_folder, tmp_path):
    records = [{**record, "negative": f"{i} other words"} for i, record in enumerate(PAIRS)]
    rows = mine(tiny_folder, tmp_path, records, "--margin", 0, "--no_thinking", "--num_negatives", 20)
    assert {text for row in rows for text in row["neg"]} & {record["negative"] for record in records}


@pytest.mark.parametrize("first", [0, 1])
def test_the_negatives_that_some_lines_have_are_candidates(tiny_folder, tmp_path, first):
    """Whether the first line has some or not."""
    records = [{**r, "neg": [f"{i} other words"] if i % 2 == first else []} for i, r in enumerate(PAIRS)]
    rows = mine(tiny_folder, tmp_path, records, "--margin", 0, "--no_thinking", "--num_negatives", 20)
    assert {text for row in rows for text in row["neg"]} & {text for record in records for text in record["neg"]}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_negatives", 0], "--num_negatives=0 must be 1 or more"),
        (["--margin", "nan"], "--margin=nan must be a number of 0 or more"),
        (["--range_min", 3, "--range_max", 4], "--range_max=4 must be 8 or more"),
        (["--margin", 1e9, "--no_thinking"], "no text of"),
    ],
)
def test_wrong_flags_are_told(tiny_folder, tmp_path, capsys, flags, message):
    argv = [
        "--model",
        tiny_folder,
        "--input",
        DATA / "sentence_transformers_pairs.csv",
        "--output",
        tmp_path / "o.jsonl",
    ]
    assert program.main([str(a) for a in [*argv, "--device", "cpu", *flags]]) == 2
    assert message in capsys.readouterr().err
    kept = [".o.jsonl.store"] if message == "no text of" else []
    assert [path.name for path in tmp_path.iterdir()] == kept


def test_what_is_embedded_is_kept_until_negatives_are_written_and_similarities_fit_the_memory(
    tiny_folder, tmp_path, monkeypatch
):
    """The process ends when all texts are embedded: as if memory had run out over the similarities."""
    monkeypatch.setattr(hard_negatives, "_SIMILARITIES", 100)
    mine, given = hard_negatives.mine_hard_negatives, {}

    def end(dataset, model, corpus, **options):
        model.encode_query(dataset["query"]), model.encode_document([*corpus, *dataset["positive"]])
        given.update(options)
        raise MemoryError

    source, output = DATA / "sentence_transformers_pairs.csv", tmp_path / "o.jsonl"
    argv = ["--model", tiny_folder, "--input", source, "--output", output, "--device", "cpu", "--max_new_tokens", 3]
    argv = [*map(str, argv), "--margin=0"]
    monkeypatch.setattr(hard_negatives, "mine_hard_negatives", end)
    with pytest.raises(MemoryError):
        program.main(argv)
    pairs = len(source.read_text().splitlines()) - 1
    assert given["faiss_batch_size"] == 100 // pairs and given["verbose"] is False
    monkeypatch.setattr(hard_negatives, "mine_hard_negatives", mine)
    monkeypatch.setattr(Backend, "generate", lambda *_: pytest.fail("generated again"))
    assert program.main(argv) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["o.jsonl"]

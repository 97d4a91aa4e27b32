"""python3 -m verl.encoder: a file of texts to a file of vectors, also continued after a kill."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import verl.encoder.__main__ as program
from verl import GraceEncoder
from verl.encoder import embed_file
from verl.encoder.store import EmbeddingStore

TEXTS = ["a card", "where is my parcel?", "a card", "naïve café", *(f"text number {i}" for i in range(30))]
OPTIONS = ["--device", "cpu", "--max_new_tokens", "8"]


def arguments(folder, source, output, *more):
    return ["--model", str(folder), "--input", str(source), "--output", str(output), *OPTIONS, *more]


def vectors_of(file) -> np.ndarray:
    return np.stack(pq.read_table(file)["vector"].to_numpy())


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_rows_are_texts_in_order_with_rationale_and_vector(tiny_folder, tmp_path, kind, monkeypatch):
    source = tmp_path / f"texts.{kind}"
    if kind == "txt":
        source.write_text("\n".join([TEXTS[0], "", *TEXTS[1:]]) + "\n")
    elif kind == "jsonl":
        pa_rows = [f'{{"text": "{text}", "more": 1}}' for text in TEXTS]
        source.write_text("\n".join(pa_rows))
    else:
        pq.write_table(pa.table({"sentence": TEXTS}), source)
    monkeypatch.setattr(embed_file, "_CHUNK", 10)
    assert program.main(arguments(tiny_folder, source, tmp_path / "out.parquet")) == 0
    table = pq.read_table(tmp_path / "out.parquet")
    expected, rationales = GraceEncoder(tiny_folder, device="cpu", max_new_tokens=8).encode(
        TEXTS, return_rationales=True
    )
    assert table["text"].to_pylist() == TEXTS and table["rationale"].to_pylist() == rationales
    np.testing.assert_allclose(vectors_of(tmp_path / "out.parquet"), expected, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.parquet", source.name]


def test_vectors_as_they_are_and_options_out_of_their_range(tiny_folder, tmp_path, capsys):
    source, output = tmp_path / "texts.jsonl", tmp_path / "out.parquet"
    source.write_text('{"text": "a card"}\n{"text": "another"}\n')
    assert program.main(arguments(tiny_folder, source, output, "--not_normalized", "--no_thinking")) == 0
    encoder = GraceEncoder(tiny_folder, device="cpu", max_new_tokens=8)
    means = encoder.encode(["a card", "another"], think=False, normalize_embeddings=False)
    np.testing.assert_allclose(vectors_of(output), means, atol=1e-6)
    for option, message in (
        ("--temperature=nan", "encode: temperature=nan"),
        ("--batch_size=0", "encode: batch_size=0"),
    ):
        capsys.readouterr()
        assert program.main(arguments(tiny_folder, source, tmp_path / "other.parquet", option)) == 2
        assert capsys.readouterr().err.startswith(message)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.parquet", "texts.jsonl"]


def test_the_store_of_an_output_is_no_folder_that_someone_else_may_have_made(tiny_folder, tmp_path):
    source, output = tmp_path / "texts.txt", tmp_path / "out.parquet"
    source.write_text("a card\n")
    own = tmp_path / "out.store"
    assert program.main(arguments(tiny_folder, source, output, "--store", str(own))) == 0
    assert program.main(arguments(tiny_folder, source, output)) == 0
    with EmbeddingStore(own) as store:
        assert store.count() == (1, 1)


@pytest.mark.parametrize("form", [[], ["--shard_rows", "2"]])
def test_a_bad_line_anywhere_is_told_before_a_model_is_loaded(tmp_path, capsys, form):
    source = tmp_path / "texts.jsonl"
    source.write_text('{"text": "a"}\n' * 9 + '{"text": ""}\n')
    assert program.main(arguments("no/such/model", source, tmp_path / "out", *form)) == 2
    assert "texts.jsonl, line 10: text is empty" in capsys.readouterr().err


def test_a_killed_run_is_continued(tiny_folder, tmp_path, capsys):
    source, output = tmp_path / "texts.txt", tmp_path / "out.parquet"
    source.write_text("\n".join(TEXTS))
    # The process kills itself after the third batch of rationales.
    code = (
        "import os, signal, sys\n"
        "from verl.encoder.call import EncodeCall\n"
        "from verl.encoder.__main__ import main\n"
        "keep, batches = EncodeCall._keep_rationales, []\n"
        "def count(self, batch):\n"
        "    keep(self, batch)\n"
        "    self.store.flush()\n"
        "    batches.append(batch)\n"
        "    len(batches) == 3 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "EncodeCall._keep_rationales = count\n"
        "main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", code, *arguments(tiny_folder, source, output, "--batch_size", "4")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -9
    assert not output.exists()
    with EmbeddingStore(tmp_path / ".out.parquet.store") as store:
        kept = store.count()[0]
    assert 3 <= kept <= 12
    assert program.main(arguments(tiny_folder, source, output)) == 0
    assert pq.read_table(output).num_rows == len(TEXTS)
    made = (len(set(TEXTS)) - kept) * 8
    said = capsys.readouterr().out
    assert int(said.split(" rationale tokens generated")[0].split()[-1]) <= made, said
    assert not (tmp_path / ".out.parquet.store").exists()


def test_a_store_that_was_given_stays(tiny_folder, tmp_path):
    source, store = tmp_path / "texts.txt", tmp_path / "store"
    source.write_text("\n".join(TEXTS))
    run = arguments(tiny_folder, source, tmp_path / "out.parquet", "--store", str(store), "--no_thinking")
    assert program.main(run) == 0
    with EmbeddingStore(store) as opened:
        assert opened.count() == (0, len(set(TEXTS)))
    assert set(pq.read_table(tmp_path / "out.parquet")["rationale"].to_pylist()) == {""}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"title": "b"}\n', r"line 2: no text (text|sentence)"),
        ('{"text": "a"}\n{"text": \n', r"line 2: not valid JSON"),
        ("", "is empty"),
    ],
)
def test_a_line_without_a_text_is_named_and_nothing_is_written(tiny_folder, tmp_path, capsys, content, message):
    source = tmp_path / "texts.jsonl"
    source.write_text(content)
    assert program.main(arguments(tiny_folder, source, tmp_path / "out.parquet")) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.parquet").exists()

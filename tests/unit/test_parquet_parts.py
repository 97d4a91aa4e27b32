"""Texts to a folder of parquet files: continued after a kill, refused where something differs, in bounded memory."""

import json
import subprocess
import sys
import tracemalloc

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

import verl.encoder.__main__ as program
from verl import GraceEncoder
from verl.encoder.arguments import each_text
from verl.encoder.backend import Backend
from verl.encoder.parquet_parts import write_parts
from verl.errors import UserError
from verl.utils.locks import hold
from verl.workers.rollout.base import RolloutError

TEXTS = ["a card", "where is my parcel?", "a card", "naïve café", *(f"text number {i}" for i in range(16))]
OPTIONS = ["--device", "cpu", "--max_new_tokens", "8", "--shard_rows", "6", "--batch_size", "4"]


def arguments(folder, source, output, *more):
    return ["--model", str(folder), "--input", str(source), "--output", str(output), *OPTIONS, *more]


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(TEXTS) + "\n")
    return file


@pytest.fixture
def encoder(tiny_folder):
    with GraceEncoder(tiny_folder, device="cpu", max_new_tokens=8) as opened:
        yield opened


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def embed_lengths(texts):
    """What an encoder could be: a vector and a rationale of each text alone."""
    return np.array([[len(text), 1.0] for text in texts], np.float32), [text.upper() for text in texts]


# ---- The whole program


def test_a_folder_is_one_table_and_equals_encode(tiny_folder, source, encoder, tmp_path):
    assert program.main(arguments(tiny_folder, source, tmp_path / "out")) == 0
    assert names(tmp_path / "out") == [".lock", "_encode.json", *(f"part-0000{i}.parquet" for i in range(4))]
    assert [pq.read_metadata(tmp_path / "out" / f"part-0000{i}.parquet").num_rows for i in range(4)] == [6, 6, 6, 2]
    expected, rationales = encoder.encode(TEXTS, return_rationales=True)
    frame = pd.read_parquet(tmp_path / "out")
    table = ds.dataset(tmp_path / "out", format="parquet").to_table()
    assert table.column_names == ["text", "rationale", "vector"] and table["text"].to_pylist() == TEXTS
    assert frame["text"].tolist() == TEXTS and frame["rationale"].tolist() == rationales
    np.testing.assert_allclose(np.stack(frame["vector"]), expected, atol=1e-5)


@pytest.mark.parametrize(("before", "between", "after"), [("[", ",\n", "]"), ("", "\n", "")], ids=["array", "objects"])
def test_values_that_are_not_one_a_line_are_read_to_the_end(tiny_folder, tmp_path, capsys, before, between, after):
    source = tmp_path / "texts.json"
    source.write_text(before + between.join(json.dumps({"text": text}, indent=1) for text in TEXTS) + after)
    assert program.main(arguments(tiny_folder, source, tmp_path / "out")) == 0
    assert pd.read_parquet(tmp_path / "out")["text"].tolist() == TEXTS
    assert "part-00003.parquet: 2 texts; 100% of the input is read" in capsys.readouterr().out


# The process kills itself when the third file is half written.
KILLED = """
import os, signal, sys
import pyarrow.parquet as pq
from verl.encoder.__main__ import main
write, calls = pq.write_table, []
def half(table, path):
    calls.append(path)
    if len(calls) < 3:
        return write(table, path)
    path.write_bytes(b"PAR1 and half a table")
    os.kill(os.getpid(), signal.SIGKILL)
pq.write_table = half
main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_after_its_last_whole_file(tiny_folder, source, tmp_path, capsys):
    command = [sys.executable, "-c", KILLED, *arguments(tiny_folder, source, tmp_path / "killed")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -9
    left = tmp_path / "killed"
    assert "part-00001.parquet" in names(left) and "part-00002.parquet" not in names(left)
    assert pd.read_parquet(left)["text"].tolist() == TEXTS[:12]
    before = {name: ((left / name).stat().st_mtime_ns, (left / name).read_bytes()) for name in names(left)[-2:]}
    assert program.main(arguments(tiny_folder, source, left)) == 0
    said = capsys.readouterr().out
    assert "12 texts were embedded earlier" in said and "20 texts, of which 8 were embedded now" in said
    assert before == {name: ((left / name).stat().st_mtime_ns, (left / name).read_bytes()) for name in before}
    assert program.main(arguments(tiny_folder, source, tmp_path / "whole")) == 0
    assert names(left) == names(tmp_path / "whole")
    for name in names(left)[2:]:
        assert (left / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("error", "code"), [(OSError(28, "No space left on device"), 2), (RolloutError("the engine died"), 1)], ids=str
)
def test_a_failure_in_the_middle_is_told_and_what_is_finished_stays(
    tiny_folder, source, tmp_path, capsys, monkeypatch, error, code
):
    run, calls = Backend.run, []

    def failing(self, *given):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return run(self, *given)

    monkeypatch.setattr(Backend, "run", failing)
    assert program.main(arguments(tiny_folder, source, tmp_path / "out")) == code
    captured = capsys.readouterr()
    assert f"the finished files stay in {tmp_path / 'out'}; the same command continues" in captured.out
    assert captured.err == f"encode: {error}\n"
    assert pd.read_parquet(tmp_path / "out")["text"].tolist() == TEXTS[:6]
    assert program.main(arguments(tiny_folder, source, tmp_path / "out")) == 0
    assert len(calls) == 5 and pd.read_parquet(tmp_path / "out")["text"].tolist() == TEXTS


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seed", "1"], "seed was 0 and is 1"),
        (["--temperature", "0.5"], "temperature was 1.0 and is 0.5"),
        (["--max_prompt_length", "99"], "max_prompt_length was 1024 and is 99"),
        (["--no_thinking"], "think was True and is False"),
        (["--not_normalized"], "normalize_embeddings was True and is False"),
        (["--shard_rows", "5"], "shard_rows was 6 and is 5"),
        (["--system_prompt", "Think"], "system_prompt was"),
    ],
)
def test_other_options_are_refused_by_name(tiny_folder, source, tmp_path, capsys, more, message):
    output = tmp_path / "out"
    assert program.main(arguments(tiny_folder, source, output)) == 0
    (output / "part-00003.parquet").unlink()
    assert program.main(arguments(tiny_folder, source, output, *more)) == 2
    error = capsys.readouterr().err
    assert message in error and "give what they were made with, or another folder" in error
    assert "part-00003.parquet" not in names(output)


def test_shards_are_for_a_folder(tmp_path, capsys):
    with pytest.raises(SystemExit):
        program.parse_args(arguments("m", "i", tmp_path / "out.parquet"))
    assert "--shard_rows is for a folder" in capsys.readouterr().err
    (tmp_path / "out.parquet").mkdir()
    assert program.parse_args(arguments("m", "i", tmp_path / "out.parquet")).shard_rows == 6


# ---- In Python


def test_other_weights_and_truncated_vectors(tiny_folder, encoder, tmp_path):
    assert encoder.encode_to_parquet(iter(TEXTS), tmp_path / "out", shard_rows=8, think=False, truncate_dim=16) == 20
    vectors = np.stack(pd.read_parquet(tmp_path / "out")["vector"])
    np.testing.assert_allclose(vectors, encoder.encode(TEXTS, think=False, truncate_dim=16), atol=1e-6)
    record = json.loads((tmp_path / "out" / "_encode.json").read_text())
    assert record["weights"] == encoder.revision and record["truncate_dim"] == 16
    (tmp_path / "out" / "_encode.json").write_text(json.dumps({**record, "weights": "0" * 64}))
    with pytest.raises(UserError, match="weights was '0000"):
        encoder.encode_to_parquet(TEXTS, tmp_path / "out", shard_rows=8, think=False, truncate_dim=16)


def test_what_is_no_text_is_named_by_its_place_among_all(encoder, tmp_path):
    with pytest.raises(UserError, match=r"inputs\[5\] is nan"):
        encoder.encode_to_parquet([*TEXTS[:5], float("nan")], tmp_path / "out", shard_rows=2, think=False)
    assert pd.read_parquet(tmp_path / "out")["text"].tolist() == TEXTS[:4]
    with pytest.raises(UserError, match="precision='int8': encode_to_parquet has no such option"):
        encoder.encode_to_parquet(TEXTS, tmp_path / "other", precision="int8")
    assert not (tmp_path / "other").exists()


# ---- The folder


def test_texts_are_taken_no_further_ahead_than_a_file(tmp_path):
    taken = 0

    def texts():
        nonlocal taken
        for number in range(100):
            taken += 1
            yield f"text {number}"

    for done, _ in enumerate(write_parts(texts(), tmp_path / "out", 7, {}, embed_lengths), start=1):
        assert taken == min(7 * done, 100)
    assert pd.read_parquet(tmp_path / "out")["text"].tolist() == [f"text {number}" for number in range(100)]


def test_memory_does_not_grow_with_the_number_of_texts(tmp_path):
    def peak(count, name):
        texts = each_text(f"{number:06} {'x' * 500}" for number in range(count))
        tracemalloc.start()
        for _ in write_parts(texts, tmp_path / name, 100, {}, embed_lengths):
            pass
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    peak(200, "first")  # what is loaded once
    few, many = peak(200, "few"), peak(6000, "many")
    assert many < 2 * few, (few, many)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda texts: [*texts[:4], "other", *texts[5:]], "part-00001.parquet has another text 5"),
        (lambda texts: texts[:6], "ends after 6 texts, and"),
        (lambda texts: texts[:5], "part-00001.parquet ends after 6 texts"),
        (lambda texts: [*texts, "more"], "part-00002.parquet ends after 8 texts"),
    ],
)
def test_other_texts_are_refused_where_they_begin(tmp_path, change, message):
    texts = TEXTS[:8]
    made = list(write_parts(iter(texts), tmp_path / "out", 3, {"a": 1}, embed_lengths))
    assert [part.is_new for part in made] == [True] * 3
    again = list(write_parts(iter(texts), tmp_path / "out", 3, {"a": 1}, pytest.fail))
    assert [(part.rows, part.is_new) for part in again] == [(3, False), (3, False), (2, False)]
    with pytest.raises(UserError, match=message):
        list(write_parts(iter(change(texts)), tmp_path / "out", 3, {"a": 1}, pytest.fail))


def test_a_folder_of_something_else_one_in_use_and_no_texts(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds note.txt and no _encode.json"):
        list(write_parts(iter(TEXTS), tmp_path, 3, {}, embed_lengths))
    assert names(tmp_path) == ["note.txt"]
    with pytest.raises(UserError, match="there are no texts"):
        list(write_parts(iter([]), tmp_path / "out", 3, {}, embed_lengths))
    with hold(tmp_path / "out" / ".lock"), pytest.raises(UserError, match="is being written by another process"):
        list(write_parts(iter(TEXTS), tmp_path / "out", 3, {}, embed_lengths))


def test_a_file_that_cannot_be_written_leaves_nothing_of_itself(tmp_path, monkeypatch):
    write = pq.write_table

    def full(table, path):
        write(table, path)
        raise OSError(28, "No space left on device")

    parts = write_parts(iter(TEXTS), tmp_path / "out", 8, {}, embed_lengths)
    next(parts)
    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        next(parts)
    assert names(tmp_path / "out") == [".lock", "_encode.json", "part-00000.parquet"]
    assert pa.parquet.read_table(tmp_path / "out" / "part-00000.parquet")["vector"][0].as_py() == [6.0, 1.0]

"""offline_filter_data.py against lengths taken row by row from the chat template."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import load_program
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from verl.data import filter_files
from verl.data.length_filter import FilterSettings, load_renderer
from verl.data.schema import SCHEMAS, build_rows
from verl.embedding.prompts import PromptRenderer, rationale_messages

ROOT = Path(__file__).resolve().parents[2]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


program = load_program("offline_filter_data")


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A byte-level tokenizer with a few merges and a ChatML template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("a", "n"), ("Ġ", "the")]
    vocab = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", chat_template=CHATML, model_max_length=64
    )
    tokenizer.save_pretrained(folder)
    return str(folder)


def run(*argv: object) -> int:
    return program.main([str(a) for a in argv])


def some_texts(num: int, seed: int) -> list[str]:
    # Without whole markers: apply_chat_template, the reference, takes them for its own; test_prompts has them.
    rng = random.Random(seed)
    words = ["the", "otter", "naïve", "港町", "😀", "an", "<|im_", "\n\n", "{{ x }}"]
    return [" ".join(["start", *rng.choices(words, k=rng.randint(0, 40)), "end"]) for _ in range(num)]


def write_triplets(path: Path, num: int = 60, **columns: list[str]) -> list[dict[str, Any]]:
    """A supervised file as process_data.py writes it; returns its rows."""
    names = ("query", "positive", "negative")
    texts = {name: columns.get(name, some_texts(num, seed)) for seed, name in enumerate(names)}
    num = len(texts["query"])
    lists = {name: pa.nulls(num, pa.list_(pa.string())) for name in ("positives", "negatives")}
    samples = {**texts, **lists, "source": pa.nulls(num, pa.string()), "line_idx": list(range(num))}
    table = pa.Table.from_batches([build_rows("supervised", pa.record_batch(samples), "train", 0)])
    pq.write_table(table, path)
    return table.to_pylist()


def write_chats(path: Path, chats: list[Any], **more: pa.Array) -> None:
    type_ = SCHEMAS["unsupervised"].field("prompt").type
    pq.write_table(pa.table({"prompt": pa.array(chats, type_), **more}), path)


def chat(text: str, system: str | None = "Read.") -> list[dict[str, str]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": text}]


def length_of(tokenizer: Any, messages: list[dict[str, str]]) -> int:
    return len(
        tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
    )


def triplet_lengths(tokenizer: Any, row: dict[str, Any]) -> dict[str, int]:
    system = row["prompt"][0]["content"]
    texts = row["multi_input"]
    return {
        "positive": length_of(tokenizer, row["prompt"]),
        "query": length_of(tokenizer, chat(texts["query"], system)),
        "negative": length_of(tokenizer, chat(texts["negative_document"], system)),
    }


def one_complaint(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.startswith("offline_filter_data: ")
    assert error.count("\n") == 1
    return error


def test_triplets_are_kept_by_every_length(
    tmp_path: Path, tokenizer_path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_triplets(tmp_path / "in.parquet")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    lengths = [triplet_lengths(tokenizer, row) for row in rows]
    max_len = sorted(max(each.values()) for each in lengths)[30]  # met exactly by some row
    out = tmp_path / "out"
    assert (
        run(
            *("--train_parquet", tmp_path / "in.parquet", "--val_parquet", tmp_path / "in.parquet"),
            *("--out_dir", out, "--tokenizer_path", tokenizer_path, "--max_len", max_len),
        )
        == 0
    )
    expected = [
        {**row, "prompt_lengths": each}
        for row, each in zip(rows, lengths, strict=True)
        if max(each.values()) <= max_len
    ]
    assert 0 < len(expected) < len(rows)
    assert any(each["positive"] <= max_len < each["query"] for each in lengths)
    assert any(each["positive"] <= max_len < each["negative"] for each in lengths)
    table = pq.read_table(out / "train.parquet")
    assert table.to_pylist() == pq.read_table(out / "test.parquet").to_pylist() == expected
    names = ("positive", "query", "negative")
    assert table.schema.field("prompt_lengths").type == pa.struct([(name, pa.int32()) for name in names])
    assert table.schema.remove(8).equals(SCHEMAS["supervised"])

    fingerprint = PromptRenderer(tokenizer).fingerprint()
    assert table.schema.metadata == {
        b"grace.tokenizer_hash": fingerprint.encode(),
        b"grace.tokenizer_path": tokenizer_path.encode(),
        b"grace.max_len": str(max_len).encode(),
    }
    record = json.loads((out / "filter.json").read_text())
    assert (record["tokenizer_hash"], record["max_len"]) == (fingerprint, max_len)
    assert record["splits"]["train"] == record["splits"]["test"]
    assert record["splits"]["train"] == {
        "rows": 60,
        "kept": len(expected),
        "over_long": {name: sum(each[name] > max_len for each in lengths) for name in names},
        "longest": {name: max(each[name] for each in lengths) for name in names},
        "percent_kept": pytest.approx(100 * len(expected) / 60, abs=1e-3),
    }
    printed = capsys.readouterr()
    assert f"train: kept {len(expected)} of 60 rows" in printed.out
    assert f"  query: {sum(each['query'] > max_len for each in lengths)} over {max_len} tokens" in printed.out
    assert printed.err == ""


def test_texts_of_other_prompts_and_columns(tmp_path: Path, tokenizer_path: str) -> None:
    chats = [
        chat("short"),
        chat("short", None),
        chat("short", "A much longer system message."),
        chat("the " * 90),
    ]
    write_chats(tmp_path / "in.parquet", chats, kept=pa.array([10, 11, 12, 13], pa.int8()))
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    lengths = [length_of(tokenizer, messages) for messages in chats]
    out = tmp_path / "out"
    argv = ["--train_parquet", tmp_path / "in.parquet", "--out_dir", out, "--tokenizer_path", tokenizer_path]
    assert run(*argv, "--max_len", max(lengths[:3])) == 0
    table = pq.read_table(out / "train.parquet")
    assert table["prompt"].to_pylist() == chats[:3]
    assert table["prompt_lengths"].to_pylist() == [{"text": length} for length in lengths[:3]]
    assert table["kept"].to_pylist() == [10, 11, 12]
    assert not (out / "test.parquet").exists()


def test_metadata_of_the_old_columns_goes_and_the_rest_stays(tmp_path: Path, tokenizer_path: str) -> None:
    write_chats(tmp_path / "in.parquet", [chat("a")])
    table = pq.read_table(tmp_path / "in.parquet").replace_schema_metadata({"huggingface": "{}", "mine": "1"})
    pq.write_table(table, tmp_path / "in.parquet")
    argv = ["--train_parquet", tmp_path / "in.parquet", "--out_dir", tmp_path / "out"]
    assert run(*argv, "--tokenizer_path", tokenizer_path) == 0
    metadata = pq.read_schema(tmp_path / "out" / "train.parquet").metadata
    assert metadata[b"mine"] == b"1"
    assert b"huggingface" not in metadata


def test_triplets_are_measured_under_their_own_system_message(tmp_path: Path, tokenizer_path: str) -> None:
    rows = write_triplets(tmp_path / "in.parquet", query=["q"], positive=["p"], negative=["n"])
    rows[0]["prompt"][0]["content"] = "Another system message."
    pq.write_table(pa.Table.from_pylist(rows, SCHEMAS["supervised"]), tmp_path / "in.parquet")
    argv = ["--train_parquet", tmp_path / "in.parquet", "--out_dir", tmp_path / "out"]
    assert run(*argv, "--tokenizer_path", tokenizer_path) == 0
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    (row,) = pq.read_table(tmp_path / "out" / "train.parquet").to_pylist()
    assert row["prompt_lengths"] == triplet_lengths(tokenizer, rows[0])
    assert row["prompt_lengths"]["query"] == length_of(tokenizer, chat("q", "Another system message."))


def test_filtering_again_replaces_the_lengths(tmp_path: Path, tokenizer_path: str) -> None:
    write_chats(tmp_path / "in.parquet", [chat("a"), chat("bb")], prompt_lengths=pa.array(["old", "old"]))
    common = ["--tokenizer_path", tokenizer_path, "--out_dir"]
    assert run("--train_parquet", tmp_path / "in.parquet", *common, tmp_path / "one") == 0
    assert run("--train_parquet", tmp_path / "one/train.parquet", *common, tmp_path / "two", "--max_len", 999) == 0
    one, two = (pq.read_table(tmp_path / name / "train.parquet") for name in ("one", "two"))
    assert one.to_pylist() == two.to_pylist()
    assert two.column_names == ["prompt", "prompt_lengths"]
    assert two.schema.metadata[b"grace.max_len"] == b"999"


@pytest.mark.parametrize("saved", [("truncation",), ("padding",), ("truncation", "padding")])
def test_truncation_and_padding_saved_in_the_tokenizer_change_no_length(
    tmp_path: Path, tokenizer_path: str, saved: tuple[str, ...]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    backend = Tokenizer.from_file(f"{tokenizer_path}/tokenizer.json")
    if "truncation" in saved:
        backend.enable_truncation(16)
    if "padding" in saved:
        backend.enable_padding(length=700, pad_token="<|im_end|>", pad_id=backend.token_to_id("<|im_end|>"))
    tokenizer.save_pretrained(tmp_path / "used")
    backend.save(str(tmp_path / "used" / "tokenizer.json"))

    rows = write_triplets(tmp_path / "in.parquet", num=20)
    lengths = [triplet_lengths(tokenizer, row) for row in rows]
    max_len = sorted(max(each.values()) for each in lengths)[10]
    argv = ["--train_parquet", tmp_path / "in.parquet", "--out_dir", tmp_path / "out", "--max_len", max_len]
    assert run(*argv, "--tokenizer_path", tmp_path / "used") == 0
    table = pq.read_table(tmp_path / "out" / "train.parquet")
    assert table["prompt_lengths"].to_pylist() == [each for each in lengths if max(each.values()) <= max_len]
    fingerprint = PromptRenderer(AutoTokenizer.from_pretrained(tokenizer_path)).fingerprint()
    assert table.schema.metadata[b"grace.tokenizer_hash"] == fingerprint.encode()


def test_processes_give_what_one_process_gives(
    tmp_path: Path, tokenizer_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filter_files, "ROWS_WORTH_A_PROCESS", 1_000)
    write_chats(tmp_path / "in.parquet", [chat(text) for text in some_texts(7_500, 9)])
    common = [
        "--train_parquet",
        tmp_path / "in.parquet",
        "--tokenizer_path",
        tokenizer_path,
        "--max_len",
        150,
    ]
    for num_proc in (1, 2):
        assert run(*common, "--num_proc", num_proc, "--out_dir", tmp_path / str(num_proc)) == 0
    files = [(tmp_path / name / "train.parquet").read_bytes() for name in "12"]
    assert files[0] == files[1]
    assert 0 < pq.read_metadata(tmp_path / "1/train.parquet").num_rows < 7_500


def test_no_rows(tmp_path: Path, tokenizer_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_chats(tmp_path / "none.parquet", [])
    write_chats(tmp_path / "one.parquet", [chat("text")])
    common = ["--out_dir", tmp_path / "out", "--tokenizer_path", tokenizer_path]
    assert run("--train_parquet", tmp_path / "none.parquet", *common) == 2
    assert "none.parquet has no rows" in one_complaint(capsys)
    assert run("--train_parquet", tmp_path / "one.parquet", *common, "--max_len", 5) == 2
    assert "each has a text over --max_len 5 tokens (longest: text " in one_complaint(capsys)
    assert not list(tmp_path.glob("out/*"))
    none, one = tmp_path / "none.parquet", tmp_path / "one.parquet"
    assert run("--train_parquet", one, "--val_parquet", none, *common) == 0
    assert "test: kept 0 of 0 rows" in capsys.readouterr().out
    test, train = (pq.read_table(tmp_path / "out" / f"{split}.parquet") for split in ("test", "train"))
    assert (test.num_rows, train.num_rows) == (0, 1)
    assert test.schema.equals(train.schema, check_metadata=True)


def test_an_earlier_test_file_does_not_stay_beside_other_training_data(
    tmp_path: Path, tokenizer_path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, out = tmp_path / "one.parquet", tmp_path / "two.parquet", tmp_path / "out"
    for path in (one, two):
        write_chats(path, [chat(path.stem)])
    common = ["--out_dir", out, "--tokenizer_path", tokenizer_path]
    assert run("--train_parquet", one, "--val_parquet", two, *common) == 0
    assert run("--train_parquet", two, *common) == 0
    assert f"{out / 'test.parquet'}, of an earlier run, is removed" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["filter.json", "train.parquet"]
    # What would be removed cannot be the input.
    (out / "train.parquet").rename(out / "test.parquet")
    assert run("--train_parquet", out / "test.parquet", *common) == 2
    assert "test.parquet would be overwritten or removed; give another --out_dir" in one_complaint(capsys)
    assert pq.read_table(out / "test.parquet")["prompt"].to_pylist() == [chat("two")]


def write_odd_inputs(folder: Path) -> None:
    pq.write_table(pa.table({"title": ["a"], "body": ["b"]}), folder / "columns.parquet")
    pq.write_table(pa.table({"prompt": ["a"]}), folder / "strings.parquet")
    write_chats(folder / "inputs.parquet", [chat("a")], multi_input=pa.array([{"query": "q"}]))
    (folder / "text.parquet").write_text("not parquet")
    write_chats(folder / "null.parquet", [chat("a"), None])
    write_chats(folder / "empty.parquet", [chat("a"), chat("  ")])
    write_chats(folder / "turns.parquet", [[{"role": "system", "content": "alone"}]])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("columns", "has no column 'prompt'; found title, body"),
        ("strings", "column 'prompt' is string instead of a list of messages, without the text 'role', 'content'"),
        ("inputs", "column 'multi_input' is struct<query: string>, without the text 'negative_document'"),
        ("text", "is not a readable parquet file"),
        ("missing", "does not exist"),
        ("null", "row 2: prompt is null"),
        ("empty", "row 2: prompt has an empty user text"),
        ("turns", "row 1: prompt has no message of the role 'user'"),
    ],
)
@pytest.mark.parametrize("flag", ["--train_parquet", "--val_parquet"])
def test_odd_inputs_fail_with_one_line(
    tmp_path: Path,
    tokenizer_path: str,
    capsys: pytest.CaptureFixture[str],
    name: str,
    message: str,
    flag: str,
) -> None:
    write_odd_inputs(tmp_path)
    write_chats(tmp_path / "good.parquet", [chat("a")])
    argv = [
        "--tokenizer_path",
        tokenizer_path,
        "--out_dir",
        tmp_path / "out",
        flag,
        tmp_path / f"{name}.parquet",
    ]
    if flag == "--val_parquet":
        argv += ["--train_parquet", tmp_path / "good.parquet"]
    assert run(*argv) == 2
    assert message in one_complaint(capsys)
    assert not list(tmp_path.glob("out/*"))


def test_bad_tokenizers_and_arguments(tmp_path: Path, tokenizer_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "train.parquet"
    write_chats(path, [chat("a")])
    bare = AutoTokenizer.from_pretrained(tokenizer_path)
    bare.chat_template = None
    bare.save_pretrained(tmp_path / "bare")
    out = ["--out_dir", tmp_path / "out"]
    for more, message in [
        (["--tokenizer_path", tmp_path / "bare", *out], "has no chat template"),
        (["--tokenizer_path", tmp_path / "nowhere", *out], "does not exist"),
        (["--tokenizer_path", tokenizer_path, *out, "--max_len", 0], "--max_len is 0"),
        (["--tokenizer_path", tokenizer_path, "--out_dir", tmp_path], "train.parquet would be overwritten"),
    ]:
        assert run("--train_parquet", path, *more) == 2
        assert message in one_complaint(capsys)
    assert not list(tmp_path.glob("out/*"))
    assert pq.read_table(path).num_rows == 1


def test_the_program_measures_without_loading_torch(tmp_path, repo, tokenizer_path):
    write_chats(tmp_path / "in.parquet", [chat("a text")])
    command = [sys.executable, "-X", "importtime", "offline_filter_data.py", "--train_parquet", tmp_path / "in.parquet",
               "--out_dir", tmp_path / "out", "--tokenizer_path", tokenizer_path]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=repo)
    assert " transformers\n" in done.stderr and " torch\n" not in done.stderr


def test_a_program_that_hides_torch_measures_the_same_lengths(tokenizer_path):
    texts = ["short", "a somewhat longer text", "ünïcode 🙂 " * 20]
    script = (
        "import json, sys, verl.data.without_torch\n"
        "from verl.data.length_filter import FilterSettings, load_renderer\n"
        "from verl.embedding.prompts import rationale_messages\n"
        "chats = [rationale_messages(text) for text in json.loads(sys.argv[2])]\n"
        "settings = FilterSettings(sys.argv[1], 9, 'prompt', False)\n"
        "print(json.dumps([sys.modules['torch'] is None, load_renderer(settings).lengths(chats)]))\n"
    )
    command = [sys.executable, "-c", script, tokenizer_path, json.dumps(texts)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    hidden, lengths = json.loads(done.stdout)
    assert hidden and not done.stderr
    renderer = load_renderer(FilterSettings(tokenizer_path, 9, "prompt", trust_remote_code=False))
    assert lengths == renderer.lengths([rationale_messages(text) for text in texts])

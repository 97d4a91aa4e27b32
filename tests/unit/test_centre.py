"""The mean vector that is kept with a model, and its direction taken out of the vectors of encoder and programs."""

import json
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open
from safetensors.numpy import save
from tiny import save_tiny

import process_data
import verl.centre as program
from verl import GraceEncoder
from verl.checkpoint.model_card import write_checkpoint_card
from verl.checkpoint.run_folder import STATE, find_fault
from verl.config import RunConfig
from verl.embedding.centre import FILE_NAME, Centre
from verl.embedding.prompts import rationale_messages
from verl.embedding.settings import EmbedderSettings
from verl.encoder.find_centre import read_texts
from verl.errors import UserError
from verl.step_schedule import StepSchedule

TEXTS = ["a card", "where is my parcel?", "naïve café"]
SHORT = {"max_new_tokens": 6}


def save_model(folder, **settings):
    save_tiny(folder)
    EmbedderSettings(**SHORT, **settings).write(folder)
    return folder


def slow_centred(vectors, mean):
    """Each vector minus its product with the unit mean, times it; then of unit length."""
    length = sum(x * x for x in mean) ** 0.5
    direction = [x / length for x in mean]
    found = []
    for vector in vectors:
        along = sum(x * c for x, c in zip(vector, direction, strict=True))
        found.append([x - along * c for x, c in zip(vector, direction, strict=True)])
    return np.array(found)


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A model whose vectors are averages, and its copy with a centre of six texts."""
    folder = tmp_path_factory.mktemp("centre")
    model = save_model(folder / "model", no_rationale_weight=0.3, text_share=0.6)
    rows = [{"query": "one", "positive": ["two", "too"], "negative": "three"},
            {"anchor": "one", "pos": "four", "neg": "five"}]  # fmt: skip
    (folder / "triplets.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--model", str(model), "--input", str(folder / "triplets.jsonl"), "--output", str(folder / "centred")]
    assert program.main([*arguments, "--device", "cpu"]) == 0
    return model, folder / "centred"


@pytest.mark.parametrize("think", [True, False])
def test_the_direction_of_the_mean_is_taken_out_of_every_vector(pair, think):
    model, copy = pair
    plain, centred = GraceEncoder(model, device="cpu"), GraceEncoder(copy, device="cpu")
    # Of vectors with rationales and of those without, which have means of their own.
    mean = plain.encode(["one", "two", "three", "four", "five"], think=think).mean(axis=0)
    raw = plain.encode(TEXTS, think=think, normalize_embeddings=False)
    expected = slow_centred(raw.tolist(), mean.tolist())
    found = centred.encode(TEXTS, think=think, normalize_embeddings=False)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(centred.encode(TEXTS, think=think), unit(expected), atol=1e-5)
    # The whole direction goes before dimensions do.
    cut = centred.encode(TEXTS, think=think, truncate_dim=10)
    np.testing.assert_allclose(cut, unit(expected[:, :10]), atol=1e-5)
    assert plain.describe(think=think) != centred.describe(think=think)
    off = GraceEncoder(copy, device="cpu", centre=False)
    np.testing.assert_array_equal(off.encode(TEXTS, think=think), plain.encode(TEXTS, think=think))
    assert off.describe(think=think) == plain.describe(think=think)


def test_a_model_that_embeds_without_rationales_has_a_centre_of_such_vectors_alone(pair, tmp_path):
    shutil.copytree(pair[0], tmp_path / "model")
    model = GraceEncoder(pair[0], device="cpu")
    model.settings.changed(think=False).write(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--input", str(pair[0].parent / "triplets.jsonl")]
    assert program.main([*arguments, "--device", "cpu"]) == 0
    centred = GraceEncoder(tmp_path / "model", device="cpu")
    np.testing.assert_array_equal(
        centred.encode(TEXTS), GraceEncoder(pair[1], device="cpu").encode(TEXTS, think=False)
    )  # fmt: skip
    with pytest.raises(UserError, match="centre is that of vectors without rationales, and these are with; make it"):
        centred.encode(TEXTS, think=True)


def test_a_store_serves_models_with_and_without_a_centre(pair, tmp_path):
    """It holds vectors before the centre is taken out; and a centre is no part of the weights."""
    model, copy = pair
    with GraceEncoder(model, device="cpu", store=tmp_path) as encoder:
        plain = encoder.encode(TEXTS)
    with GraceEncoder(copy, device="cpu", store=tmp_path) as encoder:
        centred = encoder.encode(TEXTS)
        assert encoder.usage.vectors_made == 0
    np.testing.assert_allclose(centred, GraceEncoder(copy, device="cpu").encode(TEXTS), atol=1e-6)
    assert np.abs(centred - plain).max() > 0.01


def test_the_programs_use_it_without_being_told(pair, tmp_path):
    import verl.encoder.__main__ as embed

    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    for folder, flags in ((pair[1], []), (pair[0], ["--no_centre"]), (pair[0], ["--text_share", "length"])):
        arguments = ["--model", folder, "--input", tmp_path / "texts.jsonl", "--output", tmp_path / "v.parquet", *flags]
        assert embed.main([*map(str, arguments), "--device", "cpu"]) == 0
        vectors = np.stack(pq.read_table(tmp_path / "v.parquet")["vector"].to_numpy())
        share = {"text_share": "length"} if "length" in flags else {}
        np.testing.assert_allclose(vectors, GraceEncoder(folder, device="cpu", **share).encode(TEXTS), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"no_rationale_weight": 0},
            r"by no_rationale_weight=0\.3, and it is 0\.0 now; make it again with",
        ),
        ({"text_share": "length"}, r"by text_share=0\.6, and it is None now"),
        ({"system_prompt": "Other words."}, "by system_prompt='Read the text"),
    ],
)
def test_the_mean_of_other_vectors_is_refused(pair, options, message):
    with pytest.raises(UserError, match=message):
        GraceEncoder(pair[1], device="cpu", **options)
    GraceEncoder(pair[1], device="cpu", centre=False, **options)


def test_a_mean_belongs_to_the_template_and_its_instruction(tmp_path):
    mean = Centre(np.ones(8, np.float32), None)
    asks = {"template": "{instruction}: {text}", "instructions": {"default": "find", "other": "sort"}}
    mean.write(tmp_path, EmbedderSettings(**asks))
    # What texts without a role and a task do not see.
    same = {**asks, "query": {"template": "Query: {text}"}, "instructions": {"default": "find"}}
    found = Centre.read(tmp_path, EmbedderSettings(**same))
    np.testing.assert_array_equal(found.with_rationale, mean.with_rationale)
    for other in ({}, {"template": "Text: {text}"}, {**asks, "instructions": {"default": "sort"}}):
        with pytest.raises(UserError, match=r"by template='find: \{text\}', and it is '.*\{text\}' now; make it again"):
            Centre.read(tmp_path, EmbedderSettings(**other))


def test_a_mean_that_does_not_say_its_template_is_refused(tmp_path):
    Centre(np.ones(8, np.float32), None).write(tmp_path, EmbedderSettings())
    with safe_open(tmp_path / FILE_NAME, framework="np") as file:
        decided = json.loads(file.metadata()["settings"])
    assert decided.pop("template") == "{text}"
    without = save({"with_rationale": np.ones(8, np.float32)}, {"settings": json.dumps(decided)})
    (tmp_path / FILE_NAME).write_bytes(without)
    for template in ("{text}", "Text: {text}"):
        with pytest.raises(UserError, match=rf"by template=None, and it is '{re.escape(template)}' now; make it again"):
            Centre.read(tmp_path, EmbedderSettings(template=template))


def test_a_file_that_is_missing_damaged_or_of_another_model_is_an_error(pair, tmp_path):
    model = save_model(tmp_path / "model")
    settings = EmbedderSettings.read(model)
    with pytest.raises(UserError, match=rf"centre=True, and .*{FILE_NAME} does not exist; make it again"):
        GraceEncoder(model, device="cpu", centre=True)
    (model / FILE_NAME).parent.mkdir()
    (model / FILE_NAME).write_bytes((pair[1] / FILE_NAME).read_bytes()[:-5])
    with pytest.raises(UserError, match=f"{FILE_NAME} is damaged or no centre"):
        GraceEncoder(model, device="cpu", centre=True)
    shutil.copyfile(model / "model.safetensors", model / FILE_NAME)
    with pytest.raises(UserError, match=f"{FILE_NAME} is damaged or no centre"):
        GraceEncoder(model, device="cpu", centre=True)
    Centre(np.ones(8, np.float32), None).write(model, settings)
    with pytest.raises(UserError, match="a centre of 8 dimensions, and its model has 64"):
        GraceEncoder(model, device="cpu", centre=True).encode("a card")


def test_a_checkpoint_gets_a_centre_in_place_and_still_resumes(tmp_path, capsys):
    step = tmp_path / "global_step_1"
    model = save_model(step / "huggingface", span="rationale")
    write_checkpoint_card(model, RunConfig(), EmbedderSettings.read(model), StepSchedule(1, 1, 1), 1, {})
    files = {str(file.relative_to(step)): file.stat().st_size for file in model.iterdir()}
    (step / STATE).write_text(json.dumps({"files": files}))
    texts = [{"prompt": rationale_messages(text)} for text in TEXTS]
    pq.write_table(pa.Table.from_pylist(texts), tmp_path / "train.parquet")
    arguments = ["--model", str(model), "--input", str(tmp_path / "train.parquet"), "--device", "cpu"]
    assert program.main([*arguments, "--max_texts", "2"]) == 0
    assert "the mean of 2 of 3 texts" in capsys.readouterr().out
    assert EmbedderSettings.read(model).centre and "| centre | true |" in (model / "README.md").read_text()
    assert "## How it was trained\n\n| | |" in (model / "README.md").read_text()
    assert find_fault(step) is None
    # A second time: the new mean is that of the vectors themselves, not of centred ones.
    first = (model / FILE_NAME).read_bytes()
    assert program.main([*arguments, "--max_texts", "2"]) == 0
    assert (model / FILE_NAME).read_bytes() == first


def test_rationales_may_be_shorter_than_those_of_the_settings(pair, tmp_path):
    (tmp_path / "t.txt").write_text("\n".join(TEXTS))
    arguments = ["--model", str(pair[0]), "--input", str(tmp_path / "t.txt"), "--output", str(tmp_path / "centred")]
    assert program.main([*arguments, "--device", "cpu", "--max_new_tokens", "2"]) == 0
    encoder = GraceEncoder(tmp_path / "centred", device="cpu", centre=False)
    found = Centre.read(tmp_path / "centred", encoder.settings).with_rationale
    np.testing.assert_allclose(found, encoder.encode(TEXTS, max_new_tokens=2).mean(0), atol=1e-6)
    assert encoder.settings.max_new_tokens == SHORT["max_new_tokens"]
    assert np.abs(found - encoder.encode(TEXTS).mean(0)).max() > 1e-4


def test_the_prompt_of_a_flag_embedding_file_is_no_chat(tmp_path):
    table = pa.table({"query": ["a"], "pos": [["b"]], "neg": [["c"]], "prompt": ["find it"]})
    pq.write_table(table, tmp_path / "t.parquet")
    assert list(read_texts(tmp_path / "t.parquet")) == ["a", "b", "c"]


def test_a_bad_first_triplet_is_named_as_what_it_is(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"query": "a", "positive": "b", "negative": ""}\n')
    with pytest.raises(UserError, match="line 1: negative is empty"):
        list(read_texts(tmp_path / "t.jsonl"))


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("t.txt", "one\n\n two \n", ["one", "two"]),
        ("t.jsonl", '{"sentence": " one "}\n{"text": "two"}\n', ["one", "two"]),
        ("t.csv", "text,more\none,1\ntwo,2\n", ["one", "two"]),
        ("t.tsv", "query\tpositive\tnegative\na\tb\tc\nd\te\tf\n", list("abcdef")),
        ("t.json", '[{"query": "a", "positive": "b", "negative": "c"}]', list("abc")),
    ],
)
def test_the_input_is_any_file_that_process_data_reads_and_the_one_that_it_writes(tmp_path, name, content, texts):
    given = tmp_path / name
    given.write_text(content)
    assert list(read_texts(given)) == texts
    mode = "supervised" if "a" in texts else "unsupervised"
    arguments = ["--mode", mode, "--input_file", given, "--local_dir", tmp_path / "data", "--test_ratio", "0"]
    assert process_data.main([str(argument) for argument in arguments]) == 0
    assert sorted(read_texts(tmp_path / "data/train.parquet")) == texts


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_texts", "1"], "--max_texts=1 must be 2 or more"),
        (["--model", "org/name"], "--model=org/name is not a folder; give --output"),
        (["--output", "."], "--output=. exists and is not an empty folder"),
        (["--input", "one.jsonl"], "--input=one.jsonl has 1 different texts; give 2 or more"),
        (["--input", "none.jsonl"], "none.jsonl does not exist"),
        (["--input", "title.jsonl"], "title.jsonl, line 1: no text (text|sentence)"),
    ],
)
def test_what_cannot_work_is_told_before_a_model_is_loaded(pair, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.jsonl").write_text('{"text": "same"}\n{"text": "same"}\n')
    (tmp_path / "title.jsonl").write_text('{"title": "a"}\n')
    assert program.main(["--model", str(pair[0]), "--input", "one.jsonl", *flags]) == 2
    assert message in capsys.readouterr().err

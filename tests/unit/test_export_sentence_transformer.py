"""verl.export_sentence_transformer: its folder against GraceEncoder(think=False), without verl, and what it rejects."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from jinja2 import TemplateError
from sentence_transformers import SentenceTransformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from tiny import TEMPLATE, save_tiny, tiny_model

from verl import GraceEncoder
from verl import export_sentence_transformer as program
from verl.embedding.centre import Centre
from verl.embedding.prompts import rationale_messages
from verl.embedding.settings import EmbedderSettings
from verl.encoder import export

# No text holds a marker of the chat template: the export reads it as a marker, the encoder as plain characters.
TEXTS = [
    "where is my parcel?", "x", "", "  \n", "\x1d spaces of all kinds \u2003\xa0", "naïve café 東京 🦊", "9 + 1",
    "'tis", "Read the text.", "user\nassistant\n", "two\n\nparagraphs ", "<| im_end |> in the text",
    "/tmp/cat.jpg", "long and longer " * 10, "éa" * 30, "overlong" * 100,
]  # fmt: skip
LENGTH = 400
VARIANTS = {
    "mean": {},
    "last": {"pooling": "last"},
    "whole prompt": {"pool_system_prompt": True},
    "centred, with a mix for rationales": {"centre": True, "text_share": 0.3, "no_rationale_weight": 0.5},
    "no system turn": {"system_prompt": None},
    "roles": {
        "template": "Text: {text}",
        "query": {"template": "Instruct: {instruction}\nQuery: {text}"},
        "document": {"template": "{text} (end)"},
        "instructions": {"default": "find 'what' answers", "other": "another"},
    },
    "other system turn": {"system_prompt": 'It\'s "quoted" {{ text }}, naïve 🦊\nand\\n two lines.'},
}
# Run in a process that cannot import verl.
ALONE = """
import sys
sys.modules["verl"] = None
import numpy as np
from sentence_transformers import SentenceTransformer
np.save(sys.argv[2], SentenceTransformer(sys.argv[1], device="cpu", local_files_only=True).encode(eval(sys.argv[3])))
assert not [name for name in sys.modules if name.startswith("verl.")]
"""


def save_model(folder: Path, llama: bool = False, **settings) -> Path:
    save_tiny(folder, llama=llama)
    chosen = EmbedderSettings(**{"max_prompt_length": LENGTH, **settings})
    chosen.write(folder)
    if chosen.centre:
        draw = np.random.default_rng(0)
        Centre(*draw.normal(size=(2, 64)).astype(np.float32)).write(folder, chosen)
    return folder


def run(model: Path, output: Path) -> int:
    return program.main(["--model_path", str(model), "--output", str(output)])


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    """An encoder, and the folder exported from its model."""
    folder = tmp_path_factory.mktemp("export")
    model = save_model(folder / "model", **VARIANTS[request.param])
    assert run(model, folder / "out") == 0
    return GraceEncoder(model, device="cpu"), folder / "out"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A model folder with the usual settings, and the folder exported from it."""
    folder = tmp_path_factory.mktemp("plain")
    model = save_model(folder / "model")
    assert run(model, folder / "out") == 0
    return model, folder / "out"


def test_vectors_are_those_of_the_encoder_whatever_the_batch(pair):
    encoder, folder = pair
    expected = encoder.encode(TEXTS, think=False)
    model = SentenceTransformer(str(folder), device="cpu")
    for size in (1, 3, 64):
        np.testing.assert_allclose(model.encode(TEXTS, batch_size=size), expected, atol=1e-5)
        np.testing.assert_allclose(model.encode(TEXTS[::-1], batch_size=size)[::-1], expected, atol=1e-5)
    for encode, role in ((model.encode_query, "query"), (model.encode_document, "document")):
        np.testing.assert_allclose(encode(TEXTS), encoder.encode(TEXTS, role=role, think=False), atol=1e-5)
    np.testing.assert_allclose(model.encode(TEXTS[0]), expected[0], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(model.encode(TEXTS), axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(model.similarity(expected, expected).numpy(), expected @ expected.T, atol=1e-5)
    assert model.similarity_fn_name == "cosine"


def test_a_text_that_is_cut_after_a_space_or_within_a_character_keeps_the_end_of_the_prompt(pair):
    encoder, folder = pair
    texts = [f"{'x' * shift}{text * 200}" for text in ("ab ", "東") for shift in range(3)]
    chats = [rationale_messages(text, encoder.settings.system_prompt) for text in texts]
    model = SentenceTransformer(str(folder), device="cpu")
    around = [encoder.settings.around(None)] * len(texts)
    more = []
    for text, prompt in zip(texts, encoder.renderer.render(chats, around), strict=True):
        ids = model.preprocess([text])["input_ids"][0].tolist()
        assert len(ids) == LENGTH
        start, end = prompt.text_start, len(prompt.ids) - len("#\n#assistant\n")
        assert ids[start:end] == prompt.ids[start:end] and ids[-12:] == prompt.ids[-12:]
        more.append(len(ids) - len(prompt.ids))
    assert set(more) == {0, 1, 2}


def test_the_folder_loads_and_embeds_without_this_project(plain, tmp_path):
    model, folder = plain
    moved = shutil.copytree(folder, tmp_path / "moved")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-I", "-c", ALONE, str(moved), str(tmp_path / "vectors.npy"), repr(TEXTS)]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment, timeout=300)
    expected = GraceEncoder(model, device="cpu").encode(TEXTS, think=False)
    np.testing.assert_allclose(np.load(tmp_path / "vectors.npy"), expected, atol=1e-5)
    files = {file for file in folder.rglob("*") if file.is_file()}
    assert {file.suffix for file in files} == {".json", ".jinja", ".md", ".safetensors"}
    small = [file.read_text() for file in files if file.suffix != ".safetensors"]
    assert not any("auto_map" in text or str(folder.parent) in text for text in small)


def test_the_card_says_what_the_folder_is(plain):
    card = (plain[1] / "README.md").read_text()
    for part in ("WITHOUT rationales", "cheap baseline", 'GraceEncoder("path/to/model")', 'SentenceTransformer("path'):
        assert part in card
    assert f"{LENGTH} tokens" in card and "64 dimensions" in card


def test_a_model_that_embeds_without_rationales_is_exported_as_that(tmp_path, capsys):
    model = save_model(tmp_path / "model", think=False)
    assert run(model, tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "the embeddings of model, which was trained to embed without rationales" in card
    assert "write a rationale" not in card and 'GraceEncoder("' not in card
    command = ["--model_path", str(model), "--output", str(tmp_path / "with"), "--rationales"]
    assert program.main(command) == 2
    assert "think=False: this model embeds without rationales; leave --rationales out" in capsys.readouterr().err


def test_other_prompts_turns_and_tasks_are_errors(plain):
    model = SentenceTransformer(str(plain[1]), device="cpu")
    for inputs, options in (
        (["a"], {"prompt": "query: "}),
        (["a"], {"task": "classification"}),
        ([[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]], {}),
    ):
        with pytest.raises(TemplateError, match="the prompt of this model is built in|give no other task"):
            model.encode(inputs, **options)


def test_padding_and_cutting_on_the_left_and_a_model_of_another_dtype_become_the_usual(tmp_path):
    model = save_model(tmp_path / "model", llama=True)
    tiny_model(llama=True).to(torch.bfloat16).save_pretrained(model)
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"padding_side": "left", "truncation_side": "left"}))
    (tmp_path / "out").mkdir()
    assert run(model, tmp_path / "out") == 0
    loaded = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert loaded.dtype == torch.float32 and loaded.tokenizer.padding_side == "right"
    expected = GraceEncoder(model, device="cpu").encode(TEXTS, think=False)
    np.testing.assert_allclose(loaded.encode(TEXTS), expected, atol=1e-5)


def test_spare_rows_after_the_vocabulary_are_used(plain, tmp_path):
    model = shutil.copytree(plain[0], tmp_path / "model")
    lm = tiny_model()
    lm.resize_token_embeddings(400)
    lm.save_pretrained(model)
    assert run(model, tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 400


def merge_border(folder: Path) -> None:
    """A template that ends in a space before the text, and a tokenizer that has one token for a space and an a."""
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["vocab"]["Ġa"] = tokenizer["model"]["vocab"].pop("Ā")
    tokenizer["model"]["merges"] = [["Ġ", "a"]]
    file.write_text(json.dumps(tokenizer))
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("message['role'] + '\\n'", "message['role'] + ' '"))


class TestRejected:
    """One line on stderr and exit code 2; nothing is written."""

    def rejected(self, model: Path, output: Path, capsys) -> str:
        before = sorted(output.parent.rglob("*"))
        assert run(model, output) == 2
        assert sorted(output.parent.rglob("*")) == before
        (line,) = capsys.readouterr().err.splitlines()
        return line

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"span": "rationale"}, "span=rationale pools rationales, and an export has none; use GraceEncoder"),
            ({"truncation": "left"}, "truncation=left: an export can only cut on the right"),
            ({"truncation": "error"}, "truncation=error: an export can only cut on the right"),
            ({"max_prompt_length": 5000}, "max_prompt_length=5000 is more than the model's 4096 positions; lower it"),
            ({"max_prompt_length": 20}, "leaves no room for text"),
        ],
    )
    def test_settings(self, plain, tmp_path, capsys, settings, message):
        model = shutil.copytree(plain[0], tmp_path / "model")
        EmbedderSettings(**{"max_prompt_length": LENGTH, **settings}).write(model)
        assert message in self.rejected(model, tmp_path / "out", capsys)

    def test_an_output_that_exists_or_a_model_that_does_not(self, plain, tmp_path, capsys):
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "file").write_text("mine")
        for output in (tmp_path / "full", tmp_path / "full" / "file"):
            message = self.rejected(plain[0], output, capsys)
            assert f"--output={output} exists and is not an empty folder; give another, or remove it" in message
        assert "does not exist" in self.rejected(tmp_path / "none", tmp_path / "out", capsys)

    def test_tokens_that_span_prompt_and_text(self, tmp_path, capsys):
        model = save_model(tmp_path / "model")
        merge_border(model)
        assert "the tokenizer splits 'a card' differently" in self.rejected(model, tmp_path / "out", capsys)

    def test_tokens_that_span_prompt_and_text_are_allowed_where_the_whole_prompt_is_pooled(self, tmp_path):
        model = save_model(tmp_path / "model", pool_system_prompt=True)
        merge_border(model)
        assert run(model, tmp_path / "out") == 0


def test_vectors_that_differ_are_reported_and_nothing_is_left(plain, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "MultiVectorMask", lambda words, **options: MultiVectorMask([], **options))
    assert run(plain[0], tmp_path / "out") == 1
    output = capsys.readouterr()
    assert "largest difference" in output.out and "that is above 0.0001; nothing is written" in output.err
    assert not list(tmp_path.iterdir())

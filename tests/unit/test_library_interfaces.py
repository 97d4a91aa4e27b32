"""The interfaces of LangChain, LlamaIndex and sentence-transformers against GraceEncoder itself."""

import asyncio
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from langchain_core.vectorstores import InMemoryVectorStore
from sentence_transformers import SentenceTransformer

from verl import GraceEncoder
from verl import export_sentence_transformer as program
from verl.embedding.settings import EmbedderSettings
from verl.encoder.langchain import GraceEmbeddings
from verl.errors import UserError

TEXTS = ["where is my card?", "a river at night", "naïve 東京 🦊", "where is my card?", "12 + 30"]
THINK = {"max_new_tokens": 6, "seed": 3}


@pytest.fixture(scope="module")
def expected(tiny_folder):
    with GraceEncoder(tiny_folder, device="cpu", engine="hf") as encoder:
        return encoder.encode(TEXTS, **THINK)


def test_langchain_gets_the_vectors_of_the_encoder(tiny_folder, expected):
    embeddings = GraceEmbeddings(tiny_folder, THINK, device="cpu", engine="hf")
    found = embeddings.embed_documents(TEXTS)
    assert isinstance(found, list) and isinstance(found[0], list) and isinstance(found[0][0], float)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(embeddings.embed_query(TEXTS[1]), expected[1], atol=1e-5)
    assert embeddings.embed_documents([]) == []
    store = InMemoryVectorStore(embeddings)
    store.add_texts(TEXTS[:3])
    (nearest,) = store.similarity_search(TEXTS[1], k=1)
    assert nearest.page_content == TEXTS[1]
    embeddings.close()


def test_langchain_is_called_from_threads_and_event_loops(tiny_folder, expected, tmp_path):
    """A store's database may be used from one thread only."""
    embeddings = GraceEmbeddings(tiny_folder, THINK, device="cpu", engine="hf", store=tmp_path / "store")
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(embeddings.embed_query, TEXTS))

    async def both() -> list:
        return await asyncio.gather(embeddings.aembed_documents(TEXTS), embeddings.aembed_query(TEXTS[2]))

    documents, query = asyncio.run(both())
    embeddings.close()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(documents, expected, atol=1e-5)
    np.testing.assert_allclose(query, expected[2], atol=1e-5)


def test_langchain_says_what_the_encoder_says(tiny_folder):
    with pytest.raises(UserError, match="engine"):
        GraceEmbeddings(tiny_folder, engine="tgi")
    embeddings = GraceEmbeddings(tiny_folder, {"max_new_tokens": 0}, device="cpu", engine="hf")
    with pytest.raises(UserError, match="max_new_tokens=0"):
        embeddings.embed_query("a text")
    embeddings.close()


def test_llama_index_gets_the_vectors_of_the_encoder(tiny_folder, expected):
    from llama_index.core import Document, VectorStoreIndex
    from llama_index.core.retrievers import VectorIndexRetriever

    from verl.encoder.llama_index import GraceEmbedding

    embedding = GraceEmbedding(tiny_folder, THINK, embed_batch_size=2, device="cpu", engine="hf")
    np.testing.assert_allclose(embedding.get_text_embedding_batch(TEXTS), expected, atol=1e-5)
    np.testing.assert_allclose(embedding.get_text_embedding(TEXTS[2]), expected[2], atol=1e-5)
    np.testing.assert_allclose(embedding.get_query_embedding(TEXTS[1]), expected[1], atol=1e-5)
    asked = asyncio.run(embedding.aget_text_embedding_batch(TEXTS))
    np.testing.assert_allclose(asked, expected, atol=1e-5)
    np.testing.assert_allclose(asyncio.run(embedding.aget_query_embedding(TEXTS[1])), expected[1], atol=1e-5)
    index = VectorStoreIndex.from_documents([Document(text=text) for text in TEXTS[:3]], embed_model=embedding)
    retriever = VectorIndexRetriever(index, similarity_top_k=1, embed_model=embedding)
    assert retriever.retrieve(TEXTS[0])[0].node.get_content() == TEXTS[0]
    embedding.close()


class TestSentenceTransformers:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        from tiny import save_tiny

        folder = tmp_path_factory.mktemp("rationales")
        model = save_tiny(folder / "model")
        settings = EmbedderSettings(
            max_prompt_length=400, span="rationale", truncation="error", query={"template": "Query: {text}"}
        )  # fmt: skip
        settings.write(model)
        assert program.main(["--model_path", str(model), "--output", str(folder / "out"), "--rationales"]) == 0
        return folder

    @pytest.fixture(scope="class")
    def encoder(self, folder):
        with GraceEncoder(folder / "model", device="cpu", engine="hf") as encoder:
            yield encoder

    def load(self, folder) -> SentenceTransformer:
        options = {"engine": "hf", "device": "cpu"}
        return SentenceTransformer(str(folder / "out"), device="cpu", trust_remote_code=True, model_kwargs=options)

    def test_vectors_are_those_of_the_encoder_whatever_the_batch(self, folder, encoder):
        model = self.load(folder)
        expected = encoder.encode(TEXTS, **THINK)
        for size in (1, 3, 64):
            np.testing.assert_allclose(model.encode(TEXTS, batch_size=size, **THINK), expected, atol=1e-5)
        query = encoder.encode(TEXTS, role="query", **THINK)
        assert np.abs(query - expected).max() > 1e-3
        np.testing.assert_allclose(model.encode_query(TEXTS, **THINK), query, atol=1e-5)
        np.testing.assert_allclose(model.encode_document(TEXTS[0], **THINK), expected[0], atol=1e-5)
        assert model.get_embedding_dimension() == 64 and model.similarity_fn_name == "cosine"
        other = model.encode(TEXTS, **{**THINK, "seed": 4})
        assert np.abs(other - expected).max() > 1e-3

    def test_the_folder_is_a_model_of_this_project_too(self, folder, encoder):
        with GraceEncoder(folder / "out", device="cpu", engine="hf") as copy:
            assert copy.settings == encoder.settings
            np.testing.assert_allclose(copy.encode(TEXTS, **THINK), encoder.encode(TEXTS, **THINK), atol=1e-6)

    def test_nothing_runs_without_trust(self, folder):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            SentenceTransformer(str(folder / "out"), device="cpu")

    def test_the_card_says_what_is_run(self, folder):
        (module,) = json.loads((folder / "out" / "modules.json").read_text())
        card = (folder / "out" / "README.md").read_text()
        assert module["type"] == "verl.encoder.sentence_transformers.GraceModule" and module["type"] in card
        assert not list((folder / "out").glob("*.py"))

    def test_another_length_is_heeded(self, folder):
        model, long = self.load(folder), ["a card " * 200]
        assert model.max_seq_length == model.get_max_seq_length() == 400
        with pytest.raises(ValueError, match="more than max_prompt_length=400"):
            model.encode(long)
        model.max_seq_length = 2000
        expected = GraceEncoder(folder / "out", device="cpu", max_prompt_length=2000).encode(long)
        np.testing.assert_allclose(model.encode(long), expected, atol=1e-6)
        with pytest.raises(UserError, match="max_prompt_length=0"):
            model.max_seq_length = 0

    def test_a_prompt_or_a_chat_is_refused(self, folder):
        model = self.load(folder)
        with pytest.raises(UserError, match="give none"):
            model.encode(TEXTS, prompt="query: ", **THINK)
        with pytest.raises(ValueError, match="every text must be a string"):
            model.encode([None, "a text"], **THINK)

    def test_a_revision_of_a_hub_name_is_that_of_the_weights_too(self, folder, tmp_path):
        """Of files that were downloaded, as a cache of the hub holds them."""
        from tiny import tiny_model

        snapshots = {}
        for name, commit in (("main", "a" * 40), ("v1", "b" * 40)):
            snapshots[name] = shutil.copytree(folder / "out", tmp_path / "models--me--it" / "snapshots" / commit)
            (tmp_path / "models--me--it" / "refs").mkdir(exist_ok=True)
            (tmp_path / "models--me--it" / "refs" / name).write_text(commit)
        tiny_model(seed=1).save_pretrained(snapshots["v1"])
        options = {"engine": "hf", "device": "cpu"}
        model = SentenceTransformer(
            "me/it", revision="v1", cache_folder=str(tmp_path), local_files_only=True, device="cpu",
            trust_remote_code=True, model_kwargs=options,
        )  # fmt: skip
        found = model.encode(TEXTS, **THINK)
        with GraceEncoder(snapshots["v1"], **options) as encoder:
            np.testing.assert_allclose(found, encoder.encode(TEXTS, **THINK), atol=1e-5)
        with GraceEncoder(snapshots["main"], **options) as encoder:
            assert np.abs(found - encoder.encode(TEXTS, **THINK)).max() > 1e-3

    @pytest.mark.parametrize(
        "given", [{"config_kwargs": {"rope_theta": 1.0}}, {"processor_kwargs": {"padding_side": "left"}}]
    )
    def test_options_that_it_cannot_heed_are_refused(self, folder, given):
        with pytest.raises(UserError, match=f"{next(iter(given))}=.* has no effect on this model"):
            SentenceTransformer(str(folder / "out"), device="cpu", trust_remote_code=True, **given)

"""Local tasks through mteb: their scores against loops over the encoder's own vectors, in every layout."""

import json
import math
from pathlib import Path

import mteb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from eval_files import SENTENCES, TOPICS, write_beir, write_jsonl, write_tasks
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from torch.utils.data import DataLoader

from verl import GraceEncoder
from verl.evaluation.local_tasks import find_local_tasks
from verl.evaluation.mteb_model import GraceMTEB

OPTIONS = {"max_new_tokens": 8, "seed": 3}


@pytest.fixture(scope="module")
def model(tiny_folder):
    return GraceMTEB(GraceEncoder(tiny_folder, device="cpu"), "tiny", OPTIONS)


@pytest.fixture(scope="module")
def results(model, tmp_path_factory):
    """The first split's scores of every task, by its name."""
    tasks = find_local_tasks(write_tasks(tmp_path_factory.mktemp("tasks")))
    found = mteb.evaluate(model, tasks, cache=None, co2_tracker=False, encode_kwargs={"batch_size": 4})
    assert not found.exceptions
    return {result.task_name: result.scores["test"][0] for result in found.task_results}


def vectors(model, texts):
    return model.encoder.encode(texts, **OPTIONS)


def test_every_type_runs_and_has_its_main_score(results):
    assert {name: scores["main_score"] for name, scores in results.items()} == {
        "Classes": results["Classes"]["accuracy"],
        "Clusters": results["Clusters"]["v_measure"],
        "Pairs": results["Pairs"]["max_ap"],
        "Ranks": results["Ranks"]["map_at_1000"],
        "Search": results["Search"]["ndcg_at_10"],
        "Sts": results["Sts"]["cosine_spearman"],
        "Summaries": results["Summaries"]["cosine_spearman"],
        "Triples": results["Triples"]["triplet_accuracy"],
    }
    assert all(math.isfinite(scores["main_score"]) for scores in results.values())


def test_sts_is_spearman_of_cosines(results, model, tmp_path):
    rows = [json.loads(line) for line in (write_tasks(tmp_path) / "Sts.sts.jsonl").read_text().splitlines()]
    first, second = (vectors(model, [row[f"sentence{k}"] for row in rows]) for k in (1, 2))
    expected = spearmanr([float(a @ b) for a, b in zip(first, second, strict=True)], [r["score"] for r in rows])
    assert results["Sts"]["cosine_spearman"] == pytest.approx(expected.statistic, abs=1e-6)


def test_retrieval_is_ndcg_over_title_and_text(results, model):
    documents = vectors(model, [f"{topic} {text}" for topic, text in SENTENCES])
    total = 0.0
    for number, query in enumerate(vectors(model, list(TOPICS))):
        ranking = np.argsort([-float(query @ document) for document in documents])[:10]
        gains = [1.0 if place in (3 * number, 3 * number + 1) else 0.0 for place in ranking]
        total += sum(gain / math.log2(rank + 2) for rank, gain in enumerate(gains)) / (1 + 1 / math.log2(3))
    assert results["Search"]["ndcg_at_10"] == pytest.approx(total / len(TOPICS), abs=1e-4)


def test_reranking_is_map_over_a_querys_own_documents(results, model):
    total = 0.0
    for topic, texts in TOPICS.items():
        own = texts[:2] + [text for other, text in SENTENCES if other != topic]
        (query,), documents = vectors(model, [topic]), vectors(model, own)
        ranking = np.argsort([-float(query @ document) for document in documents])
        places = sorted(list(ranking).index(relevant) + 1 for relevant in (0, 1))
        total += (1 / places[0] + 2 / places[1]) / 2
    assert results["Ranks"]["map_at_1000"] == pytest.approx(total / len(TOPICS), abs=1e-4)


def test_triplets_count_queries_nearer_to_their_positive(results, model):
    right = 0
    for topic, texts in TOPICS.items():
        negative = next(text for other, text in SENTENCES if other != topic)
        query, near, far = vectors(model, [topic, texts[0], negative])
        right += float(query @ near) > float(query @ far)
    assert results["Triples"]["triplet_accuracy"] == pytest.approx(right / len(TOPICS))
    assert {"mean_cosine", "effective_rank", "uniformity", "mrr"} <= results["Triples"].keys()


def test_classifiers_and_clusterings_get_the_vectors_as_they_are(model):
    texts = [text for _, text in SENTENCES]
    batches = DataLoader(Dataset.from_dict({"text": texts}), batch_size=4)
    asked = {"task_metadata": None, "hf_split": "test", "hf_subset": "default"}
    means = model.encoder.encode(texts, normalize_embeddings=False, **OPTIONS)
    np.testing.assert_array_equal(model.encode(batches, **asked), means)
    assert np.linalg.norm(means, axis=1).min() > 2
    scaled = GraceMTEB(model.encoder, "tiny", {**OPTIONS, "normalize_embeddings": True})
    np.testing.assert_allclose(scaled.encode(batches, **asked), vectors(model, texts), atol=1e-6)
    # mteb finds stored results by this.
    of = [m.mteb_model_meta.experiment_kwargs["normalize_embeddings"] for m in (model, scaled)]
    assert of == [False, True]


def test_the_accuracy_is_that_of_a_classifier_on_vectors_as_they_are(results, model):
    """mteb draws 8 texts of a label; here a label has 3, so every draw is all of them."""
    texts = [text for _, text in SENTENCES]
    train, test = (
        model.encoder.encode(some, normalize_embeddings=False, **OPTIONS)
        for some in (texts, [f"{text} today" for text in texts])
    )
    labels = [topic for topic, _ in SENTENCES]
    classifier = LogisticRegression(max_iter=100, random_state=42).fit(train, labels)
    assert results["Classes"]["accuracy"] == pytest.approx(classifier.score(test, labels), abs=1e-6)


def test_pairs_are_scored_by_their_cosine(results, model, tmp_path):
    rows = [json.loads(line) for line in (write_tasks(tmp_path) / "Pairs.pairs.jsonl").read_text().splitlines()]
    first, second = (vectors(model, [row[f"sentence{k}"] for row in rows]) for k in (1, 2))
    order = sorted(range(len(rows)), key=lambda i: -float(first[i] @ second[i]))
    hits, precisions = 0, []
    for rank, i in enumerate(order, start=1):
        if rows[i]["label"]:
            hits += 1
            precisions.append(hits / rank)
    assert results["Pairs"]["cosine_ap"] == pytest.approx(sum(precisions) / len(precisions), abs=1e-6)


def test_equal_texts_of_a_step_are_thought_about_once(tiny_folder, tmp_path):
    encoder = GraceEncoder(tiny_folder, device="cpu", store=tmp_path / "store")
    tasks = find_local_tasks(write_tasks(tmp_path / "tasks"))
    mteb.evaluate(GraceMTEB(encoder, "tiny", OPTIONS), tasks, cache=None, co2_tracker=False)
    texts = {text for task in tasks for text in task.texts}
    assert encoder.usage.rationales_made == len(texts)


def test_parquet_and_other_column_names_are_read(tmp_path):
    folder = tmp_path / "tasks" / "Search.retrieval"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"doc_id": [1, 2], "text": ["one", "two"]}), folder / "corpus.parquet")
    write_jsonl(folder / "queries.jsonl", [{"query_id": 7, "text": "uno", "relevant_doc_id": "1"}])
    prepared = {"extra_info": [{"original_query": "q", "positive_example": "p", "negative_example": "n"}]}
    pq.write_table(pa.table(prepared), tmp_path / "tasks" / "HeldOut.triplets.parquet")
    triplets, search = find_local_tasks(tmp_path / "tasks")
    assert triplets.texts == ["q", "p", "n"]
    assert search.texts == ["one", "two", "uno"]
    search.load_data()
    assert search.dataset["default"]["test"]["relevant_docs"] == {"7": {"1": 1}}


def test_the_revision_follows_the_content(tmp_path):
    def revision() -> str:
        (task,) = find_local_tasks(tmp_path)
        return task.metadata.revision

    row = {"sentence1": "a", "sentence2": "b", "score": 1}
    write_jsonl(tmp_path / "Sts.sts.jsonl", [row, {**row, "score": 3}])
    first = revision()
    assert revision() == first
    write_jsonl(tmp_path / "Sts.sts.jsonl", [row, {**row, "score": 2}])
    assert revision() != first


def test_beirs_layout_gives_the_same_scores(tmp_path, model, results):
    folder = write_tasks(tmp_path / "own") / "Search.retrieval"
    queries = [json.loads(line) for line in (folder / "queries.jsonl").read_text().splitlines()]
    judged = "".join(f"{q['id']}\t{document}\t1\r\n" for q in queries for document in q.pop("relevant"))
    beir = write_beir(tmp_path / "beir" / "Search", test=judged)
    (beir / "corpus.jsonl").write_text((folder / "corpus.jsonl").read_text())
    write_jsonl(beir / "queries.jsonl", queries)
    found = mteb.evaluate(model, find_local_tasks(beir.parent), cache=None, co2_tracker=False)
    scores = found.task_results[0].scores["test"][0]
    assert scores["ndcg_at_10"] == pytest.approx(results["Search"]["ndcg_at_10"], abs=1e-6)


def test_the_examples_are_tasks(repo: Path):
    assert [task.metadata.name for task in find_local_tasks(repo / "examples/eval")] == [
        "ExampleRetrieval",
        "ExampleSTS",
    ]

"""Local tasks through mteb: their scores against loops over the encoder's own vectors, and errors with their place."""

import json
import math
from pathlib import Path

import mteb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from eval_files import SENTENCES, TOPICS, write_jsonl, write_tasks
from scipy.stats import spearmanr

from verl import GraceEncoder
from verl.errors import UserError
from verl.evaluation.local_tasks import find_local_tasks
from verl.evaluation.mteb_model import GraceMTEB

GOOD = '{"sentence1": "a", "sentence2": "b", "score": 1}\n'
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
    write_jsonl(tmp_path / "Sts.sts.jsonl", [row])
    first = revision()
    assert revision() == first
    write_jsonl(tmp_path / "Sts.sts.jsonl", [{**row, "score": 2}])
    assert revision() != first


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("A.sts.jsonl", GOOD + '{"sentence1": "a"}\n', "line 2: sentence2 is None"),
        ("A.sts.jsonl", '{"sentence1": "a", "sentence2": "b", "score": "high"}\n', "line 1: score is 'high'"),
        ("A.sts.jsonl", '\n{"sentence1": \n', "A.sts.jsonl, line 2: not valid JSON"),
        ("A.sts.jsonl", "[1]\n", "line 1: a JSON list instead of an object"),
        ("A.sts.jsonl", "\n", "A.sts.jsonl is empty"),
        ("A.sts.parquet", "x", "A.sts.parquet is not a readable parquet file"),
        ("A.classification.jsonl", "{}\n", "is a folder A.classification with train.jsonl, test.jsonl"),
        ("triplets.jsonl", "{}\n", "holds no task; name files NAME.TYPE.jsonl"),
        ("notes.txt", "hello", "holds no task; name files NAME.TYPE.jsonl"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        find_local_tasks(tmp_path)


def test_a_folder_without_a_part_and_a_query_without_its_document_are_errors(tmp_path):
    write_jsonl(tmp_path / "S.retrieval" / "corpus.jsonl", [{"id": "d", "text": "x"}])
    with pytest.raises(UserError, match=r"S.retrieval holds no queries.jsonl \(nor queries.parquet\)"):
        find_local_tasks(tmp_path)
    write_jsonl(tmp_path / "S.retrieval" / "queries.jsonl", [{"id": "q", "text": "y", "relevant": ["e"]}])
    with pytest.raises(UserError, match="query q: e is not an id of the corpus"):
        find_local_tasks(tmp_path)


def test_the_examples_are_tasks(repo: Path):
    assert [task.metadata.name for task in find_local_tasks(repo / "examples/eval")] == [
        "ExampleRetrieval",
        "ExampleSTS",
    ]

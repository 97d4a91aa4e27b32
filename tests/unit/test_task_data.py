"""Files of local tasks: what is read, and that what cannot be read or scored is named with its place."""

import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from eval_files import write_beir, write_jsonl

from verl.errors import UserError
from verl.evaluation.local_tasks import find_local_tasks

GOOD = '{"sentence1": "a", "sentence2": "b", "score": 1}\n'


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
        ("triplets.jsonl", "{}\n", "holds no task; name files NAME.TYPE.jsonl .*there is triplets.jsonl"),
        ("A.sts.csv", "a,b,1\n", r"holds no task; name files NAME.TYPE.jsonl \(or .parquet\) .*there is A.sts.csv"),
        ("notes.txt", "hello", "holds no task; name files NAME.TYPE.jsonl"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        find_local_tasks(tmp_path)


STS = {"sentence1": "a", "sentence2": "b"}
RANKS = {"query": "q", "positive": ["a"], "negative": ["b"]}
SUMMARY = {"text": "t", "human_summaries": ["h"], "machine_summaries": ["m", "n"], "relevance": [1, 2]}


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        ("sts", [{**STS, "score": 1.0}, {**STS, "score": math.nan}], "row 2: score is nan, and must be a finite"),
        ("sts", [{**STS, "score": 1.0}, {**STS, "score": -math.inf}], "row 2: score is -inf, and must be a finite"),
        ("sts", [{**STS, "score": 4}, {**STS, "score": 4}], r"score is 4.0 in every row \(2 in all\).*correlation"),
        ("sts", [{**STS, "score": 4}], r"row 1: score is 4.0 in every row \(1 in all\)"),
        ("sts", [{**STS, "score": True}, {**STS, "score": False}], "row 1: score is True, and must be a finite number"),
        ("sts", [{**STS, "score": "4"}, {**STS, "score": "5"}], "row 1: score is '4', and must be a finite number"),
        ("sts", [{**STS, "score": 4, "sentence1": " "}], "row 1: sentence1 is ' ', and must be a text"),
        ("pairs", [{**STS, "label": 1}, {**STS, "label": 2}], r"row 2: .*label_text is 2, and must be 1 \(same\) or 0"),
        ("pairs", [{**STS, "label": 1}, {**STS, "label": -1}], "row 2: .* is -1, and must be 1"),
        ("pairs", [{**STS, "label": 0.5}], "row 1: .* is 0.5, and must be 1"),
        ("pairs", [{**STS, "label": "1"}], "row 1: .* is '1', and must be 1"),
        ("pairs", [{**STS, "label": 1}, {**STS, "label": 1}], r"row 1: label is 1 in every row \(2 in all\)"),
        ("clustering", [{"text": "a", "label": 1.0}, {"text": "b", "label": math.nan}], "row 2: .* is nan, and must"),
        ("clustering", [{"text": "a", "label": "x"}, {"text": "b", "label": "x"}], "row 1: label is 'x' in every row"),
        ("clustering", [{"text": "a", "label": ["x"]}], r"row 1: .* is \['x'\], and must be a text or a whole number"),
        ("clustering", [{"text": "", "label": "x"}], "row 1: .* is '', and must be a text that is not empty"),
        ("triplets", [{"query": "q", "positive": "", "negative": "n"}], r"row 1: positive\|pos\|.* is '', and must be"),
        ("triplets", [{"query": "q", "positive": "p", "negative": None}], "row 1: negative.* is None, and must be"),
        ("reranking", [{**RANKS, "positive": []}], r"row 1: positive\|pos\|.* is \[\], and must be a list that is"),
        ("reranking", [RANKS, {**RANKS, "positive": ["a", ""]}], r"row 2: positive\|pos.* is \['a', ''\], and must be"),
        ("reranking", [{**RANKS, "negative": []}], "row 1: negative.* must be a list that is not empty"),
        ("reranking", [{**RANKS, "negative": [None]}], "row 1: negative.* must be a list, each item a text"),
        ("summarization", [{**SUMMARY, "relevance": [1.0, math.nan]}], r"row 1: relevance is \[1.0, nan\]"),
        ("summarization", [{**SUMMARY, "relevance": [1]}], "row 1: 2 machine_summaries and 1 of relevance"),
        ("summarization", [{**SUMMARY, "relevance": [2, 2]}], r"row 1: relevance is \[2.0, 2.0\], and no row"),
        ("summarization", [{**SUMMARY, "human_summaries": []}], "row 1: human_summaries is"),
    ],
)  # fmt: skip
def test_gold_data_that_cannot_be_scored_is_named(tmp_path, kind, rows, message):
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"A.{kind}.parquet")
    with pytest.raises(UserError, match=message):
        find_local_tasks(tmp_path)


def test_numbers_of_both_kinds_are_scores_and_labels(tmp_path):
    write_jsonl(tmp_path / "A.sts.jsonl", [{**STS, "score": score} for score in (5, 3.5, 1.0)])
    write_jsonl(tmp_path / "B.pairs.jsonl", [{**STS, "label": value} for value in (True, 0, 1.0)])
    labelled = pa.table({"text": ["a", "b", "c"], "label": [1.0, 2.0, 1.0]})  # as pandas writes integers with a gap
    pq.write_table(labelled, tmp_path / "C.clustering.parquet")
    sts, pairs, clusters = find_local_tasks(tmp_path)
    assert sts.data["test"]["score"][:] == [5.0, 3.5, 1.0]
    assert (sts.min_score, sts.max_score) == (1.0, 5.0)
    assert pairs.data["test"]["labels"][:] == [1, 0, 1]
    assert clusters.data["test"]["labels"][:] == [0, 1, 0]


def test_labels_of_a_classification_are_those_of_its_training_texts(tmp_path):
    folder = tmp_path / "A.classification"
    write_jsonl(folder / "train.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "x"}])
    write_jsonl(folder / "test.jsonl", [{"text": "c", "label": "z"}])
    with pytest.raises(UserError, match=r"train.jsonl, line 1: label is 'x' in every row \(2 in all\)"):
        find_local_tasks(tmp_path)
    write_jsonl(folder / "train.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    with pytest.raises(UserError, match="test.jsonl, line 1: label 'z' is not a label of the training texts"):
        find_local_tasks(tmp_path)


CORPUS = [{"id": "d1", "text": "x"}, {"id": "d2", "text": "y"}]


@pytest.mark.parametrize(
    ("corpus", "queries", "message"),
    [
        (CORPUS, [{"id": "q", "text": "y", "relevant": []}], r"queries.jsonl, line 1: .* is \[\], and must be a"),
        (CORPUS, [{"id": "q", "text": "y", "relevant": ["e"]}], "line 1: corpus-id 'e' is not an id of the corpus"),
        (CORPUS, [{"id": "q", "text": "y", "relevant": ["d1", "d1"]}], "query-id 'q', corpus-id 'd1' is there twice"),
        (CORPUS, [{"id": "q", "text": "y", "relevant": ["d1"]}] * 2,
         "queries.jsonl, line 2: id 'q' is there twice, first at .*queries.jsonl, line 1"),
        ([*CORPUS, {"id": "d1", "text": "z"}], [{"id": "q", "text": "y", "relevant": ["d1"]}],
         "corpus.jsonl, line 3: id 'd1' is there twice, first at .*corpus.jsonl, line 1"),
        ([{"id": 1, "text": "x"}, {"id": "1", "text": "z"}], [{"id": "q", "text": "y", "relevant": ["1"]}],
         "corpus.jsonl, line 2: id '1' is there twice"),
        (CORPUS[:1], [{"id": "q", "text": "y", "relevant": ["d1"]}], r"id is 'd1' in every row \(1 in all\)"),
        ([{"id": 1.5, "text": "x"}], [], r"corpus.jsonl, line 1: .* is 1.5, and must be a text or a whole number"),
        ([{"id": "", "text": "x"}], [], r"corpus.jsonl, line 1: .* is '', and must be a text or a whole number"),
        (CORPUS, [{"id": "q", "text": "", "relevant": ["d1"]}], r"queries.jsonl, line 1: text\|sentence is ''"),
    ],
)  # fmt: skip
def test_ids_of_a_retrieval_fit_together(tmp_path, corpus, queries, message):
    write_jsonl(tmp_path / "S.retrieval" / "corpus.jsonl", corpus)
    write_jsonl(tmp_path / "S.retrieval" / "queries.jsonl", queries)
    with pytest.raises(UserError, match=message):
        find_local_tasks(tmp_path)


def test_a_folder_without_a_part_is_an_error(tmp_path):
    write_jsonl(tmp_path / "S.retrieval" / "corpus.jsonl", CORPUS)
    with pytest.raises(UserError, match=r"S.retrieval holds no queries.jsonl \(nor queries.parquet\)"):
        find_local_tasks(tmp_path)


class TestBeir:
    TEST = "q1\td1\t2\nq1\td2\t0\nq3\td2\t1\n"

    @pytest.mark.parametrize("name", ["scifact", "scifact.retrieval"])
    def test_its_own_layout_is_read(self, tmp_path, name):
        write_beir(tmp_path / name, train="q2\td1\t1\n", test=self.TEST)
        (tmp_path / name / "README.md").write_text("where it is from")
        (task,) = find_local_tasks(tmp_path)
        assert task.metadata.name == "scifact" and task.metadata.main_score == "ndcg_at_10"
        data = task.data["default"]["test"]
        assert data["relevant_docs"] == {"q1": {"d1": 2}, "q3": {"d2": 1}}
        assert data["corpus"].to_list() == [
            {"id": "d1", "text": "one", "title": "T"}, {"id": "d2", "text": "", "title": ""}
        ]  # fmt: skip
        assert data["queries"].to_list() == [{"id": "q1", "text": "ask 1"}, {"id": "q3", "text": "ask 3"}]
        assert task.texts == ["T one", "", "ask 1", "ask 3"]
        assert task.notes == ["scifact: 1 of 3 queries have no judgement, and are left out"]
        # The folder itself may be given too.
        (same,) = find_local_tasks(tmp_path / name)
        assert same.metadata.name == "scifact" and same.metadata.revision == task.metadata.revision

    def test_one_file_of_judgements_is_the_test_split(self, tmp_path):
        (task,) = find_local_tasks(write_beir(tmp_path / "set", dev="q2\td1\t1\n"))
        assert task.data["default"]["test"]["relevant_docs"] == {"q2": {"d1": 1}}

    @pytest.mark.parametrize(
        ("qrels", "message"),
        [
            ({"test": "q9\td1\t1\n"}, "test.tsv, line 2: query-id 'q9' is not an id of the queries"),
            ({"test": "q1\td9\t1\n"}, "test.tsv, line 2: corpus-id 'd9' is not an id of the corpus"),
            ({"test": "q1\td1\t1\nq1\td1\t2\n"}, "line 3: query-id 'q1', corpus-id 'd1' is there twice, first"),
            ({"test": "q1\td1\t1\nq2\td1\t0\n"}, r"line 3: query 'q2' has no relevant document \(a score above 0\)"),
            ({"test": "q1\td1\tnan\n"}, "line 2: score is 'nan', and must be a whole number"),
            ({"test": "q1\td1\n"}, "line 2: 2 cells, and must be 3: query-id, corpus-id, score"),
            ({"test": "q1 d1 1\n"}, "line 2: 1 cells, and must be 3"),
            ({"test": ""}, "test.tsv is empty"),
            ({"dev": "q1\td1\t1\n", "train": "q2\td1\t1\n"}, "holds dev.tsv, train.tsv; the split that is scored is"),
        ],
    )  # fmt: skip
    def test_judgements_that_do_not_fit_are_named(self, tmp_path, qrels, message):
        write_beir(tmp_path / "set", **qrels)
        with pytest.raises(UserError, match=message):
            find_local_tasks(tmp_path)

    def test_a_table_without_its_header_and_one_of_another_format_are_errors(self, tmp_path):
        folder = write_beir(tmp_path / "set", test=self.TEST)
        (folder / "qrels" / "test.tsv").write_text(self.TEST)
        with pytest.raises(
            UserError, match=r"line 1: the header is \['q1', 'd1', '2'\], and must be query-id, corpus-id"
        ):
            find_local_tasks(tmp_path)
        (folder / "qrels" / "test.tsv").rename(folder / "qrels" / "test.qrel")
        with pytest.raises(UserError, match="set/qrels: test.qrel would not be read"):
            find_local_tasks(tmp_path)


class TestOtherFiles:
    """A file that is not read is an error: its task would be missing in the mean."""

    @pytest.mark.parametrize(
        "other",
        ["B.sts.csv", "B.sts.json", "B.sts.jsonl.gz", "B.sts.txt", "B.stss.jsonl", "B.jsonl", "data.tsv", "raw/x"],
    )
    def test_one_beside_a_good_task_is_named(self, tmp_path, other):
        write_jsonl(tmp_path / "A.sts.jsonl", [{**STS, "score": 1}, {**STS, "score": 2}])
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_text("sentence1,sentence2,score\na,b,1\n")
        with pytest.raises(
            UserError, match=f"{other.removesuffix('/x')} would not be read; move it away, or name files"
        ):
            find_local_tasks(tmp_path)

    @pytest.mark.parametrize("other", ["corpus.parquet", "queries.csv", "qrels.tsv", "more.jsonl"])
    def test_one_in_a_tasks_folder_is_named(self, tmp_path, other):
        folder = tmp_path / "S.retrieval"
        write_jsonl(folder / "corpus.jsonl", CORPUS)
        write_jsonl(folder / "queries.jsonl", [{"id": "q", "text": "y", "relevant": ["d1"]}])
        (folder / other).write_text("x")
        with pytest.raises(UserError, match=other):
            find_local_tasks(tmp_path)

    def test_documents_and_hidden_files_may_lie_beside(self, tmp_path):
        write_jsonl(tmp_path / "A.sts.jsonl", [{**STS, "score": 1}, {**STS, "score": 2}])
        for name in ("README.md", "LICENSE", "notes.txt", ".DS_Store", "._A.sts.jsonl"):
            (tmp_path / name).write_text("x")
        assert [task.metadata.name for task in find_local_tasks(tmp_path)] == ["A"]

    def test_a_folder_of_a_type_that_is_one_file_is_an_error(self, tmp_path):
        write_jsonl(tmp_path / "A.sts" / "test.jsonl", [{**STS, "score": 1}])
        with pytest.raises(UserError, match="this type of task is one file A.sts.jsonl, and no folder"):
            find_local_tasks(tmp_path)

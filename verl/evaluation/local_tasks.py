"""Evaluation tasks from local files, run by mteb like its own: no hub is needed.

A folder holds one entry per task, NAME.TYPE.jsonl or NAME.TYPE.parquet, or a folder NAME.TYPE with several files:

| TYPE | file | columns |
|---|---|---|
| sts | | sentence1, sentence2, score |
| pairs | | sentence1, sentence2, label (1 = same, 0 = not) |
| clustering | | text, label |
| reranking | | query, positive (list), negative (list) |
| summarization | | text, human_summaries (list), machine_summaries (list), relevance (list of numbers) |
| triplets | | query, positive, negative; or a parquet of process_data.py |
| classification | train, test | text, label |
| retrieval | corpus | id, text, title (optional) |
| | queries | id, text, relevant (list of corpus ids) |

A folder in BEIR's layout is a retrieval task too, whatever its name: corpus.jsonl, queries.jsonl (without `relevant`)
and qrels/test.tsv (or the only .tsv) with the columns query-id, corpus-id, score, where a score above 0 is relevant.
As in BEIR, queries without a judgement there are those of another split, and left out.

Columns are found by name; `verl.data.columns` lists other names that are accepted.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset, DatasetDict
from mteb.abstasks import (
    AbsTask,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.abstasks.text.summarization import AbsTaskSummarization
from torch.utils.data import DataLoader

from verl.embedding.metrics import triplet_report
from verl.errors import UserError
from verl.evaluation import cells
from verl.evaluation import task_checks as checks
from verl.evaluation.task_checks import Parts, listed_judgements, relevant_documents
from verl.evaluation.task_files import QRELS, find_entries, part_files
from verl.evaluation.task_rows import Columns, Row, read_part

_SPLIT = "test"


class AbsTaskTriplets(AbsTask):
    """Is a query nearer to its positive than to its negative? And how spread are the vectors?"""

    abstask_prompt = "Retrieve text based on user query."

    def _get_content_columns(self) -> dict[str, Any]:
        return {name: "text" for name in ("query", "positive", "negative")}

    def _evaluate_subset(
        self, model: Any, data_split: Dataset, *, encode_kwargs: Any, hf_split: str, hf_subset: str, **_: Any
    ) -> dict[str, float]:
        vectors = [
            torch.as_tensor(
                model.encode(
                    DataLoader(Dataset.from_dict({"text": data_split[column]}), batch_size=256),
                    task_metadata=self.metadata, hf_split=hf_split, hf_subset=hf_subset, **encode_kwargs,
                )
            ).float()
            for column in ("query", "positive", "negative")
        ]  # fmt: skip
        return triplet_report(*(torch.nn.functional.normalize(v, dim=1) for v in vectors))

    def _calculate_descriptive_statistics_from_split(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("local tasks are counted by their texts")


class LocalTask:
    """What a local task has beside its mteb base; mixed in before it."""

    data: ClassVar[Any]
    """In the form of the mteb base."""
    texts: ClassVar[list[str]]
    """Every text that is embedded, repeated ones too."""
    notes: ClassVar[list[str]]
    """What a reader of the scores should know of the data."""

    def load_data(self, *_: Any, **__: Any) -> None:
        self.dataset = self.data
        self.data_loaded = True


def find_local_tasks(folder: Path) -> list[AbsTask]:
    """The tasks of a folder, by name.

    Raises:
        UserError: there is none; or a file's name, a column or a line is not as documented above, or cannot be scored.
    """
    found = [_read_task(*entry) for entry in find_entries(folder, _KINDS)]
    names = [task.metadata.name for task in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"--task_dir {folder}: several tasks are called {', '.join(sorted(twice))}")
    return found


def _read_task(path: Path, name: str, kind_name: str) -> AbsTask:
    kind = _BEIR if (path / QRELS).is_dir() else _KINDS[kind_name]
    if path.is_dir() and kind.columns.keys() == {_SPLIT}:
        raise UserError(f"{path}: this type of task is one file {path.name}.jsonl, and no folder")
    if path.is_file() and kind.columns.keys() != {_SPLIT}:
        wanted = ", ".join(f"{part}.jsonl" for part in kind.columns)
        raise UserError(f"{path}: this type of task is a folder {path.stem} with {wanted}")
    files = part_files(path, kind.columns) if path.is_dir() else {_SPLIT: path}
    read = {part: read_part(file, kind.columns[part]) for part, file in files.items()}
    parts = kind.check(read)
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files.values())).hexdigest()
    metadata = TaskMetadata(
        name=name,
        description=f"{kind.mteb_type} task from {path.name}",
        type=kind.mteb_type,
        dataset={"path": str(path), "revision": digest[:16]},
        eval_splits=[_SPLIT],
        eval_langs=["eng-Latn"],
        main_score=kind.main_score,
    )
    texts = [text for rows in parts.values() for row in rows for text in _embedded_texts(row)]
    members = {"metadata": metadata, "data": kind.build(parts), "texts": texts, "notes": _left_out(name, read, parts)}
    return type(f"Local{name}", (LocalTask, kind.base), {**members, **kind.members(parts)})()


def _left_out(name: str, read: Parts, scored: Parts) -> list[str]:
    """A line for each file of which not all rows are scored."""
    counts = {part: (len(read[part]) - len(rows), len(read[part])) for part, rows in scored.items()}
    return [
        f"{name}: {less:,} of {total:,} {part} have no judgement, and are left out"
        for part, (less, total) in counts.items()
        if less
    ]


def _embedded_texts(row: Row) -> list[str]:
    values = row.values
    if "title" in values:
        return [f"{values['title']} {values['text']}".strip()]
    texts: list[str] = []
    for column, value in values.items():
        # mteb compares the machines' summaries with the people's, not with the text.
        if column in _NOT_EMBEDDED or (column == "text" and "human_summaries" in values):
            continue
        texts += value if isinstance(value, list) else [value]
    return texts


# ---- The data in mteb's form


def _columns(rows: list[Row], **names: str) -> Dataset:
    """A dataset with the columns `new=old` of rows."""
    return Dataset.from_dict({new: [row.values[old] for row in rows] for new, old in names.items()})


def _label_numbers(*parts: list[Row]) -> dict[str, int]:
    labels = sorted({row.values["label"] for rows in parts for row in rows})
    return {name: index for index, name in enumerate(labels)}


def _numbered(rows: list[Row], numbers: Mapping[str, int], texts: str, labels: str) -> Dataset:
    return Dataset.from_dict(
        {texts: [row.values["text"] for row in rows], labels: [numbers[row.values["label"]] for row in rows]}
    )


def _build_sts(parts: Parts) -> DatasetDict:
    return DatasetDict({_SPLIT: _columns(parts[_SPLIT], sentence1="sentence1", sentence2="sentence2", score="score")})


def _build_pairs(parts: Parts) -> DatasetDict:
    rows = _columns(parts[_SPLIT], sentence1="sentence1", sentence2="sentence2", labels="label")
    return DatasetDict({_SPLIT: rows})


def _build_clustering(parts: Parts) -> DatasetDict:
    rows = parts[_SPLIT]
    return DatasetDict({_SPLIT: _numbered(rows, _label_numbers(rows), "sentences", "labels")})


def _build_classification(parts: Parts) -> DatasetDict:
    numbers = _label_numbers(*parts.values())
    return DatasetDict({part: _numbered(rows, numbers, "text", "label") for part, rows in parts.items()})


def _build_rows(parts: Parts) -> DatasetDict:
    return DatasetDict({_SPLIT: Dataset.from_list([row.values for row in parts[_SPLIT]])})


def _build_retrieval(parts: Parts) -> dict[str, Any]:
    judgements = parts[QRELS] if QRELS in parts else listed_judgements(parts)
    split = RetrievalSplitData(
        corpus=Dataset.from_list([row.values for row in parts["corpus"]]),
        queries=_columns(parts["queries"], id="id", text="text"),
        relevant_docs=relevant_documents(judgements),
        top_ranked=None,
    )
    return {"default": {_SPLIT: split}}


def _build_reranking(parts: Parts) -> dict[str, Any]:
    """Every query ranks documents of its own."""
    documents, ranked, relevant = [], {}, {}
    for index, (_, row) in enumerate(parts[_SPLIT]):
        query = f"q{index}"
        own = [(document, 1) for document in row["positive"]] + [(document, 0) for document in row["negative"]]
        ids = [f"{query}-d{place}" for place in range(len(own))]
        documents += [{"id": i, "text": document, "title": ""} for i, (document, _) in zip(ids, own, strict=True)]
        ranked[query] = ids
        relevant[query] = {i: is_relevant for i, (_, is_relevant) in zip(ids, own, strict=True)}
    split = RetrievalSplitData(
        corpus=Dataset.from_list(documents),
        queries=Dataset.from_list(
            [{"id": f"q{n}", "text": row.values["query"]} for n, row in enumerate(parts[_SPLIT])]
        ),
        relevant_docs=relevant,
        top_ranked=ranked,
    )
    return {"default": {_SPLIT: split}}


def _score_range(parts: Parts) -> dict[str, Any]:
    """mteb scales gold scores by it; correlations do not depend on it."""
    scores = [score for row in parts[_SPLIT] for score in row.values.get("relevance") or [row.values["score"]]]
    return {"min_score": min(scores), "max_score": max(scores)}


def _all_documents(_: Parts) -> dict[str, Any]:
    """mteb would embed a 25th of them."""
    return {"max_fraction_of_documents_to_embed": None}


@dataclass(frozen=True)
class _Kind:
    """How a type of local task is read, and which of mteb's it is."""

    base: Any
    mteb_type: Any
    main_score: str
    columns: Mapping[str, Columns]
    """By file (`test` alone is the one file)."""
    build: Callable[[Parts], Any]
    check: Callable[[Parts], Parts] = checks.as_they_are
    members: Callable[[Parts], dict[str, Any]] = lambda parts: {}
    """Further members of the mteb class."""


def _one(**columns: Callable[[Any], Any]) -> dict[str, Columns]:
    return {_SPLIT: columns}


_NOT_EMBEDDED = {"id", "label", "score", "relevant", "relevance", "query-id", "corpus-id"}
_LABELLED: Columns = {"text": cells.text, "label": cells.label}
_CORPUS: Columns = {"id": cells.identifier, "text": cells.document_text, "title": cells.optional_text}
_KINDS = {
    "sts": _Kind(
        AbsTaskSTS, "STS", "cosine_spearman", _one(sentence1=cells.text, sentence2=cells.text, score=cells.number),
        _build_sts, checks.check_sts, _score_range,
    ),
    "pairs": _Kind(
        AbsTaskPairClassification, "PairClassification", "max_ap",
        _one(sentence1=cells.text, sentence2=cells.text, label=cells.zero_or_one), _build_pairs, checks.check_labels,
    ),
    "clustering": _Kind(
        AbsTaskClustering, "Clustering", "v_measure", {_SPLIT: _LABELLED}, _build_clustering, checks.check_labels,
        _all_documents,
    ),
    "reranking": _Kind(
        AbsTaskRetrieval, "Reranking", "map_at_1000",
        _one(query=cells.text, positive=cells.texts, negative=cells.texts), _build_reranking,
    ),
    "summarization": _Kind(
        AbsTaskSummarization, "Summarization", "cosine_spearman",
        _one(text=cells.text, human_summaries=cells.texts, machine_summaries=cells.texts, relevance=cells.numbers),
        _build_rows, checks.check_summarization, _score_range,
    ),
    "triplets": _Kind(
        AbsTaskTriplets, "Reranking", "triplet_accuracy",
        _one(query=cells.text, positive=cells.text, negative=cells.text), _build_rows,
    ),
    "classification": _Kind(
        AbsTaskClassification, "Classification", "accuracy", {"train": _LABELLED, "test": _LABELLED},
        _build_classification, checks.check_classification,
    ),
    "retrieval": _Kind(
        AbsTaskRetrieval, "Retrieval", "ndcg_at_10",
        {"corpus": _CORPUS,
         "queries": {"id": cells.identifier, "text": cells.text, "relevant": cells.identifiers}},
        _build_retrieval, checks.check_retrieval,
    ),
}  # fmt: skip
_BEIR = _Kind(
    AbsTaskRetrieval, "Retrieval", "ndcg_at_10",
    {"corpus": _CORPUS, "queries": {"id": cells.identifier, "text": cells.text},
     QRELS: {"query-id": cells.identifier, "corpus-id": cells.identifier, "score": cells.grade}},
    _build_retrieval, checks.check_beir,
)  # fmt: skip

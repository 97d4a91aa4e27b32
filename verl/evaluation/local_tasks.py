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

from verl.data.columns import find_value, names_of
from verl.data.rows import read_rows
from verl.embedding.metrics import triplet_report
from verl.errors import UserError

Rows = list[dict[str, Any]]
Parts = Mapping[str, Rows]

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

    def load_data(self, *_: Any, **__: Any) -> None:
        self.dataset = self.data
        self.data_loaded = True


def find_local_tasks(folder: Path) -> list[AbsTask]:
    """The tasks of a folder, by name.

    Raises:
        UserError: there is none, or a file's name, a column or a line is not as documented above.
    """
    if not folder.is_dir():
        raise UserError(f"--task_dir {folder} is not a folder")
    found = [_read_task(path) for path in sorted(folder.iterdir()) if _type_of(path)]
    if not found:
        raise UserError(
            f"--task_dir {folder} holds no task; name files NAME.TYPE.jsonl (or .parquet) or folders NAME.TYPE with "
            f"TYPE one of {', '.join(_KINDS)}"
        )
    names = [task.metadata.name for task in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"--task_dir {folder}: several tasks are called {', '.join(sorted(twice))}")
    return found


def _type_of(path: Path) -> str | None:
    stem = path.name if path.is_dir() else path.stem
    name, _, kind = stem.rpartition(".")
    return kind if name and kind in _KINDS and (path.is_dir() or path.suffix in (".jsonl", ".parquet")) else None


def _read_task(path: Path) -> AbsTask:
    kind = _KINDS[_type_of(path) or ""]
    name = (path.name if path.is_dir() else path.stem).rpartition(".")[0]
    files = {part: _part_file(path, part) for part in kind.columns} if path.is_dir() else {_SPLIT: path}
    if files.keys() != kind.columns.keys():
        wanted = ", ".join(f"{part}.jsonl" for part in kind.columns)
        raise UserError(f"{path}: this type of task is a folder {path.stem} with {wanted}")
    parts = {part: _read_rows(file, kind.columns[part]) for part, file in files.items()}
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
    texts = [text for part, rows in parts.items() for row in rows for text in _texts_of(row, kind.columns[part])]
    members = {"metadata": metadata, "data": kind.build(parts), "texts": texts}
    return type(f"Local{name}", (LocalTask, kind.base), {**members, **kind.members(parts)})()


def _part_file(folder: Path, part: str) -> Path:
    for file in (folder / f"{part}.jsonl", folder / f"{part}.parquet"):
        if file.is_file():
            return file
    raise UserError(f"{folder} holds no {part}.jsonl (nor {part}.parquet)")


def _read_rows(file: Path, columns: Mapping[str, type]) -> Rows:
    """The rows of a file with `columns` under their own names and of their type."""
    rows = [_read_row(where, record, columns) for where, record in read_rows(file)]
    if not rows:
        raise UserError(f"{file} is empty")
    return rows


def _read_row(where: str, record: dict[str, Any], columns: Mapping[str, type]) -> dict[str, Any]:
    info = record.get("extra_info")
    if isinstance(info, dict) and "positive_example" in info:  # a row of process_data.py
        record = {"query": info["original_query"], "positive": info["positive_example"],
                  "negative": info["negative_example"]}  # fmt: skip
    row: dict[str, Any] = {}
    for column, kind in columns.items():
        _, value = find_value(record, column)
        if kind is list and isinstance(value, str):
            value = [value]
        if column == "title" and value is None:
            value = ""
        if value is None or not isinstance(value, (int, float) if kind is float else kind):
            names = "|".join(names_of(column))
            raise UserError(f"{where}: {names} is {value!r}, and must be a {kind.__name__}")
        row[column] = value
    return row


def _texts_of(row: Mapping[str, Any], columns: Mapping[str, type]) -> list[str]:
    """The texts of a row that are embedded."""
    if "title" in columns:
        return [f"{row['title']} {row['text']}".strip()]
    texts: list[str] = []
    for column in columns:
        is_text = column not in ("id", "label", "score", "relevant", "relevance")
        # mteb compares the machines' summaries with the people's, not with the text.
        if not is_text or (column == "text" and "human_summaries" in columns):
            continue
        texts += row[column] if columns[column] is list else [row[column]]
    return texts


def _columns(rows: Rows, **names: str) -> Dataset:
    """A dataset with the columns `new=old` of rows."""
    return Dataset.from_dict({new: [row[old] for row in rows] for new, old in names.items()})


def _label_numbers(*parts: Rows) -> dict[Any, int]:
    return {label: number for number, label in enumerate(sorted({str(row["label"]) for rows in parts for row in rows}))}


def _numbered(rows: Rows, numbers: Mapping[Any, int], text: str, label: str) -> Dataset:
    labels = [numbers[str(row["label"])] for row in rows]
    return Dataset.from_dict({text: [row["text"] for row in rows], label: labels})


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


def _build_summarization(parts: Parts) -> DatasetDict:
    return DatasetDict({_SPLIT: Dataset.from_list(parts[_SPLIT])})


def _build_triplets(parts: Parts) -> DatasetDict:
    return DatasetDict({_SPLIT: Dataset.from_list(parts[_SPLIT])})


def _build_retrieval(parts: Parts) -> dict[str, Any]:
    known = {str(row["id"]) for row in parts["corpus"]}
    for row in parts["queries"]:
        if unknown := {str(document) for document in row["relevant"]} - known:
            raise UserError(f"query {row['id']}: {', '.join(sorted(unknown))} is not an id of the corpus")
    split = RetrievalSplitData(
        corpus=Dataset.from_list([{**row, "id": str(row["id"])} for row in parts["corpus"]]),
        queries=Dataset.from_list([{"id": str(row["id"]), "text": row["text"]} for row in parts["queries"]]),
        relevant_docs={str(row["id"]): {str(d): 1 for d in row["relevant"]} for row in parts["queries"]},
        top_ranked=None,
    )
    return {"default": {_SPLIT: split}}


def _build_reranking(parts: Parts) -> dict[str, Any]:
    """Every query ranks documents of its own."""
    documents, ranked, relevant = [], {}, {}
    for number, row in enumerate(parts[_SPLIT]):
        query = f"q{number}"
        own = [(text, 1) for text in row["positive"]] + [(text, 0) for text in row["negative"]]
        ids = [f"{query}-d{place}" for place in range(len(own))]
        documents += [{"id": i, "text": text, "title": ""} for i, (text, _) in zip(ids, own, strict=True)]
        ranked[query] = ids
        relevant[query] = {i: grade for i, (_, grade) in zip(ids, own, strict=True)}
    split = RetrievalSplitData(
        corpus=Dataset.from_list(documents),
        queries=Dataset.from_list([{"id": f"q{n}", "text": row["query"]} for n, row in enumerate(parts[_SPLIT])]),
        relevant_docs=relevant,
        top_ranked=ranked,
    )
    return {"default": {_SPLIT: split}}


def _score_range(parts: Parts) -> dict[str, Any]:
    """mteb scales gold scores by it; correlations do not depend on it."""
    rows = parts[_SPLIT]
    grades = [grade for row in rows for grade in row["relevance"]] if "relevance" in rows[0] else []
    grades = grades or [row["score"] for row in rows]
    return {"min_score": min(grades), "max_score": max(grades)}


def _all_documents(_: Parts) -> dict[str, Any]:
    """mteb would embed a 25th of them."""
    return {"max_fraction_of_documents_to_embed": None}


@dataclass(frozen=True)
class _Kind:
    """How a type of local task is read, and which of mteb's it is."""

    base: Any
    mteb_type: Any
    main_score: str
    columns: Mapping[str, Mapping[str, type]]
    """Per file (`test` alone is the one file), the columns and their types."""
    build: Callable[[Parts], Any]
    members: Callable[[Parts], dict[str, Any]] = lambda parts: {}
    """Further members of the mteb class."""


def _one(**columns: type) -> dict[str, dict[str, type]]:
    return {_SPLIT: columns}


_KINDS = {
    "sts": _Kind(
        AbsTaskSTS, "STS", "cosine_spearman", _one(sentence1=str, sentence2=str, score=float), _build_sts, _score_range
    ),
    "pairs": _Kind(
        AbsTaskPairClassification, "PairClassification", "max_ap", _one(sentence1=str, sentence2=str, label=int),
        _build_pairs,
    ),
    "clustering": _Kind(
        AbsTaskClustering, "Clustering", "v_measure", _one(text=str, label=object), _build_clustering, _all_documents
    ),
    "reranking": _Kind(
        AbsTaskRetrieval, "Reranking", "map_at_1000", _one(query=str, positive=list, negative=list), _build_reranking
    ),
    "summarization": _Kind(
        AbsTaskSummarization, "Summarization", "cosine_spearman",
        _one(text=str, human_summaries=list, machine_summaries=list, relevance=list), _build_summarization,
        _score_range,
    ),
    "triplets": _Kind(
        AbsTaskTriplets, "Reranking", "triplet_accuracy", _one(query=str, positive=str, negative=str), _build_triplets
    ),
    "classification": _Kind(
        AbsTaskClassification, "Classification", "accuracy",
        {"train": {"text": str, "label": object}, "test": {"text": str, "label": object}}, _build_classification,
    ),
    "retrieval": _Kind(
        AbsTaskRetrieval, "Retrieval", "ndcg_at_10",
        {"corpus": {"id": object, "text": str, "title": str}, "queries": {"id": object, "text": str, "relevant": list}},
        _build_retrieval,
    ),
}  # fmt: skip

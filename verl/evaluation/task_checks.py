"""Checks of a local task's rows: gold data that cannot be scored is an error with its place.

mteb would make NaN of it, leave it out, or give a figure that says nothing.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from verl.errors import UserError
from verl.evaluation.task_files import QRELS
from verl.evaluation.task_rows import Row

Parts = Mapping[str, list[Row]]
"""The rows of a task by file: test alone, or train and test, or corpus, queries and perhaps qrels."""


# ---- By type of task; each returns the rows that are scored, and raises UserError


def as_they_are(parts: Parts) -> Parts:
    return parts


def check_sts(parts: Parts) -> Parts:
    _check_different(parts["test"], "score", "a correlation")
    return parts


def check_labels(parts: Parts) -> Parts:
    _check_different(parts["test"], "label", "the score")
    return parts


def check_classification(parts: Parts) -> Parts:
    _check_different(parts["train"], "label", "a classifier")
    labels = {row.values["label"] for row in parts["train"]}
    _check_known(parts["test"], "label", labels, "a label of the training texts")
    return parts


def check_summarization(parts: Parts) -> Parts:
    rows = parts["test"]
    for row in rows:
        summaries, grades = (len(row.values[column]) for column in ("machine_summaries", "relevance"))
        if summaries != grades:
            raise UserError(f"{row.where}: {summaries} machine_summaries and {grades} of relevance; give one to each")
    # A row whose numbers are all equal says nothing, and mteb leaves it out.
    if all(len(set(row.values["relevance"])) == 1 for row in rows):
        raise UserError(
            f"{rows[0].where}: relevance is {rows[0].values['relevance']}, and no row has different numbers, which a "
            "correlation needs"
        )
    return parts


def check_retrieval(parts: Parts) -> Parts:
    _check_judgements(parts, listed_judgements(parts))
    return parts


def check_beir(parts: Parts) -> Parts:
    """Queries without a judgement are those of another split, and not returned."""
    _check_judgements(parts, parts[QRELS])
    judged = {row.values["query-id"] for row in parts[QRELS]}
    return {**parts, "queries": [row for row in parts["queries"] if row.values["id"] in judged]}


# ---- Judgements of retrieval


def listed_judgements(parts: Parts) -> list[Row]:
    """The column `relevant` of the queries, in the columns of BEIR's qrels."""
    return [
        Row(row.where, {"query-id": row.values["id"], "corpus-id": document, "score": 1})
        for row in parts["queries"]
        for document in row.values["relevant"]
    ]


def relevant_documents(judgements: Sequence[Row]) -> dict[str, dict[str, int]]:
    """By query, the score of each relevant document: those above 0."""
    relevant: dict[str, dict[str, int]] = defaultdict(dict)
    for _, judgement in judgements:
        if judgement["score"] > 0:
            relevant[judgement["query-id"]][judgement["corpus-id"]] = judgement["score"]
    return dict(relevant)


def _check_judgements(parts: Parts, judgements: Sequence[Row]) -> None:
    _check_unique(parts["corpus"], "id")
    _check_unique(parts["queries"], "id")
    _check_different(parts["corpus"], "id", "a ranking")
    _check_known(judgements, "query-id", {row.values["id"] for row in parts["queries"]}, "an id of the queries")
    _check_known(judgements, "corpus-id", {row.values["id"] for row in parts["corpus"]}, "an id of the corpus")
    _check_unique(judgements, "query-id", "corpus-id")
    relevant = relevant_documents(judgements)
    for row in judgements:
        if row.values["query-id"] not in relevant:
            raise UserError(f"{row.where}: query {row.values['query-id']!r} has no relevant document (a score above 0)")


# ---- Several rows


def _check_different(rows: Sequence[Row], column: str, needed_by: str) -> None:
    """Check that not all rows have the same value in a column."""
    values = {row.values[column] for row in rows}
    if len(values) == 1:
        raise UserError(
            f"{rows[0].where}: {column} is {values.pop()!r} in every row ({len(rows)} in all), and {needed_by} needs "
            "different ones"
        )


def _check_unique(rows: Sequence[Row], *columns: str) -> None:
    """Check that no two rows have the same values in all of some columns."""
    first: dict[tuple[Any, ...], str] = {}
    for row in rows:
        key = tuple(row.values[column] for column in columns)
        if key in first:
            named = ", ".join(f"{column} {value!r}" for column, value in zip(columns, key, strict=True))
            raise UserError(f"{row.where}: {named} is there twice, first at {first[key]}; remove one")
        first[key] = row.where


def _check_known(rows: Sequence[Row], column: str, known: Collection[Any], what: str) -> None:
    for row in rows:
        if row.values[column] not in known:
            raise UserError(f"{row.where}: {column} {row.values[column]!r} is not {what}")

"""The names under which a column may appear in a user's file: the one table of training data and evaluation tasks.

Columns are found by name, never by position.
"""

from collections.abc import Mapping
from typing import Any

_NAMES: dict[str, tuple[str, ...]] = {
    "query": ("query", "anchor"),
    "positive": ("positive", "pos"),
    "negative": ("negative", "neg", "negatives"),
    "text": ("text", "sentence"),
    "id": ("id", "_id", "doc_id", "query_id"),
    "label": ("label", "labels", "label_text"),
    "relevant": ("relevant", "relevant_doc_ids", "relevant_doc_id"),
}
"""Accepted names of the columns that have several; where a file has more than one of them, the first wins."""


def names_of(column: str) -> tuple[str, ...]:
    """The accepted names of a column, its own name first."""
    return _NAMES.get(column, (column,))


def find_value(record: Mapping[str, Any], column: str) -> tuple[str | None, Any]:
    """The value of a column in a record, and the name that it was found under.

    A name whose value is null is skipped. Without any other, the value is None, and the name is the first one that
    the record has, or None where it has none.
    """
    present = [name for name in names_of(column) if name in record]
    for name in present:
        if record[name] is not None:
            return name, record[name]
    return (present[0] if present else None), None

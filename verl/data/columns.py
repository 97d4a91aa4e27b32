"""The names under which a column may appear in a user's file: the one table of training data and evaluation tasks.

Columns are found by name, never by position.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

_NAMES: dict[str, tuple[str, ...]] = {
    "query": ("query", "anchor", "sent0"),
    "positive": ("positive", "pos", "sent1", "positive_passages"),
    "negative": ("negative", "neg", "negatives", "hard_neg", "negative_passages"),
    "text": ("text", "sentence"),
    "id": ("id", "_id", "doc_id", "query_id"),
    "label": ("label", "labels", "label_text"),
    "relevant": ("relevant", "relevant_doc_ids", "relevant_doc_id"),
}
"""Accepted names of the columns that have several; where a file has more than one of them, the first wins."""

_NUMBERED = {"negative": re.compile(r"negative_(\d+)")}
"""Columns that a file may also spread over several ones: negative_1, negative_2, ..., one text each."""


def names_of(column: str) -> tuple[str, ...]:
    """The accepted names of a column, its own name first."""
    return _NAMES.get(column, (column,))


def describe_names(column: str) -> str:
    """The accepted names, for messages: `query|anchor|sent0`."""
    numbered = [f"{column}_1.."] if column in _NUMBERED else []
    return "|".join([*names_of(column), *numbered])


def names_in(names: Iterable[str], column: str) -> list[str]:
    """Those of `names` that hold the column: its accepted names in their order, and numbered ones by number."""
    present = set(names)
    return [name for name in names_of(column) if name in present] + _numbered(present, column)


def find_value(record: Mapping[str, Any], column: str) -> tuple[str | None, Any]:
    """The value of a column in a record, and the name that it was found under.

    A name whose value is null is skipped. Values under numbered names follow as one list. Without any value it is
    None, and the name is the first one that the record has, or None where it has none.
    """
    present = names_in(record, column)
    filled = [name for name in present if record[name] is not None]
    if not filled:
        return (present[0] if present else None), None
    numbered = _numbered(filled, column)
    if not numbered:
        return filled[0], record[filled[0]]
    whole = [] if filled[0] in numbered else _as_list(record[filled[0]])
    return filled[0], [*whole, *(record[name] for name in numbered)]


def _numbered(names: Iterable[str], column: str) -> list[str]:
    if column not in _NUMBERED:
        return []
    found = [match for name in names if (match := _NUMBERED[column].fullmatch(name))]
    return [match.string for match in sorted(found, key=lambda match: int(match[1]))]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]

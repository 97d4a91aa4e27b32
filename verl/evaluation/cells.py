"""Cells of a local task's files: each function returns the value of one, or raises ValueError with what it must be."""

import math
from collections.abc import Callable
from typing import Any


def text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a text that is not empty")
    return value


def document_text(value: Any) -> str:
    """Text of a corpus, where documents without text occur."""
    if not isinstance(value, str):
        raise ValueError("a text")
    return value


def optional_text(value: Any) -> str:
    return "" if value is None else document_text(value)


def number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError("a finite number")
    return float(value)


def zero_or_one(value: Any) -> int:
    if not isinstance(value, (int, float)) or value not in (0, 1):
        raise ValueError("1 (same) or 0 (not)")
    return int(value)


def label(value: Any) -> str:
    # Whole numbers become floats in a column with gaps.
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, (str, int)) or not str(value).strip():
        raise ValueError("a text or a whole number")
    return str(value)


def identifier(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
        raise ValueError("a text or a whole number")
    return str(value)


def grade(value: Any) -> int:
    """A judgement of a .tsv file: above 0 is relevant."""
    try:
        return int(value)
    except ValueError:
        raise ValueError("a whole number") from None


def _list_of(item: Callable[[Any], Any]) -> Callable[[Any], list[Any]]:
    """Reads a list with at least one item; one item may stand without its list."""

    def read(value: Any) -> list[Any]:
        values = value if isinstance(value, list) else [value]
        try:
            found = [item(one) for one in values]
        except ValueError as error:
            raise ValueError(f"a list, each item {error}") from None
        if not found:
            raise ValueError("a list that is not empty")
        return found

    return read


texts, numbers, identifiers = _list_of(text), _list_of(number), _list_of(identifier)

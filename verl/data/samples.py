"""The fields of a sample: their accepted names, and the rules a record must meet."""

from collections.abc import Collection
from typing import Any, Literal, NamedTuple

import orjson

from verl.data.columns import describe_names, find_value, names_in


class BadSample(ValueError):
    """One record cannot be used; its message is the reason written to rejected.jsonl."""


class MissingField(BadSample):
    """A record has none of the accepted names of a field."""


Mode = Literal["supervised", "unsupervised", "pairs"]
"""Triplets, plain texts, or pairs of a query and its positives, to which negatives are yet to be found."""
MODES: tuple[Mode, ...] = ("supervised", "unsupervised")
"""Of training data."""

FIELDS: dict[Mode, tuple[str, ...]] = {
    "supervised": ("query", "positive", "negative"),
    "unsupervised": ("text",),
    "pairs": ("query", "positive"),
}
"""Per mode, the fields that a record must have; columns are never read by position."""

OPTIONAL: dict[Mode, tuple[str, ...]] = {"supervised": (), "unsupervised": (), "pairs": ("negative",)}
"""Per mode, the fields that a record may have too."""

LISTS = {"positive": "positives", "negative": "negatives"}
"""Fields that may have several texts, and the column of the training data that holds all of them."""

INSTRUCTION = "prompt"
"""The column of FlagEmbedding's instruction for the query, which nothing here reads."""

FIND_NEGATIVES = "python3 -m verl.mine_negatives finds negatives for pairs"


class Sample(NamedTuple):
    """The stripped texts of one sample, in the order of FIELDS, and where the sample says it is from."""

    texts: tuple[str, ...]
    """Of several texts of a field the first one."""
    source: str | None
    lists: dict[str, tuple[str, ...]]
    """Of each field of LISTS that has several different texts, all of them; of a field of OPTIONAL all that it has."""


def describe_fields(mode: Mode) -> str:
    """The accepted names, for messages: `query|anchor, positive|pos, ...`."""
    return ", ".join(map(describe_names, FIELDS[mode]))


def describe_need(mode: Mode, found: Collection[str]) -> str:
    """What a file of a mode must have, for messages, and the way out where it holds pairs.

    Args:
        found: the names that it has.
    """
    who = "pairs need" if mode == "pairs" else f"--mode {mode} needs"
    is_pairs = mode == "supervised" and has_fields(found, "pairs") and not has_fields(found, mode)
    return f"{who} {describe_fields(mode)}" + (f"; {FIND_NEGATIVES}" if is_pairs else "")


def has_fields(names: Collection[str], mode: Mode) -> bool:
    """Whether every field of a mode has a column among `names`."""
    return all(names_in(names, field) for field in FIELDS[mode])


def read_sample(record: dict[str, Any], mode: Mode) -> Sample:
    """The sample in `record`.

    Raises:
        BadSample: a field is missing, empty, neither a string nor a list of strings or passages, a list of several
            texts where one is needed, or holds a NUL character or half of a character; or the source cannot be
            written as JSON.
    """
    found = {field: _read_texts(record, field) for field in FIELDS[mode]}
    more = {field: tuple(dict.fromkeys(_find_texts(record, field)[1])) for field in OPTIONAL[mode]}
    source = record.get("source")
    return Sample(
        tuple(texts[0] for texts in found.values()),
        source if isinstance(source, str) else _as_text(source),
        {field: texts for field, texts in found.items() if len(texts) > 1}
        | {field: texts for field, texts in more.items() if texts},
    )


def _read_texts(record: dict[str, Any], field: str) -> tuple[str, ...]:
    """The different texts of a field, at least one."""
    name, filled = _find_texts(record, field)
    remedy = f"; {FIND_NEGATIVES}" if field == "negative" else ""
    if name is None:
        raise MissingField(f"no {field} ({describe_names(field)}){remedy}")
    if not filled:
        raise BadSample(f"{name} is empty{remedy}")
    if len(filled) > 1 and field not in LISTS:
        raise BadSample(
            f"{name} is a list of {len(filled)} texts, and a sample has one: write [instruction, text] as one "
            "text, and a column as one sample a line"
        )
    return tuple(dict.fromkeys(filled))


def _find_texts(record: dict[str, Any], field: str) -> tuple[str | None, list[str]]:
    """The name that a field has in a record, None where it has none, and its texts that are not empty."""
    name, value = find_value(record, field)
    if name is None:
        return None, []
    items = value if isinstance(value, list) else [value]
    return name, [text for item in items if item is not None and (text := _read_text(item, name, field in LISTS))]


def _read_text(value: Any, name: str, may_be_passage: bool) -> str:
    """A text, or the text of a passage {"title", "text"}, stripped."""
    if may_be_passage and isinstance(value, dict) and "text" in value:
        parts = [_read_text(value[part], f"{name}.{part}", False) for part in ("title", "text") if value.get(part)]
        return " ".join(parts).strip()
    if not isinstance(value, str):
        raise BadSample(f"{name} is or holds {type(value).__name__}, not a string")
    if "\0" in value:
        raise BadSample(f"{name} holds a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadSample(
            f"character {error.start + 1} of {name} is a lone surrogate, half of a character; write the whole character"
        ) from error
    return value.strip()


def _as_text(source: Any) -> str | None:
    """A source that is no string as JSON; None for null and NaN."""
    try:
        text = orjson.dumps(source, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
    except orjson.JSONEncodeError as error:
        raise BadSample(f"source cannot be written as JSON: {error}") from error
    return None if text == "null" else text

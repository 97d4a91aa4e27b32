"""The fields of a sample: their accepted names, and the rules a record must meet."""

from typing import Any, Literal, NamedTuple, get_args

import orjson

from verl.data.columns import find_value, names_of


class BadSample(ValueError):
    """One record cannot be used; its message is the reason written to rejected.jsonl."""


class MissingField(BadSample):
    """A record has none of the accepted names of a field."""


Mode = Literal["supervised", "unsupervised"]
MODES: tuple[Mode, ...] = get_args(Mode)

FIELDS: dict[Mode, dict[str, tuple[str, ...]]] = {
    "supervised": {name: names_of(name) for name in ("query", "positive", "negative")},
    "unsupervised": {"text": names_of("text")},
}
"""Per mode, each field and the names under which a record may hold it; columns are never read by position."""

_ALTERNATIVES = ("positive", "negative")
"""Fields of which a list may hold several texts; the first is used."""


class Sample(NamedTuple):
    """The stripped texts of one sample, in the order of FIELDS, and where the sample says it is from."""

    texts: tuple[str, ...]
    source: str | None
    second: dict[str, str]
    """Of each field that was a list of several texts, the one after the text that is used."""


def describe_fields(mode: Mode) -> str:
    """The accepted names, for messages: `query|anchor, positive|pos, ...`."""
    return ", ".join("|".join(aliases) for aliases in FIELDS[mode].values())


def read_sample(record: dict[str, Any], mode: Mode) -> Sample:
    """The sample in `record`.

    Raises:
        BadSample: a field is missing, empty, neither a string nor a list of strings, a list of several texts where one
            is needed, or holds a NUL character.
    """
    second: dict[str, str] = {}
    texts = tuple(_read_text(record, field, second) for field in FIELDS[mode])
    source = record.get("source")
    return Sample(texts, source if isinstance(source, str) else _as_text(source), second)


def _read_text(record: dict[str, Any], field: str, second: dict[str, str]) -> str:
    name, value = find_value(record, field)
    if name is None:
        raise MissingField(f"no {field} ({'|'.join(names_of(field))})")
    if value is None:
        raise BadSample(f"{name} is empty")
    if not isinstance(value, list):
        text = _check_text(value, name)
    else:
        filled = [text for item in value if item is not None and (text := _check_text(item, name))]
        if len(filled) > 1 and field not in _ALTERNATIVES:
            raise BadSample(
                f"{name} is a list of {len(filled)} texts, and a sample has one: write [instruction, text] as one "
                "text, and a column as one sample a line"
            )
        if len(filled) > 1:
            second[field] = filled[1]
        text = filled[0] if filled else ""
    if not text:
        raise BadSample(f"{name} is empty")
    return text


def _check_text(value: Any, name: str) -> str:
    """`value` stripped."""
    if not isinstance(value, str):
        raise BadSample(f"{name} is or holds {type(value).__name__}, not a string")
    if "\0" in value:
        raise BadSample(f"{name} holds a NUL character")
    return value.strip()


def _as_text(source: Any) -> str | None:
    """A source that is no string as JSON; None for null and NaN."""
    text = orjson.dumps(source, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
    return None if text == "null" else text

"""The fields of a sample: their accepted names, and the rules a record must meet."""

from typing import Any, Literal, NamedTuple, get_args

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


class Sample(NamedTuple):
    """The stripped texts of one sample, in the order of FIELDS, and where the sample says it is from."""

    texts: tuple[str, ...]
    source: str | None


def describe_fields(mode: Mode) -> str:
    """The accepted names, for messages: `query|anchor, positive|pos, ...`."""
    return ", ".join("|".join(aliases) for aliases in FIELDS[mode].values())


def read_sample(record: dict[str, Any], mode: Mode) -> Sample:
    """The sample in `record`.

    Raises:
        BadSample: a field is missing, empty, not a string or list of strings, or holds a NUL character.
    """
    texts = tuple(_read_text(record, field) for field in FIELDS[mode])
    source = record.get("source")
    return Sample(texts, None if source is None else _check_text(source, "source"))


def _read_text(record: dict[str, Any], field: str) -> str:
    name, value = find_value(record, field)
    if name is None:
        raise MissingField(f"no {field} ({'|'.join(names_of(field))})")
    if value is None:
        raise BadSample(f"{name} is empty")
    if isinstance(value, list):
        value = _first_filled(value)
    text = _check_text(value, name).strip()
    if not text:
        raise BadSample(f"{name} is empty")
    return text


def _first_filled(values: list[Any]) -> Any:
    for value in values:
        if value is not None and (not isinstance(value, str) or value.strip()):
            return value
    return ""


def _check_text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadSample(f"{name} is or holds {type(value).__name__}, not a string")
    if "\0" in value:
        raise BadSample(f"{name} holds a NUL character")
    return value

"""The keys of the configuration as data: names, ranges in words, and errors of values in words."""

import difflib
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from verl.verl_keys import ABSENT_VALUES

_OUT_OF_RANGE = {"greater_than", "greater_than_equal", "less_than", "less_than_equal"}
_LIMITS = (("gt", "above {}"), ("ge", "{} or more"), ("lt", "below {}"), ("le", "at most {}"))


def walk_fields(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every leaf field of a section as (dotted key, pydantic field)."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from walk_fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def limits_of(field: FieldInfo) -> str:
    """The range of a number in words, such as "above 0, at most 1"; empty without one."""
    words = [
        text.format(getattr(constraint, name))
        for constraint in [*field.metadata, *_inner_constraints(field.annotation)]
        for name, text in _LIMITS
        if getattr(constraint, name, None) is not None
    ]
    return ", ".join(dict.fromkeys(words))


def _inner_constraints(annotation: Any) -> Iterator[Any]:
    """The constraints of the members of a union or a tuple."""
    for part in typing.get_args(annotation):
        if typing.get_origin(part) is Annotated:
            for constraint in part.__metadata__:
                yield from constraint.metadata if isinstance(constraint, FieldInfo) else [constraint]


def types_of(annotation: Any) -> set[Any]:
    """The plain types that a field takes, such as {str, list, NoneType}; Literal stands for itself."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return types_of(parts[0])
    if origin is None or origin in (dict, list, tuple):
        return {origin or annotation}
    if origin is typing.Literal:
        return {typing.Literal}
    return set().union(*map(types_of, parts))


def wrong_values(error: ValidationError, section: type[BaseModel]) -> dict[str, str]:
    """What pydantic rejected: each key with its value and what it allows, in words."""
    fields = dict(walk_fields(section))
    found: dict[str, list[Any]] = {}
    for one in error.errors():
        path = [str(part) for part in one["loc"]]
        # Behind the key, `loc` has the member of a union, tuple or list.
        candidates = [".".join(path[:end]) for end in range(len(path), 0, -1)]
        key = next((name for name in candidates if name in fields), candidates[0])
        found.setdefault(key, []).append(one)
    return {key: _in_words(key, fields.get(key), errors) for key, errors in found.items()}


def _in_words(key: str, field: FieldInfo | None, errors: list[Any]) -> str:
    value = errors[0]["input"]
    reason = ABSENT_VALUES.get(key, {}).get(value) if isinstance(value, str) else None
    if reason:
        return f"{key}={value} is not supported: {reason}."
    if field is not None and errors[0]["type"] in _OUT_OF_RANGE:
        or_null = ", or null" if type(None) in typing.get_args(field.annotation) else ""
        return f"{key}={value} must be {limits_of(field)}{or_null}."
    words = dict.fromkeys(error["msg"].removeprefix("Value error, ") for error in errors)
    return f"{key}={value!r}: {'; '.join(words)}."


def closest_key(key: str, known: Iterable[str]) -> str:
    """ " Did you mean ...?", or nothing: the key with the same last part, or the most alike."""
    known = sorted(known)
    same_leaf = [name for name in known if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    found = same_leaf or difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    return f" Did you mean {found[0]}?" if found else ""


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys to nested mappings."""
    result: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        place = result
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return result

"""hydra's overrides as a shell gives them: a path or a name is taken as it stands, whatever characters it has.

hydra has a grammar of its own for values, in which `20251128` is a number, `a,b` are two runs, and a path with an
umlaut or a parenthesis cannot be read. Quotes in hydra's way are understood: `key="'text'"`.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from verl.config import RunConfig
from verl.config_fields import types_of, walk_fields
from verl.errors import UserError

_KEY_AND_VALUE = re.compile(r"\+{0,2}([\w$][\w$.-]*)=(.*)", re.DOTALL)
_ABOUT_REFERENCES = (
    " ${a.b} is the value of the key a.b; for an environment variable write ${oc.env:NAME} or let the shell replace "
    "it, for these characters themselves \\${."
)
_TYPES = {key: types_of(field.annotation) for key, field in walk_fields(RunConfig)}


def hydra_overrides(given: Sequence[str]) -> list[str]:
    """The overrides in hydra's grammar; a key need not exist in the YAML, as the configuration is checked later.

    Raises:
        UserError: all those that cannot be read, one a line.
    """
    read, problems = [], []
    for text in given:
        found = _KEY_AND_VALUE.fullmatch(text)
        try:
            if found is None:
                _parse(text)  # ~key, or group=option
                read.append(text)
            else:
                read.append(f"++{found[1]}={_readable(found[1], found[2])}")
        except HydraException:
            problems.append(f"{text!r} is not an override; write key=value, and ~key to remove a key.")
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return read


def _readable(key: str, value: str) -> str:
    """The value in hydra's grammar.

    Raises:
        UserError: a list that hydra cannot read, or several values.
    """
    try:
        parsed: Override | None = _parse(f"{key}={value}")
    except HydraException:
        parsed = None
    types = _TYPES.get(key, set())
    if list in types and value.startswith("[") and value.endswith("]") and parsed is None:
        raise UserError(f"{key}={value}: this list cannot be read; put each name in quotes: {key}=['a b','c'].")
    if parsed is None or (str in types and not _is_meant(parsed, value, types)):
        return QuotedString(_without_broken_references(value), Quote.single).with_quotes()
    if parsed.is_sweep_override():
        raise UserError(f"{key}={value}: one value is needed; write a list as [a,b].")
    return value


def _is_meant(parsed: Override, value: str, types: set[Any]) -> bool:
    """Whether what hydra read of a text is more than its characters: a quoted text, null, or a list."""
    if parsed.is_sweep_override():
        return False
    read = parsed.value()
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return (isinstance(read, str) and quoted) or (read is None and type(None) in types) or (
        isinstance(read, list) and list in types
    )  # fmt: skip


def _without_broken_references(text: str) -> str:
    """The text; where `${` in it begins nothing that OmegaConf can read, it stands for these characters."""
    try:
        OmegaConf.create({"text": text})
    except GrammarParseError:
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    return text


def _parse(text: str) -> Override:
    return OverridesParser.create().parse_override(text)


def resolve(composed: DictConfig) -> dict[str, Any]:
    """The plain nested values, with `${...}` replaced.

    Raises:
        UserError: all references that lead nowhere, one a line.
    """
    if problems := list(_broken(composed, "")):
        raise UserError("\n".join(problems))
    return plain_values(composed, resolve=True)


def plain_values(composed: DictConfig, resolve: bool) -> dict[str, Any]:
    """The nested values without OmegaConf's types.

    Args:
        resolve: replace `${...}`.
    """
    values = OmegaConf.to_container(composed, resolve=resolve)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _broken(node: Any, prefix: str) -> Iterator[str]:
    plain: Any = OmegaConf.to_container(node, resolve=False)
    for name in plain if isinstance(plain, dict) else range(len(plain)):
        try:
            value = node[name]
        except OmegaConfBaseException as error:
            way_out = _ABOUT_REFERENCES if "${" in plain[name] else ""
            yield f"{prefix}{name}={plain[name]}: {str(error).splitlines()[0]}.{way_out}"
        else:
            if isinstance(value, DictConfig | ListConfig):
                yield from _broken(value, f"{prefix}{name}.")

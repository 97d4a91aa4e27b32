"""What `GraceEncoder.encode` is given, checked before anything is computed."""

import argparse
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from verl.embedding.settings import EmbedderSettings
from verl.errors import UserError

BATCH_SIZE_HELP = "rows of a forward, and rationales that hf writes at once; default: what the memory is enough for"
SHARD_ROWS = 10_000
"""Texts of a file of a folder of vectors, where no number is given."""
_SHOWN_CHARS = 60


def list_texts(inputs: Any) -> list[str]:
    """The texts of a string, or of a list, generator, one-dimensional array or series of strings.

    Raises:
        UserError: it is none of these, or an item is not a string; the message has its position.
    """
    return list(each_text(inputs))


def each_text(inputs: Any) -> Iterator[str]:
    """The texts of `list_texts`, each taken from `inputs` when it is asked for, and an item that is no string then."""
    if isinstance(inputs, str):
        return iter([inputs])
    # What is excluded can be iterated over too, and gives integers, keys, names of columns, or texts in no order.
    several = isinstance(inputs, Iterable) and not isinstance(inputs, (bytes, bytearray, Mapping, set, frozenset))
    if not several or getattr(inputs, "ndim", 1) != 1:
        raise UserError(
            f"inputs is {_described(inputs)}; give one string, or a list, generator, one-dimensional array or series "
            "of strings"
        )
    return _strings(inputs)


def _strings(items: Iterable[Any]) -> Iterator[str]:
    for position, text in enumerate(items):
        if not isinstance(text, str):
            raise UserError(
                f"inputs[{position}] is {_described(text)}, and every text must be a string; leave out or fill in what "
                "is missing, and give several texts as several items"
            )
        yield text


def whole_number(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """`value` as an int.

    Raises:
        UserError: it is no whole number, or out of its range; the message begins with `name`.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise UserError(f"{name}={value!r} must be a whole number") from None
    if least is not None and number < least:
        raise UserError(f"{name}={number} must be {least} or more")
    if most is not None and number > most:
        raise UserError(f"{name}={number} must be at most {most}")
    return number


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """The flags --batch_size, --engine and --device of programs that embed."""
    parser.add_argument("--batch_size", type=int, help=BATCH_SIZE_HELP)
    parser.add_argument("--engine", choices=("auto", "hf", "vllm"), default="auto", help="writes the rationales")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")


def check_batch_size(batch_size: Any) -> int | None:
    """`batch_size` as an int, or None.

    Raises:
        UserError: it is neither None nor a whole number of 1 or more.
    """
    return None if batch_size is None else whole_number("batch_size", batch_size, 1)


def check_options(temperature: float | None, batch_size: int | None) -> None:
    """Check the arguments of `encode` that a program can check before it loads a model.

    Raises:
        UserError: one is out of its range.
    """
    EmbedderSettings().changed(temperature=temperature)
    check_batch_size(batch_size)


def _described(value: Any) -> str:
    """`nan (float)`, `None`: at most _SHOWN_CHARS of the value, and its type."""
    shown = " ".join(repr(value).split())
    shown = shown if len(shown) <= _SHOWN_CHARS else f"{shown[:_SHOWN_CHARS]}..."
    return shown if value is None else f"{shown} ({type(value).__name__})"

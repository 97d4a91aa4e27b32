"""The number that a text answers a question with, as in GSM8K (arXiv 2110.14168): for rewards and evaluation alike.

Two numbers are equal as decimals: without commas, signs of currency and percent, and zeros at the end.
"""

import re
from decimal import Decimal
from typing import Literal

MARK = "####"
"""Precedes the final number in GSM8K's gold answers, and in the answers that models are asked for."""

Rule = Literal["mark", "last"]
"""An answer is the first number after the last mark, or, where none follows one, the last number of the text."""

# A minus after a word, a number or a bracket is an operator.
_NUMBER = (
    r"(?:(?<![\w)\]%])[-−]\$?)?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)"
)  # fmt: skip
# Fractions are not evaluated, and neither half of one is the answer: they are matched first, in order to be skipped.
_TOKEN = re.compile(rf"(?:{_NUMBER} )?{_NUMBER}(?: ?/ ?\$?{_NUMBER})+|(?P<number>{_NUMBER})")
_WHOLE = re.compile(rf"\s*\$?(?P<number>{_NUMBER})\s*%?\.?\s*")


def extract(text: str) -> tuple[Decimal | None, Rule | None]:
    """The number that a text answers with, and the rule that found it; both None where there is no number."""
    marked = after_mark(text)
    if marked is not None and (numbers := _numbers(marked)):
        return numbers[0], "mark"
    numbers = _numbers(text)
    return (numbers[-1], "last") if numbers else (None, None)


def after_mark(text: str) -> str | None:
    """What follows the last mark, or None without a mark."""
    _, mark, after = text.rpartition(MARK)
    return after if mark else None


def whole_number(text: str) -> Decimal | None:
    """The number of a text that is nothing but a number; else None."""
    found = _WHOLE.fullmatch(text)
    return _decimal(found["number"]) if found else None


def digits(number: Decimal) -> str:
    """Plain digits: no exponent, no zeros at the end."""
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _numbers(text: str) -> list[Decimal]:
    return [_decimal(found["number"]) for found in _TOKEN.finditer(text) if found["number"]]


def _decimal(number: str) -> Decimal:
    return Decimal(number.replace(",", "").replace("$", "").replace("−", "-"))

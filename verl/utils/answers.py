"""The number that a text answers a question with, as in GSM8K (arXiv 2110.14168): for rewards and evaluation alike.

Two numbers are equal as decimals: without commas, signs of currency and percent, and zeros at the end.
"""

import re
from decimal import Decimal
from typing import Literal

MARK = "####"
"""Precedes the final number in GSM8K's gold answers, and in the answers that models are asked for."""

Rule = Literal["mark", "last"]
"""How an answer was found: after a mark (see `extract`), or, where no mark has a number, as the last number."""

# A minus after a word, a number or a bracket is an operator.
_NUMBER = (
    r"(?:(?<![\w)\]%])[-−]\$?)?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)"
)  # fmt: skip
# Fractions are not evaluated, and neither half of one is the answer: they are matched first, in order to be skipped.
_TOKEN = re.compile(rf"(?:{_NUMBER} )?{_NUMBER}(?: ?/ ?\$?{_NUMBER})+|(?P<number>{_NUMBER})")
# What may stand between a mark and its number: punctuation, markup and LaTeX commands, and no other word or number.
_DIRECTLY = re.compile(r"(?:\\[A-Za-z]+|[\W_])*")
_WHOLE = re.compile(rf"\s*\$?(?P<number>{_NUMBER})\s*%?\.?\s*")


def extract(text: str) -> tuple[Decimal | None, Rule | None]:
    """The number that a text answers with, and the rule that found it; both None where there is no number.

    A model that is not stopped in time goes on with questions of its own, so the first mark counts and not the last:
    the first that has a number directly after it, else the first number on the line of a mark (`#### Step 1` may be a
    heading, and then a later mark is the answer's).
    """
    marked = [numbers[0] for line in _marked_lines(text) if (numbers := _numbers(line))]
    direct = [number for number in marked if _DIRECTLY.fullmatch(number.string, 0, number.start())]
    if marked:
        return _decimal((direct or marked)[0]["number"]), "mark"
    numbers = _numbers(text)
    return (_decimal(numbers[-1]["number"]), "last") if numbers else (None, None)


def after_mark(text: str) -> str | None:
    """What follows the first mark, or None without a mark."""
    _, mark, after = text.partition(MARK)
    return after if mark else None


def whole_number(text: str) -> Decimal | None:
    """The number of a text that is nothing but a number; else None."""
    found = _WHOLE.fullmatch(text)
    return _decimal(found["number"]) if found else None


def digits(number: Decimal) -> str:
    """Plain digits: no exponent, no zeros at the end."""
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _marked_lines(text: str) -> list[str]:
    """After each mark, the rest of its line, or the next line that is not empty; up to the next mark."""
    return [part.strip().partition("\n")[0] for part in text.split(MARK)[1:]]


def _numbers(text: str) -> list[re.Match[str]]:
    return [found for found in _TOKEN.finditer(text) if found["number"]]


def _decimal(number: str) -> Decimal:
    return Decimal(number.replace(",", "").replace("$", "").replace("−", "-"))

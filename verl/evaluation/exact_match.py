"""Exact match on questions whose answer is a number: reading gold and given answers, and the figures over both.

Two numbers are equal as decimals: without commas, signs of currency and percent, and zeros at the end.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from verl.data.lines import read_lines
from verl.errors import UserError

MARK = "####"
"""Stands before the final number, in gold answers and in those that are asked for."""

Rule = Literal["mark", "last"]
"""An answer is the first number after the last mark, or, where none follows one, the last number of the text."""

# A minus after a word, a number or a bracket is an operator.
_NUMBER = (
    r"(?:(?<![\w)\]%])[-−]\$?)?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)"
)  # fmt: skip
# Neither half of a fraction is what was meant, and it is not worked out: fractions are matched first, to be skipped.
_TOKEN = re.compile(rf"(?:{_NUMBER} )?{_NUMBER}(?: ?/ ?\$?{_NUMBER})+|(?P<number>{_NUMBER})")
_WHOLE = re.compile(rf"\s*\$?(?P<number>{_NUMBER})\s*%?\.?\s*")


@dataclass(frozen=True)
class Question:
    where: str
    """File and line, for messages."""
    text: str
    gold: Decimal


@dataclass(frozen=True)
class Judged:
    """A question, the text that answers it, and whether that is right."""

    question: str
    gold: str
    extracted: str | None
    rule: Rule | None
    correct: bool
    text: str
    tokens: int
    truncated: bool


def read_questions(path: Path, count: int) -> list[Question]:
    """The first `count` rows of a file, JSON lines or .parquet.

    The gold number is what follows the last mark in the column `answer`; where there is no mark it is the column
    `final_answer`, and without that the whole answer.

    Raises:
        UserError: the file is missing or empty, or a row cannot be used; the message has its line.
    """
    if not path.is_file():
        raise UserError(f"--data {path} is not a file")
    rows = _parquet_rows(path) if path.suffix.lower() == ".parquet" else _json_rows(path)
    questions = [_read_question(where, fields) for where, fields in islice(rows, count)]
    if not questions:
        raise UserError(f"--data {path} has no rows")
    return questions


def extract(text: str) -> tuple[Decimal | None, Rule | None]:
    """The number that a text answers with, and the rule that found it; both None where there is no number."""
    _, mark, after = text.rpartition(MARK)
    if mark and (marked := _numbers(after)):
        return marked[0], "mark"
    numbers = _numbers(text)
    return (numbers[-1], "last") if numbers else (None, None)


def judge(question: Question, text: str, tokens: int, truncated: bool) -> Judged:
    """Read the answer out of a text, and compare."""
    answer, rule = extract(text)
    return Judged(
        question.text, _plain(question.gold), None if answer is None else _plain(answer), rule,
        answer == question.gold, text, tokens, truncated,
    )  # fmt: skip


def score(rows: Sequence[Judged], seconds: float) -> dict[str, float]:
    """The figures of N rows; exact_match, standard_error, truncated and no_number are percents."""
    count, tokens = len(rows), sum(row.tokens for row in rows)
    right = sum(row.correct for row in rows) / count
    rules = Counter(row.rule for row in rows)
    return {
        "exact_match": 100 * right,
        "standard_error": 100 * math.sqrt(right * (1 - right) / count),
        "count": count,
        "truncated": 100 * sum(row.truncated for row in rows) / count,
        "no_number": 100 * rules[None] / count,
        "read_after_mark": rules["mark"],
        "read_last_number": rules["last"],
        "mean_tokens": tokens / count,
        "tokens_per_s": tokens / seconds,
    }


def compare(base: Sequence[Judged], own: Sequence[Judged]) -> dict[str, int]:
    """How many questions one of two models alone got right."""
    pairs = Counter((theirs.correct, ours.correct) for theirs, ours in zip(base, own, strict=True))
    return {"only_base_right": pairs[True, False], "only_model_right": pairs[False, True]}


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for line in read_lines(file):
            where = f"{path}, line {line.line_idx + 1}"
            if line.problem:
                raise UserError(f"{where}: {line.problem}")
            if not line.text.strip():
                continue
            try:
                yield where, orjson.loads(line.text)
            except orjson.JSONDecodeError as error:
                raise UserError(f"{where}: not valid JSON: {error.msg}, character {error.pos + 1}") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = (row for batch in pq.ParquetFile(path).iter_batches(1000) for row in batch.to_pylist())
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))
    except pa.ArrowException as error:
        raise UserError(f"--data {path} is not a readable parquet file: {error}") from error


def _read_question(where: str, fields: Any) -> Question:
    if not isinstance(fields, dict):
        raise UserError(f"{where}: a JSON {type(fields).__name__} instead of an object")
    text, answer, final = (fields.get(column) for column in ("question", "answer", "final_answer"))
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: no text in the column 'question' (columns: {', '.join(fields) or 'none'})")
    _, mark, after = str(answer).rpartition(MARK)
    stated = str(after if mark else answer if final is None else final)
    found = _WHOLE.fullmatch(stated)
    if not found:
        raise UserError(
            f"{where}: no gold number: {stated.strip()[:40]!r} is none; it is read after the last {MARK} of 'answer', "
            f"else from 'final_answer', else from the whole 'answer' (columns: {', '.join(fields)})"
        )
    return Question(where, text.strip(), _decimal(found["number"]))


def _numbers(text: str) -> list[Decimal]:
    return [_decimal(found["number"]) for found in _TOKEN.finditer(text) if found["number"]]


def _decimal(number: str) -> Decimal:
    return Decimal(number.replace(",", "").replace("$", "").replace("−", "-"))


def _plain(number: Decimal) -> str:
    """Digits alone: no exponent, no zeros at the end."""
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text

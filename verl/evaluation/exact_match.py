"""Exact match on questions whose answer is a number: reading the questions, judging answers, and the figures."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

from verl.data.rows import read_rows
from verl.errors import UserError
from verl.utils.answers import MARK, Rule, after_mark, digits, extract, whole_number


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

    The gold number is what follows the first mark in the column `answer`; where there is no mark it is the column
    `final_answer`, and without that the whole answer.

    Raises:
        UserError: the file is missing or empty, or a row cannot be used; the message has its line.
    """
    if not path.is_file():
        raise UserError(f"--data {path} is not a file")
    questions = [_read_question(where, fields) for where, fields in islice(read_rows(path), count)]
    if not questions:
        raise UserError(f"--data {path} has no rows")
    return questions


def judge(question: Question, text: str, tokens: int, truncated: bool) -> Judged:
    """Read the answer out of a text, and compare."""
    answer, rule = extract(text)
    return Judged(
        question.text, digits(question.gold), None if answer is None else digits(answer), rule,
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


def _read_question(where: str, fields: dict[str, Any]) -> Question:
    text, answer, final = (fields.get(column) for column in ("question", "answer", "final_answer"))
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: no text in the column 'question' (columns: {', '.join(fields) or 'none'})")
    marked = after_mark(str(answer))
    stated = str(marked if marked is not None else answer if final is None else final)
    gold = whole_number(stated)
    if gold is None:
        raise UserError(
            f"{where}: no gold number: {stated.strip()[:40]!r} is none; it is read after the first {MARK} of 'answer', "
            f"else from 'final_answer', else from the whole 'answer' (columns: {', '.join(fields)})"
        )
    return Question(where, text.strip(), gold)

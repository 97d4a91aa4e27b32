"""What the comparison will do and about how long it takes, before anything is computed."""

from collections.abc import Sequence
from typing import NamedTuple

from comparison import rows
from comparison.data import Data
from comparison.study import BASE, CONTRASTIVE, Shape
from comparison.tasks import Task

# Seconds on 2 CPU cores with SmolLM2-135M and rationales of 32 tokens.
_START = 25.0
"""Of a training run until its first step, and of saving it."""
_LOAD = 8.0
_WITH_RATIONALE = 0.16
"""A text with its rationale, another one's, and alone."""
_ALONE = 0.02
_ANSWER = 0.3


class Line(NamedTuple):
    row: str
    what: str
    seconds: float


def plan(data: Data, shape: Shape, recipes: Sequence[str]) -> list[Line]:
    """A line for each model. Parts that are kept already take no time; they are not looked at here."""
    dev, test = (_texts(data.parts[part]) + len(data.centre) for part in ("dev", "test"))
    answers = _ANSWER * len(data.answers) + _LOAD
    points, grid = len(shape.shares), len(shape.grid) + shape.seeds - 1
    lines = [
        Line(BASE, f"{dev} texts of dev, {test} of test", 2 * _LOAD + _WITH_RATIONALE * (dev + test) * 1.3 + answers),
        Line(
            CONTRASTIVE, f"{grid} runs of {shape.seconds:g} s, {len(shape.grid)} settings, {points} points on dev each",
            grid * (shape.seconds + points * (_LOAD + _ALONE * dev)) + shape.seeds * (_LOAD + _ALONE * test + answers),
        ),
    ]  # fmt: skip
    for name, trained in rows.ROWS.items():
        seconds = shape.seconds + points * (_START + _LOAD + _WITH_RATIONALE * dev) + _LOAD + _WITH_RATIONALE * test
        what = f"{shape.seeds} runs of {shape.seconds:g} s, {points} points on dev each: {trained.title}"
        lines.append(Line(name, what, shape.seeds * (seconds + answers)))
    for name in recipes:
        seconds = shape.seconds + _START + _LOAD + _WITH_RATIONALE * dev
        lines.append(Line(f"recipe {name}", f"a run, dev alone: {rows.RECIPES[name].title}", seconds))
    return lines


def _texts(tasks: Sequence[Task]) -> int:
    return sum(len(set(task.texts)) for task in tasks)

"""What the comparison will do and about how long it takes, before anything is computed."""

from collections.abc import Sequence
from typing import NamedTuple

from comparison import rows
from comparison.data import Data
from comparison.study import BASE, CONTRASTIVE, Shape
from comparison.tasks import Task

# Seconds on 2 CPU cores with SmolLM2-135M and rationales of 16 tokens.
_START = 45.0
"""Of a training run until its first step, and of saving it."""
_LOAD = 8.0
_WITH_RATIONALE = 0.25
"""A text with its rationale, another one's, and alone."""
_ALONE = 0.03
_ECHO = 1.3
_ANSWER = 0.3


class Line(NamedTuple):
    row: str
    what: str
    seconds: float


def plan(data: Data, shape: Shape, recipes: Sequence[str]) -> list[Line]:
    """A line for each model: those of the rows, or those of recipes where there are some.

    What is kept already takes no time; it is not looked at here.
    """
    dev, test = (_texts(data.parts[part]) + len(data.centre) for part in ("dev", "test"))
    on_dev, on_test = (_LOAD + _WITH_RATIONALE * texts for texts in (dev, test))
    # The untrained model is also given each text again in place of a rationale.
    base = Line(BASE, f"{dev} texts of dev, {test} of test", _ECHO * (on_dev + on_test))
    if recipes:
        seconds, until = shape.seconds, f"{shape.seconds:g} s"
        if shape.recipe_steps is not None:
            seconds, until = 0, f"{shape.recipe_steps} steps, which are not in the minutes"
        each = shape.seeds * (seconds + _START + on_dev)
        what = f"runs: {shape.seeds}, of {until}, dev alone:"
        return [base, *(Line(name, f"{what} {rows.RECIPES[name].title}", each) for name in recipes)]
    answers = _ANSWER * len(data.answers) + _LOAD
    points, runs = len(shape.shares), len(shape.grid) + shape.seeds - 1
    contrastive = runs * (shape.seconds + points * (_LOAD + _ALONE * dev)) + shape.seeds * (_LOAD + _ALONE * test)
    each = shape.seconds + points * (_START + on_dev) + on_test + answers
    what = f"{runs} runs of {shape.seconds:g} s, {len(shape.grid)} settings, each scored {points} times on dev"
    trained = f"runs: {shape.seeds}, of {shape.seconds:g} s, each scored {points} times on dev:"
    return [
        base,
        Line(CONTRASTIVE, what, contrastive + shape.seeds * answers),
        *(Line(name, f"{trained} {row.title}", shape.seeds * each) for name, row in rows.ROWS.items()),
    ]


def _texts(tasks: Sequence[Task]) -> int:
    return sum(len(set(task.texts)) for task in tasks)

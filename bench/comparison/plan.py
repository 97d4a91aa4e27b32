"""What the comparison will do and about how long it takes, before anything is computed."""

from collections.abc import Sequence
from typing import NamedTuple

from comparison import rows
from comparison.data import Data
from comparison.study import BASE, CONTRASTIVE, Shape
from comparison.tasks import Task

# Seconds on 2 CPU cores with SmolLM2-135M and rationales of 16 tokens.
_START = 25.0
"""Of a training run until its first step, and of saving it."""
_LOAD = 8.0
_WITH_RATIONALE = 0.055
"""A text with its rationale, another one's, and alone."""
_ALONE = 0.03
_ECHO = 1.3
"""Times as long for the untrained model, which is also given each text again in place of a rationale."""
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
    answers = _ANSWER * len(data.answers) + _LOAD
    if recipes:
        base = Line(BASE, f"{dev} texts of dev", _ECHO * on_dev)
        return _recipe_lines(shape, recipes, base, on_dev, on_test + answers)
    base = Line(BASE, f"{dev} texts of dev, {test} of test", _ECHO * (on_dev + on_test))
    points, runs = len(shape.shares), len(shape.grid) + shape.seeds - 1
    contrastive = runs * (shape.seconds + points * (_LOAD + _ALONE * dev)) + shape.seeds * (_LOAD + _ALONE * test)
    each = shape.seconds + points * (_START + on_dev) + on_test + answers
    what = f"{runs} runs of {shape.seconds:g} s, {len(shape.grid)} settings, each scored {points} times on dev"
    trained = f"runs: {shape.seeds}, of {shape.seconds:g} s, each scored {points} times on dev:"
    return [
        base,
        Line(CONTRASTIVE, what, contrastive + shape.seeds * answers),
        *(Line(name, f"{trained} {row.title}", shape.seeds * each) for name, row in shape.rows.items()),
    ]


def _recipe_lines(shape: Shape, recipes: Sequence[str], base: Line, on_dev: float, on_test: float) -> list[Line]:
    if points := shape.recipe_steps:
        what = f"{', '.join(map(str, points))} steps, which are not in the minutes, scored on dev and test"
        each = len(points) * (_START + on_dev) + on_test
    else:
        what, each = f"{shape.seconds:g} s, scored on dev", shape.seconds + _START + on_dev
    runs = f"runs: {shape.seeds}, of {what}:"
    return [base, *(Line(name, f"{runs} {rows.RECIPES[name].title}", shape.seeds * each) for name in recipes)]


def _texts(tasks: Sequence[Task]) -> int:
    return sum(len(set(task.texts)) for task in tasks)

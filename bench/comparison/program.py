"""The program: what is done in which form, in which order, and what is shown."""

import argparse
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from common import MODEL, REPO, get_model, markdown, write_json

from comparison.baseline import Setting
from comparison.data import Data, PartSize, Sizes, load
from comparison.measured import Measured
from comparison.plan import Line, plan
from comparison.report import (
    RECIPE_VARIANTS,
    Found,
    as_json,
    choose,
    figures,
    generation_kept,
    generation_lines,
    points_as_json,
    recipe_differences,
    recipe_table,
    summary,
    verdicts,
)
from comparison.rows import RECIPES, ROWS, Trained
from comparison.study import BASE, CONTRASTIVE, Point, Shape, Study
from comparison.training import Cost, TrainingError
from verl.encoder.arguments import whole_number
from verl.errors import UserError
from verl.trainer.signals import exit_code
from verl.utils.locks import HeldError, NoLocksError, hold
from verl.utils.logging import quiet_libraries

SIZES = {
    "short": Sizes(PartSize(30, 20, 10, 12, 6, 2, 1), PartSize(80, 50, 20, 24, 12, 3, 2), centre=24, answers=32),
    "full": Sizes(PartSize(100, 80, 40, 60, 20, 3, 2), PartSize(500, 170, 80, 120, 40, 4, 3), centre=100, answers=200),
}
SHAPES = {
    "short": Shape(120, (1.0,), seeds=1, grid=(Setting(5e-5, 16), Setting(1e-4, 16))),
    "full": Shape(
        600,
        (0.5, 1.0),
        seeds=3,
        grid=tuple(Setting(lr, batch) for lr in (2e-5, 5e-5, 1e-4) for batch in (16, 32)),
        # At the rate of the short form it collapses meanwhile: docs/experiments.md.
        rows=ROWS | {"grace": ROWS["grace"]._replace(overrides=RECIPES["grace, lr 2e-05"].overrides)},
    ),
}


def run_program(args: argparse.Namespace) -> int:
    """Compare as the arguments of `worth.py` ask for; the exit code."""
    quiet_libraries()
    try:
        run(args)
    except (UserError, TrainingError) as error:
        sys.stderr.write(f"worth: {error}\n")
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        sys.stderr.write("worth: stopped; the same command goes on\n")
        return exit_code(signal.SIGINT)
    return 0


def run(args: argparse.Namespace) -> None:
    form = "short" if args.short else "full"
    shape = _shape(args, SHAPES[form])
    recipes = _recipes(args.recipes)
    data = load(args.data, SIZES[form])
    show_plan(data, plan(data, shape, recipes))
    if args.plan:
        return
    get_model()
    out = args.out or REPO / "bench_results" / ("worth_short" if args.short else "worth")
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    def say(title: str) -> None:
        print(f"[{(time.monotonic() - started) / 60:5.1f} min] {title}", flush=True)

    with _alone(out):
        study = Study(REPO / MODEL, data, shape, out, say)
        if recipes:
            compare_recipes(study, recipes)
        else:
            compare(study, out)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keep other processes out of the folder.

    Raises:
        UserError: another one is in it.
    """
    try:
        with hold(out / ".lock"):
            yield
    except HeldError as error:
        raise UserError(f"--out={out} is in use ({error}); wait for it, or give another folder") from None
    except NoLocksError as error:
        raise UserError(f"--out={out}: {error}; give a folder on another file system") from None


def compare(study: Study, out: Path) -> None:
    """The rows: everything on dev first, then test once."""
    # Here, so that matplotlib is needed for pictures alone.
    from comparison.pictures import draw

    seeds = range(study.shape.seeds)
    dev = {BASE: [study.base("dev")]}
    points = {CONTRASTIVE: [study.contrastive(study.chosen, seed) for seed in seeds]}
    points |= {name: [study.row(name, seed) for seed in seeds] for name in study.shape.rows}
    dev |= {name: [seed[-1].scores for seed in own] for name, own in points.items()}
    test = {BASE: [study.base("test")], CONTRASTIVE: [study.test_contrastive(seed) for seed in seeds]}
    test |= {name: [study.test_row(name, seed) for seed in seeds] for name in study.shape.rows}
    answers = _measured(
        {name: [study.likelihood(name, seed) for seed in range(len(runs))] for name, runs in test.items()}
    )
    found = Found(points, dev, test, answers)
    shown = choose(found)
    text = summary(found, shown, len(seeds))
    (out / "table.md").write_text(text + "\n")
    tuned = {setting.name: mean for setting, mean in study.tuned.items()}
    write_json(out / "result.json", {"contrastive on dev": tuned, **as_json(found, shown)})
    pictures = draw(found, out)
    print(f"\n{text}\n\n{', '.join(map(str, (out / 'table.md', out / 'result.json', *pictures)))}")


def compare_recipes(study: Study, names: Sequence[str]) -> None:
    """The recipes on dev, where one is chosen, then their differences; after as many steps those are on test."""
    has_curve = len(study.shape.recipe_steps) > 1
    if has_curve:
        from comparison.pictures import draw_steps
    seeds = range(study.shape.seeds)
    base = study.base("dev")
    points = {name: [study.recipe(name, seed) for seed in seeds] for name in names}
    ends = {name: [seed[-1] for seed in own] for name, own in points.items()}
    table = recipe_table({BASE: [Point(Cost(0, 0, 0, 0, 0), base)], **ends})
    print(f"\nMean of the main metrics on dev x 100, {len(seeds)} seed(s):\n\n{table}")
    on_dev = {name: [point.scores for point in own] for name, own in ends.items()}
    part, scores, kept = "dev", on_dev, list[dict[str, Any]]()
    if study.shape.recipe_steps:
        part, scores = "test", {name: [study.test_recipe(name, seed) for seed in seeds] for name in names}
        answers = {name: [study.recipe_likelihood(name, seed) for seed in seeds] for name in names}
        kept = generation_kept(_measured({BASE: [study.likelihood(BASE, 0)], **answers}))
    made = recipe_differences(on_dev, scores)
    print("\n".join(["", f"On {part}, x 100:", "", verdicts(made), "", *generation_lines(kept)]))
    found = {
        name: {key: figures([run[key] for run in runs]) for key in RECIPE_VARIANTS} for name, runs in scores.items()
    }
    written = {part: found, "differences": made, "generation": kept, "points": points_as_json(points)}
    write_json(study.out / "recipes.json", written)
    if has_curve:
        print(f"\n{draw_steps(points, base, study.out / 'steps.png')}")


def _measured(found: Mapping[str, Sequence[Measured | None]]) -> dict[str, list[Measured]]:
    """Without those that could not be measured, as there was no data for it."""
    there = {name: [run for run in runs if run is not None] for name, runs in found.items()}
    return {name: runs for name, runs in there.items() if runs}


def show_plan(data: Data, lines: Sequence[Line]) -> None:
    tasks = {part: ", ".join(task.name for task in tasks) for part, tasks in data.parts.items()}
    print(f"{len(data.train)} triplets to train on ({data.dropped} left out: they share a text with a task)")
    print(f"dev: {tasks['dev']}; test: {tasks['test']}; {len(data.answers)} answers\n")
    table = [[line.row, line.what, f"{line.seconds / 60:.0f}"] for line in lines]
    total = sum(line.seconds for line in lines) / 60
    print(markdown(["row", "what", "minutes"], [*table, ["all", "estimated for 2 cores", f"{total:.0f}"]]), flush=True)


def _shape(args: argparse.Namespace, shape: Shape) -> Shape:
    seconds = shape.seconds if args.seconds is None else args.seconds
    if seconds <= 0:
        raise UserError(f"--seconds={seconds:g} must be above 0")
    seeds = shape.seeds if args.seeds is None else whole_number("--seeds", args.seeds, 1)
    rows = _rows(args, shape)
    steps = tuple(whole_number("--steps", number, 1) for number in args.steps or ())
    if steps and args.recipes is None:
        raise UserError(f"--steps={steps[0]} is of --recipes; rows are trained for --seconds")
    if fallen := [after for before, after in pairwise(steps) if after <= before]:
        raise UserError(f"--steps: {fallen[0]} stands after a number that is not smaller; give rising ones")
    if args.recipes is not None and args.seeds is None:
        seeds = 1
    return replace(shape, seconds=seconds, seeds=seeds, recipe_steps=steps, rows=rows)


def _rows(args: argparse.Namespace, shape: Shape) -> Mapping[str, Trained]:
    """What is trained of the rows."""
    if args.rows is None:
        return shape.rows
    if args.recipes is not None:
        raise UserError(f"--rows={args.rows[0]} has no effect with --recipes, which are trained instead of rows")
    if unknown := [name for name in args.rows if name not in shape.rows]:
        raise UserError(f"--rows: there is no {unknown[0]!r}; there are {', '.join(map(repr, shape.rows))}")
    return {name: row for name, row in shape.rows.items() if name in args.rows}


def _recipes(names: Sequence[str] | None) -> list[str]:
    if names is None:
        return []
    wanted = list(RECIPES) if list(names) in ([], ["all"]) else list(names)
    if unknown := [name for name in wanted if name not in RECIPES]:
        raise UserError(f"--recipes: there is no {unknown[0]!r}; there are {', '.join(map(repr, RECIPES))}")
    return wanted

"""Does it pay? Rationales and GRACE's policy gradient against no rationale, plain contrastive fine-tuning and others.

    python3 bench/worth.py --plan [--short]                  what would be done, and how long it takes
    python3 bench/worth.py --short                           half an hour on 2 cores: one seed, small tasks
    python3 bench/worth.py --data DIR                        the full form, hours
    python3 bench/worth.py --data DIR --recipes all          the recipes of bench/comparison/rows.py, on dev alone

Trains and scores every row for the same seconds on the same texts, on the CPU; chooses on a dev part and shows the test
part once. Every finished part is kept in --out and not done again, so a run may be killed at any moment; a part with
another setting is another part. Writes table.md, result.json and two pictures there. How to read them:
docs/experiments.md. It needs `pip install -e '.[bench,eval]'`.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from common import MODEL, REPO, get_model, markdown, write_json

from verl.utils.cpus import let_waiting_threads_sleep

# Both before torch is loaded. Every row is trained and scored on the CPU, as the baseline is.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
let_waiting_threads_sleep()

from comparison.baseline import Setting
from comparison.data import Data, PartSize, Sizes, load
from comparison.pictures import draw
from comparison.plan import Line, plan
from comparison.report import Found, as_json, choose, summary
from comparison.rows import RECIPES, ROWS
from comparison.scoring import WITH, choices, mean_of_main
from comparison.states import WITHOUT
from comparison.study import BASE, CONTRASTIVE, Shape, Study
from comparison.training import TrainingError

from verl.encoder.arguments import whole_number
from verl.errors import UserError
from verl.utils.logging import quiet_libraries

SIZES = {
    "short": Sizes(PartSize(20, 20, 10, 20, 8, 3, 2), PartSize(80, 80, 40, 40, 16, 4, 3), centre=40, answers=24),
    "full": Sizes(
        PartSize(100, 80, 60, 120, 20, 5, 3), PartSize(500, 170, 400, 240, 77, 8, 5), centre=300, answers=200
    ),
}
SHAPES = {
    "short": Shape(100, (0.5, 1.0), seeds=1, grid=(Setting(2e-5, 32), Setting(5e-5, 32))),
    "full": Shape(
        1200, (0.25, 0.5, 1.0), seeds=3,
        grid=tuple(Setting(lr, batch) for lr in (2e-5, 5e-5, 1e-4) for batch in (16, 32, 64)),
    ),
}  # fmt: skip


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=REPO / "examples", help="folder, see bench/comparison/data.py")
    parser.add_argument("--out", type=Path, help="default: bench_results/worth, or worth_short")
    parser.add_argument("--short", action="store_true", help="everything in small")
    parser.add_argument("--plan", action="store_true", help="print the plan and stop")
    parser.add_argument("--recipes", nargs="*", metavar="NAME", help="train these instead of the rows; all = every one")
    parser.add_argument("--seconds", type=float, help="of training steps, for every row")
    parser.add_argument("--seeds", type=int, help="training seeds")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    quiet_libraries()
    try:
        run(args)
    except UserError as error:
        sys.stderr.write(f"worth: {error}\n")
        return 2
    except TrainingError as error:
        sys.stderr.write(f"worth: {error}\n")
        return 1
    return 0


def run(args: argparse.Namespace) -> None:
    form = "short" if args.short else "full"
    shape = _shape(args, form)
    recipes = _recipes(args.recipes)
    data = load(args.data, SIZES[form])
    lines = plan(data, shape, recipes)
    show_plan(
        data, [line for line in lines if not recipes or line.row in (BASE, *(f"recipe {name}" for name in recipes))]
    )
    if args.plan:
        return
    get_model()
    out = args.out or REPO / "bench_results" / ("worth_short" if args.short else "worth")
    started = time.monotonic()
    study = Study(
        REPO / MODEL,
        data,
        shape,
        out,
        lambda title: print(f"[{(time.monotonic() - started) / 60:5.1f} min] {title}", flush=True),
    )
    if recipes:
        compare_recipes(study, recipes)
    else:
        compare(study, out)


def compare(study: Study, out: Path) -> None:
    """The rows: everything on dev first, then test once."""
    seeds = range(study.shape.seeds)
    dev = {BASE: [study.base("dev")]}
    points = {CONTRASTIVE: [study.contrastive(study.chosen, seed) for seed in seeds]}
    points |= {name: [study.row(name, seed) for seed in seeds] for name in ROWS}
    dev |= {name: [seed[-1].scores for seed in own] for name, own in points.items()}
    test = {BASE: [study.base("test")], CONTRASTIVE: [study.test_contrastive(seed) for seed in seeds]}
    test |= {name: [study.test_row(name, seed) for seed in seeds] for name in ROWS}
    kept = {name: [study.likelihood(name, seed) for seed in range(len(runs))] for name, runs in test.items()}
    answers = {name: [found for found in runs if found is not None] for name, runs in kept.items()}
    found = Found(points, dev, test, {name: runs for name, runs in answers.items() if runs})
    shown = choose(found)
    text = summary(found, shown, len(seeds))
    (out / "table.md").write_text(text + "\n")
    write_json(out / "result.json", {"contrastive": study.chosen.name, **as_json(found, shown)})
    pictures = draw(found, out)
    print(f"\n{text}\n\n{', '.join(map(str, (out / 'table.md', out / 'result.json', *pictures)))}")


def compare_recipes(study: Study, names: Sequence[str]) -> None:
    """Recipes on dev: with rationales, without, and the best vector of each."""
    lines = []
    ends = {"base": (None, study.base("dev"))}
    for name in names:
        point = study.recipe(name)
        ends[name] = (point.cost, point.scores)
    for name, (cost, scores) in ends.items():
        best = max(choices(), key=lambda variant, scores=scores: mean_of_main([scores], variant))
        figures = [f"{100 * mean_of_main([scores], variant):.1f}" for variant in (WITH, WITHOUT.name, best)]
        spent = [f"{cost.seconds:.0f}", cost.samples] if cost else ["0", 0]
        lines.append([name, *figures, best, *spent])
    print("\nMean of the main metrics on dev x 100, one seed:\n")
    print(markdown(["recipe", "with", "without", "best", "vector", "seconds", "samples"], lines))


def show_plan(data: Data, lines: Sequence[Line]) -> None:
    tasks = {part: ", ".join(task.name for task in tasks) for part, tasks in data.parts.items()}
    print(f"{len(data.train)} triplets to train on ({data.dropped} left out: they share a text with a task)")
    print(f"dev: {tasks['dev']}; test: {tasks['test']}; {len(data.answers)} answers\n")
    table = [[line.row, line.what, f"{line.seconds / 60:.0f}"] for line in lines]
    total = sum(line.seconds for line in lines) / 60
    print(markdown(["row", "what", "minutes"], [*table, ["all", "estimated for 2 cores", f"{total:.0f}"]]), flush=True)


def _shape(args: argparse.Namespace, form: str) -> Shape:
    shape = SHAPES[form]
    seconds = shape.seconds if args.seconds is None else args.seconds
    if seconds <= 0:
        raise UserError(f"--seconds={seconds:g} must be above 0")
    seeds = shape.seeds if args.seeds is None else whole_number("--seeds", args.seeds, 1)
    return Shape(seconds, shape.shares, seeds, shape.grid, shape.tokens)


def _recipes(names: Sequence[str] | None) -> list[str]:
    if names is None:
        return []
    wanted = list(RECIPES) if list(names) in ([], ["all"]) else list(names)
    if unknown := [name for name in wanted if name not in RECIPES]:
        raise UserError(f"--recipes: there is no {unknown[0]!r}; there are {', '.join(map(repr, RECIPES))}")
    return wanted


if __name__ == "__main__":
    sys.exit(main())

"""What the scores say: the rows of the table, and the differences that decide, each with its interval."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from common import markdown

from comparison import scoring
from comparison.answers import METRIC
from comparison.data import IN_DOMAIN
from comparison.measured import Interval, Measured, difference, interval
from comparison.scoring import SHUFFLED, WITH, Scores, TaskScores, mean_of_main
from comparison.states import WITHOUT, Variant
from comparison.study import BASE, CONTRASTIVE, Point
from comparison.tasks import MAIN
from comparison.training import Cost
from verl.embedding.settings import Mix

# Below the untrained model's, by at most this share of it.
_KEPT = 0.02
RECIPE_VARIANTS = (WITH, SHUFFLED, WITHOUT.name)
"""Vectors of a recipe whose figures are kept."""
_ECHO = (Variant("echo").name, Variant("echo", Mix(text_share=0.0)).name)


class Row(NamedTuple):
    """A row of the table: a model and the vectors that it is asked for."""

    key: str
    title: str
    model: str
    candidates: tuple[str, ...]
    """Names of variants, of which the best on dev is shown."""


_JOINT = (("H", "joint", "joint"), ("K", "joint with KL", "held"), ("K1", "joint with KL of weight 1", "held_1"))
"""Key, title and model of the joint objective's rows."""
_GRACE = ("G", "GRACE", "grace")


def _rows_of(key: str, title: str, model: str, served: tuple[str, ...]) -> list[Row]:
    return [
        Row(key, f"{title}, rationales", model, (WITH,)),
        Row(f"{key}-", f"{title}, no rationale", model, (WITHOUT.name,)),
        Row(f"{key}'", f"{title}, shuffled rationales", model, (SHUFFLED,)),
        Row(f"{key}*", f"{title}, best vector", model, served),
        Row(f"{key}*'", f"{title}, the same vector, shuffled rationales", model, ()),
    ]


def table_rows() -> list[Row]:
    """The rows, in the order of the table."""
    served = tuple(scoring.choices())
    centred = f"{WITHOUT.name} + centre"
    return [
        Row("A", "base, no rationale", BASE, (WITHOUT.name,)),
        Row("A'", "base, no rationale, centred", BASE, (centred,)),
        Row("C", "base, the text repeated", BASE, _ECHO),
        Row("D", "base, rationales", BASE, (WITH,)),
        Row("D'", "base, shuffled rationales", BASE, (SHUFFLED,)),
        Row("D*", "base, best vector", BASE, served),
        Row("E", "contrastive, no rationale", CONTRASTIVE, (WITHOUT.name,)),
        Row("E*", "contrastive, best vector", CONTRASTIVE, (WITHOUT.name, centred)),
        Row("P", "contrastive by this code, no rationale", "plain", (WITHOUT.name,)),
        Row("P*", "contrastive by this code, best vector", "plain", served),
        Row("F", "no policy gradient, with KL, rationales", "embedding", (WITH,)),
        Row("F*", "no policy gradient, with KL, best vector", "embedding", served),
        *(row for key, title, model in (_GRACE, *_JOINT) for row in _rows_of(key, title, model, served)),
    ]


DECIDING = (
    ("H", "A'", "1: above the base without rationales, centred"),
    ("G", "A", "1: GRACE above the base without rationales"), ("G", "C", "1: GRACE above the base, the text repeated"),
    *(
        difference
        for key, *_ in _JOINT
        for difference in (
            (key, "A", "1: above the base without rationales"), (key, "C", "1: above the base, the text repeated"),
            (key, "G", "1: above GRACE"),
            (f"{key}*", "E*", "2: against contrastive fine-tuning"),
            (key, "E", "2: the same, rationales against none"),
            (f"{key}*", "P*", "2: against no rationale in training"),
            (key, "P", "2: the same, rationales against none"),
        )
    ),
    *(
        difference
        for key, *_ in (_GRACE, *_JOINT)
        for difference in (
            (key, f"{key}'", "4: rationales of the text itself"), (key, f"{key}-", "4: rationales against none"),
            (f"{key}*", f"{key}*'", "4: the best vector, rationales of the text itself"),
        )
    ),
    ("K", "F", "3: the policy gradient, both with KL"), ("K*", "F*", "3: the same, best vectors"),
    ("K", "H", "5: what a KL term costs"), ("K*", "H*", "5: the same, best vectors"),
    ("K1", "H", "5: what a stronger one costs"), ("K1*", "H*", "5: the same, best vectors"),
    ("D", "D'", "the untrained model's rationales"),
)  # fmt: skip
"""First row, second row, and what the difference decides: the number is that of a bar of docs/experiments.md."""


@dataclass(frozen=True)
class Found:
    """All that was measured."""

    points: Mapping[str, list[list[Point]]]
    """Of each trained model, of each seed, the points of its training."""
    dev: Mapping[str, list[Scores]]
    """By model, of each seed, at the end of training."""
    test: Mapping[str, list[Scores]]
    answers: Mapping[str, list[Measured]]
    """Empty where there are none."""


class Shown(NamedTuple):
    row: Row
    variant: str
    """The one chosen on dev."""
    runs: list[TaskScores]
    """On test, of each seed."""


def choose(found: Found) -> dict[str, Shown]:
    """The rows of what was trained, with the variant that is best on dev and its scores on test, by key."""
    shown: dict[str, Shown] = {}
    for row in table_rows():
        if row.model not in found.test:
            continue
        if row.key.endswith("*'"):
            variant = scoring.choices()[shown[row.key[:-1]].variant]
        else:
            variant = _best_of(row.candidates, found.dev[row.model])
        shown[row.key] = Shown(row, variant, [run[variant] for run in found.test[row.model]])
    return shown


def columns(run: TaskScores) -> list[tuple[str, str]]:
    """Task and metric of each column: the main metrics, and R@1 of the triplets."""
    return [
        (task, metric)
        for task, metrics in run.items()
        for metric in metrics
        if metric in MAIN or (task == "triplets" and metric == "R@1")
    ]


def table(found: Found, shown: Mapping[str, Shown]) -> str:
    """The table of all rows: figures x 100 with the half width of their interval."""
    over = columns(_any_run(shown))
    head = ["row", "vector", *(f"{task} {metric}" for task, metric in over), METRIC, "seconds", "tokens", "samples"]
    lines = []
    for row, variant, runs in shown.values():
        cells = [_figure(interval([run[task][metric] for run in runs])) for task, metric in over]
        kept = found.answers.get(row.model)
        likelihood = f"{interval(kept).value:.3f}" if kept else "-"
        lines.append(
            [f"{row.key} {row.title}", variant, *cells, likelihood, *_cost_cells(_ends(found.points.get(row.model)))]
        )
    return markdown(head, lines)


def differences(shown: Mapping[str, Shown]) -> list[dict[str, Any]]:
    """Every deciding difference on every column."""
    over = columns(_any_run(shown))
    return [
        line
        for first, second, what in DECIDING
        if first in shown and second in shown
        for line in _differences((first, shown[first].runs), (second, shown[second].runs), what, over)
    ]


def recipe_table(found: Mapping[str, Sequence[Point]]) -> str:
    """A line for each recipe: means of the main metrics with rationales, without, and of the best vector."""
    lines = []
    for name, runs in found.items():
        scores = [run.scores for run in runs]
        best = _best_of(scoring.choices(), scores)
        shown = [f"{100 * mean_of_main(scores, variant):.1f}" for variant in (WITH, WITHOUT.name, best)]
        lines.append([name, *shown, best, *_cost_cells([run.cost for run in runs])])
    return markdown(["recipe", "with", "without", "best", "vector", "seconds", "tokens", "samples"], lines)


def points_as_json(points: Mapping[str, Sequence[Sequence[Point]]]) -> dict[str, Any]:
    """Of each recipe, of each seed, the points of its training: cost and means of the main metrics on dev, also of the
    vector that is best at the end."""

    def described(point: Point, best: str) -> dict[str, Any]:
        vectors = {variant: variant for variant in RECIPE_VARIANTS} | {"best": best}
        means = {name: mean_of_main([point.scores], variant) for name, variant in vectors.items()}
        return {"cost": point.cost.as_json(), "dev": means}

    best = {name: _best_of(scoring.choices(), [seed[-1].scores for seed in seeds]) for name, seeds in points.items()}
    return {
        name: {"best": best[name], "seeds": [[described(point, best[name]) for point in seed] for seed in seeds]}
        for name, seeds in points.items()
    }


def recipe_differences(
    dev: Mapping[str, Sequence[Scores]], found: Mapping[str, Sequence[Scores]]
) -> list[dict[str, Any]]:
    """Of every other recipe from the first one, with rationales and by best vectors; and what rationales do for each.

    Args:
        dev: scores of each recipe, by which its best vector is chosen.
        found: the scores that are compared.
    """
    runs = {name: {variant: [run[variant] for run in own] for variant in own[0]} for name, own in found.items()}
    best = {name: _best_of(scoring.choices(), own) for name, own in dev.items()}
    first, *others = found
    pairs = [(name, WITH, first, WITH, "with rationales") for name in others]
    pairs += [(name, best[name], first, best[first], f"best: {best[name]} - {best[first]}") for name in others]
    pairs += [
        (name, WITH, name, variant, f"rationales - {title}")
        for name in found
        for variant, title in ((WITHOUT.name, "none"), (SHUFFLED, "each other's"))
    ]
    over = columns(found[first][0][WITH])
    return [
        line
        for one, its, other, theirs, what in pairs
        for line in _differences((one, runs[one][its]), (other, runs[other][theirs]), what, over)
    ]


def _differences(
    first: tuple[str, Sequence[TaskScores]], second: tuple[str, Sequence[TaskScores]], what: str,
    over: Sequence[tuple[str, str]],
) -> list[dict[str, Any]]:  # fmt: skip
    made = []
    for task, metric in over:
        one, other = ([run[task][metric] for run in runs] for _, runs in (first, second))
        by = difference(one, other)
        made.append({"first": first[0], "second": second[0], "decides": what, "task": task, "metric": metric,
                     "difference": by.value, "low": by.low, "high": by.high, "verdict": by.verdict})  # fmt: skip
    return made


def verdicts(made: Sequence[Mapping[str, Any]]) -> str:
    """A table with a line for each pair of rows: differences x 100 with their intervals."""
    over = list(dict.fromkeys((line["task"], line["metric"]) for line in made))
    head = ["difference", "decides", *(f"{task} {metric}" for task, metric in over)]
    lines: dict[tuple[str, str, str], list[str]] = {}
    for line in made:
        cell = (
            f"{100 * line['difference']:+.1f} [{100 * line['low']:+.1f}, {100 * line['high']:+.1f}] {line['verdict']}"
        )
        lines.setdefault((line["first"], line["second"], line["decides"]), []).append(cell)
    return markdown(head, [[f"{first} - {second}", what, *cells] for (first, second, what), cells in lines.items()])


def generation_kept(answers: Mapping[str, Sequence[Measured]]) -> list[dict[str, Any]]:
    """How much the log-likelihood of answers differs from the base model's, of each trained model."""
    made = []
    for model, runs in answers.items():
        if model == BASE:
            continue
        base = answers[BASE]
        by, of = difference(runs, base), abs(base[0].figure)
        made.append({"model": model, "difference": by.value, "low": by.low, "high": by.high,
                     "share": by.value / of, "kept": by.value >= -_KEPT * of})  # fmt: skip
    return made


def generation_lines(kept: Sequence[Mapping[str, Any]]) -> list[str]:
    """`generation_kept` in words."""
    return [
        f"generation, {line['model']}: log-likelihood of an answer's token {line['difference']:+.3f} nats "
        f"[{line['low']:+.3f}, {line['high']:+.3f}] ({line['share']:+.1%} of the base's), "
        f"{'kept' if line['kept'] else 'NOT kept'} within {_KEPT:.0%}"
        for line in kept
    ]


def summary(found: Found, shown: Mapping[str, Shown], seeds: int) -> str:
    """Everything that is printed at the end."""
    lines = [table(found, shown), "", verdicts(differences(shown)), ""]
    lines += [
        *generation_lines(generation_kept(found.answers)),
        *_in_domain(shown),
        f"{seeds} training seed(s). Figures x 100 with half of their 95 % interval (bootstrap over items and over "
        "seeds, paired in differences). A vector is chosen on dev; * = the best one.",
    ]  # fmt: skip
    return "\n".join(lines)


def _best_of(variants: Iterable[str], dev: Sequence[Scores]) -> str:
    return max(variants, key=lambda name: mean_of_main(dev, name))


def _any_run(shown: Mapping[str, Shown]) -> TaskScores:
    return next(iter(shown.values())).runs[0]


def _in_domain(shown: Mapping[str, Shown]) -> list[str]:
    tasks = [task for task in IN_DOMAIN if task in dict(columns(_any_run(shown)))]
    return [f"in-domain, of the kind of text that is trained on: {', '.join(tasks)}"]


def as_json(found: Found, shown: Mapping[str, Shown]) -> dict[str, Any]:
    """All figures with their intervals."""
    rows = {
        key: {
            "title": row.title, "model": row.model, "vector": variant,
            "test": figures(runs),
        }
        for key, (row, variant, runs) in shown.items()
    }  # fmt: skip
    costs = {
        model: [[point.cost.as_json() for point in seed] for seed in seeds] for model, seeds in found.points.items()
    }
    answers = {model: [run.figure for run in runs] for model, runs in found.answers.items()}
    return {
        "rows": rows, "differences": differences(shown), "generation": generation_kept(found.answers), "costs": costs,
        "answers": answers,
    }  # fmt: skip


def figures(runs: Sequence[TaskScores]) -> dict[str, Any]:
    """Every metric of every task with its interval over items and seeds."""
    return {
        f"{task} {metric}": interval([run[task][metric] for run in runs])._asdict()
        for task, metrics in runs[0].items()
        for metric in metrics
    }


def _figure(found: Interval) -> str:
    return f"{100 * found.value:.1f} ±{50 * (found.high - found.low):.1f}"


def _ends(seeds: Sequence[Sequence[Point]] | None) -> list[Cost]:
    """Of each seed, at the end of its training; the untrained model has cost nothing."""
    return [seed[-1].cost for seed in seeds] if seeds else [Cost(0, 0, 0, 0, 0)]


def _cost_cells(ends: Sequence[Cost]) -> list[str]:
    """Mean seconds, tokens and samples over the seeds."""
    sums = (sum(end.seconds for end in ends), sum(end.tokens for end in ends), sum(end.samples for end in ends))
    return [f"{total / len(ends):,.0f}" for total in sums]

"""Pictures of the dev part: scores against seconds or steps of training, and against the share of the text."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from comparison.report import Found
from comparison.scoring import SHARES, SHUFFLED, WITH, Scores, mean_of_main
from comparison.states import WITHOUT, Variant
from comparison.study import BASE, CONTRASTIVE, Point
from comparison.training import Cost
from verl.embedding.settings import Mix

_YLABEL = "mean of the main metrics, dev"
# Of each vector, by its rationales.
_LINES = {
    WITH: {"linestyle": "-", "label": "its own"},
    SHUFFLED: {"linestyle": ":", "label": "of other texts"},
    WITHOUT.name: {"linestyle": "--", "label": "none"},
}
_TITLES = {
    BASE: "untrained", CONTRASTIVE: "sentence-transformers", "plain": "contrastive, trained without rationales",
    "embedding": "joint without policy, KL 1", "grace": "GRACE", "held": "joint, KL 0.3", "held_1": "joint, KL 1",
}  # fmt: skip
_MOST_IN_A_LINE = 4


def draw(found: Found, folder: Path) -> list[Path]:
    """Write the pictures of the rows; returns their files."""
    seconds = _field_of_each(
        found.points, found.dev[BASE], lambda cost: cost.seconds, "seconds of training", folder / "seconds.png"
    )
    return [seconds, _shares(found, folder / "shares.png")]


def draw_steps(points: Mapping[str, Sequence[Sequence[Point]]], base: Scores, file: Path) -> Path:
    """Write a picture with a field for each recipe: what its own and each other's rationales are worth while it trains.

    Args:
        points: of each recipe, of each seed, the points of its training.
    """
    return _field_of_each(points, [base], lambda cost: cost.steps, "steps of training", file)


def _field_of_each(
    points: Mapping[str, Sequence[Sequence[Point]]], base: Sequence[Scores], spent: Callable[[Cost], float],
    xlabel: str, file: Path,
) -> Path:  # fmt: skip
    """A field for each model, and in it a line for each of its vectors."""
    rows = -(-len(points) // _MOST_IN_A_LINE)
    columns = -(-len(points) // rows)
    figure = Figure(figsize=(1.5 + 3 * columns, 1 + 3 * rows), layout="constrained")
    fields = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, (name, seeds) in zip(fields, points.items(), strict=False):
        for variant, line in _LINES.items():
            if name != CONTRASTIVE:
                axes.plot(*curve(seeds, base, variant, spent), marker=".", color="C0", **line)
            elif variant == WITHOUT.name:
                # Its bare texts are not what the untrained model is scored with.
                axes.plot(*curve(seeds, None, variant, spent), marker=".", color="C0", **line)
        axes.set_title(_TITLES.get(name, name), fontsize=9)
        axes.set_xlabel(xlabel)
        axes.tick_params(labelbottom=True)
        axes.grid(alpha=0.3)
    for axes in fields[len(points) :]:
        axes.set_axis_off()
    fields[0].set_ylabel(_YLABEL)
    # The last one has all lines.
    fields[len(points) - 1].legend(fontsize=8, handlelength=4, title="rationales")
    figure.savefig(file, dpi=150)
    return file


def _shares(found: Found, file: Path) -> Path:
    figure = Figure(figsize=(7, 4.5), layout="tight")
    axes = figure.subplots()
    for model, runs in found.dev.items():
        if model != CONTRASTIVE:
            scores = [mean_of_main(runs, Variant("rationale", Mix(share)).name) for share in SHARES]
            axes.plot(SHARES, scores, marker=".", label=_TITLES.get(model, model))
    axes.set_xlabel("share w of the text")
    axes.set_ylabel(_YLABEL)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, handlelength=4)
    figure.savefig(file, dpi=150)
    return file


def curve(
    seeds: Sequence[Sequence[Point]], start: Sequence[Scores] | None, variant: str, spent: Callable[[Cost], float]
) -> tuple[list[float], list[float]]:
    """Mean costs and scores on dev of a model's points, after those of the untrained model where they are given."""
    points = list(zip(*seeds, strict=True))
    costs = [sum(spent(point.cost) for point in own) / len(own) for own in points]
    scores = [mean_of_main([point.scores for point in own], variant) for own in points]
    if start is None:
        return costs, scores
    return [0.0, *costs], [mean_of_main(start, variant), *scores]

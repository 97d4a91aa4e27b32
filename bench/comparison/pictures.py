"""Pictures of the dev part: scores against seconds or steps of training, and against the share of the text."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from comparison.report import Found
from comparison.scoring import SHARES, SHUFFLED, WITH, Scores, mean_of_main
from comparison.states import WITHOUT, Variant
from comparison.study import BASE, CONTRASTIVE, Point
from comparison.training import Cost
from verl.embedding.settings import Mix

_YLABEL = "mean of the main metrics, dev"
_DASHES = {WITH: "-", SHUFFLED: ":", WITHOUT.name: "--"}


def draw(found: Found, folder: Path) -> list[Path]:
    """Write the pictures of the rows; returns their files."""
    return [_seconds(found, folder / "seconds.png"), _shares(found, folder / "shares.png")]


def draw_steps(points: Mapping[str, Sequence[Sequence[Point]]], base: Scores, file: Path) -> Path:
    """Write a picture with a field for each recipe: what its own and each other's rationales are worth while it trains.

    Args:
        points: of each recipe, of each seed, the points of its training.
    """
    figure = Figure(figsize=(1.5 + 3.5 * len(points), 4), layout="constrained")
    fields = figure.subplots(1, len(points), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (name, seeds) in zip(fields, points.items(), strict=True):
        for variant, dash in _DASHES.items():
            axes.plot(
                *curve(seeds, [base], variant, lambda cost: cost.steps), label=variant, linestyle=dash, marker="."
            )
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("steps of training")
        axes.grid(alpha=0.3)
    fields[0].set_ylabel(_YLABEL)
    fields[0].legend(fontsize=8, handlelength=4, title="rationales")
    figure.savefig(file, dpi=150)
    return file


def _seconds(found: Found, file: Path) -> Path:
    figure = Figure(figsize=(7, 4.5), layout="tight")
    axes = figure.subplots()
    for model, seeds in found.points.items():
        for variant in (WITHOUT.name,) if model == CONTRASTIVE else _DASHES:
            # The baseline's bare texts are not what the untrained model is scored with.
            start = None if model == CONTRASTIVE else found.dev[BASE]
            axes.plot(
                *curve(seeds, start, variant, lambda cost: cost.seconds),
                label=f"{model}, {variant}",
                **_style(model, variant),
            )
    return _save(figure, axes, "seconds of training steps", file)


def _shares(found: Found, file: Path) -> Path:
    figure = Figure(figsize=(7, 4.5), layout="tight")
    axes = figure.subplots()
    for model, runs in found.dev.items():
        if model != CONTRASTIVE:
            scores = [mean_of_main(runs, Variant("rationale", Mix(share)).name) for share in SHARES]
            axes.plot(SHARES, scores, marker=".", label=model)
    return _save(figure, axes, "share w of the text", file)


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


def _style(model: str, variant: str) -> dict[str, Any]:
    colours = {
        CONTRASTIVE: "C0", "embedding": "C1", "grace": "C2", "joint": "C3", "plain": "C4", "held": "C5",
        "held_1": "C6",
    }  # fmt: skip
    return {"color": colours[model], "linestyle": _DASHES[variant], "marker": "."}


def _save(figure: Figure, axes: Axes, xlabel: str, file: Path) -> Path:
    axes.set_xlabel(xlabel)
    axes.set_ylabel(_YLABEL)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, handlelength=4)
    figure.savefig(file, dpi=150)
    return file

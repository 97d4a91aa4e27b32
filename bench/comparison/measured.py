"""A figure with the items that it is made of, and its paired bootstrap intervals.

Letters: N items of a task (pairs, queries, texts), S training seeds, B draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import rankdata

DRAWS = 2000
# Between the two percentiles lie 95 % of the draws.
_PERCENTILES = (2.5, 97.5)


@dataclass(frozen=True)
class Measured:
    """What a task measured of one model, item by item."""

    values: np.ndarray
    """[N]: the score of each item, or with `gold` its similarity."""
    gold: np.ndarray | None = None
    """[N], the similarity that people gave; then the figure is Spearman's rank correlation, else the mean."""

    @property
    def figure(self) -> float:
        return float(self.figures(np.arange(len(self.values))[None])[0])

    def figures(self, items: np.ndarray) -> np.ndarray:
        """[B]: the figure of each set of items.

        Args:
            items: [B,N] int64, positions of items.
        """
        values = self.values[items]
        if self.gold is None:
            return values.mean(1)
        first, second = (_standardised(rankdata(part, axis=1)) for part in (values, self.gold[items]))
        return (first * second).mean(1)

    def as_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"values": np.round(self.values.astype(float), 6).tolist()}
        return found if self.gold is None else {**found, "gold": self.gold.tolist()}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Measured":
        return cls(np.array(found["values"]), np.array(found["gold"]) if "gold" in found else None)


class Interval(NamedTuple):
    """A figure, or a difference of two, and the interval that 95 % of the draws lie in."""

    low: float
    value: float
    high: float

    @property
    def verdict(self) -> str:
        """Of a difference: above, below, or level where the interval holds 0."""
        return "above" if self.low > 0 else "below" if self.high < 0 else "level"


def interval(runs: Sequence[Measured], draws: int = DRAWS, seed: int = 0) -> Interval:
    """The mean figure of S runs; see `difference`."""
    (drawn,) = _draw([runs], draws, seed)
    return _interval(_mean([run.figure for run in runs]), drawn)


def difference(first: Sequence[Measured], second: Sequence[Measured], draws: int = DRAWS, seed: int = 0) -> Interval:
    """How much higher the mean figure of the first S runs is than that of the second ones.

    Paired bootstrap: each draw takes N items with replacement, the same ones for all runs, and S seeds with
    replacement, the same ones for both sides. So the interval covers the choice of the items and, as far as S seeds can
    tell, of the seed; and what a seed does to both sides alike, as where both are vectors of one model, is in neither.

    Args:
        first, second: runs of two rows on the same items, in the order of their training seeds; a row that is not
            trained has one run.

    Raises:
        ValueError: the items, or the seeds, are not as many on both sides.
    """
    one, other = _draw([first, second], draws, seed)
    value = _mean([run.figure for run in first]) - _mean([run.figure for run in second])
    return _interval(value, one - other)


def _draw(sides: Sequence[Sequence[Measured]], draws: int, seed: int) -> list[np.ndarray]:
    """[B] mean figures of each side."""
    counts = {len(run.values) for runs in sides for run in runs}
    if len(counts) != 1:
        raise ValueError(f"runs of {sorted(counts)} items cannot be paired")
    (count,) = counts
    rng = np.random.default_rng(seed)
    items = rng.integers(count, size=(draws, count))
    seeds = {len(runs) for runs in sides if len(runs) > 1} or {1}
    if len(seeds) != 1:
        raise ValueError(f"sides of {sorted(seeds)} seeds cannot be paired")
    (number,) = seeds
    chosen = rng.integers(number, size=(number, draws))
    means = []
    for runs in sides:
        figures = np.stack([run.figures(items) for run in runs])
        means.append(figures[0] if len(runs) == 1 else np.take_along_axis(figures, chosen, axis=0).mean(0))
    return means


def _interval(value: float, drawn: np.ndarray) -> Interval:
    # A draw in which all similarities of people are equal has no rank correlation.
    low, high = np.nanpercentile(drawn, _PERCENTILES)
    return Interval(float(low), value, float(high))


def _standardised(ranks: np.ndarray) -> np.ndarray:
    centred = ranks - ranks.mean(1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return centred / centred.std(1, keepdims=True)


def _mean(figures: Sequence[float]) -> float:
    return sum(figures) / len(figures)

"""Long series and long texts made short enough for a page, so that a reader sees what was left out."""

from dataclasses import dataclass

import numpy as np
import orjson

MOST_POINTS = 300
"""Of a curve; more than these a screen does not show."""


@dataclass(frozen=True)
class Curve:
    """A series as it is drawn: a line, and the range of what the line leaves out."""

    steps: list[int]
    values: list[float]
    low: list[float] | None
    """Smallest value of each point's steps; None where every step has its own point."""
    high: list[float] | None


def thin(steps: np.ndarray, values: np.ndarray, most: int = MOST_POINTS) -> Curve:
    """At most `most` points of a series: each is the mean, the lowest and the highest value of neighbouring steps.

    Args:
        steps: [N] int64, ascending.
        values: [N] float64, finite.
    """
    if len(steps) <= most:
        return Curve(steps.tolist(), rounded(values), None, None)
    starts = np.arange(most) * len(steps) // most
    counts = np.diff(np.append(starts, len(steps)))
    middle = steps[starts + counts // 2]
    mean = np.add.reduceat(values, starts) / counts
    low, high = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
    return Curve(middle.tolist(), rounded(mean), rounded(low), rounded(high))


def rounded(values: np.ndarray, digits: int = 5) -> list[float]:
    """As Python numbers of so many significant digits, which is what a page can show."""
    return [float(f"{value:.{digits}g}") for value in values]


def spread_choice(items: list[int], most: int) -> list[int]:
    """At most `most` of the items, evenly spaced, always with the first and the last."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def in_page(text: object) -> bytes:
    """A value as JSON that may stand inside a script element: it holds no `<`, so nothing in it ends the element."""
    return orjson.dumps(text).replace(b"<", b"\\u003c")


def fit_texts(texts: list[str], budget: int) -> list[str]:
    """The texts, the longest ones cut so that all together take about `budget` bytes of the page.

    A cut text says so at its end; short texts stay whole as long as cutting longer ones is enough.
    """
    costs = np.array([len(in_page(text)) for text in texts], dtype=np.int64)
    if costs.sum() <= budget:
        return texts
    limit = _longest_allowed(np.sort(costs), budget)
    return [_cut(text, cost, limit) for text, cost in zip(texts, costs.tolist(), strict=True)]


def _longest_allowed(ascending: np.ndarray, budget: int) -> int:
    """The largest length L for which sum(min(length, L)) stays within the budget."""
    before = np.append(0, np.cumsum(ascending)[:-1])
    remaining = len(ascending) - np.arange(len(ascending))
    # Were all texts from the i-th on cut, each could have this much.
    shares = (budget - before) // remaining
    cut_from = int(np.argmax(shares < ascending))
    return int(max(shares[cut_from], 0))


def _cut(text: str, cost: int, limit: int) -> str:
    if cost <= limit:
        return text
    raw = text.encode()
    kept = raw[: len(raw) * limit // cost].decode(errors="ignore")
    return f"{kept} … [cut here; {len(text):,} characters in the run folder]"

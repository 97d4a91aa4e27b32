"""Splitting rows of texts so that no text is in two parts."""

import random
from collections.abc import Iterable, Sequence


def same_text(text: str) -> str:
    """What two texts have in common that count as the same one: case and white space do not matter."""
    return " ".join(text.casefold().split())


def split_by_text(
    rows: Sequence[Sequence[str]], sizes: Sequence[int], seed: int, reserved: Iterable[str] = ()
) -> tuple[list[list[int]], list[int]]:
    """Draw held-out parts whose texts occur nowhere else, and what may be trained on.

    Args:
        rows: the texts of each row.
        sizes: most rows of each held-out part.
        reserved: texts that no part may have and nothing may be trained on.

    Returns:
        The positions of each part's rows, no text of which is in another row of any part; and those of the rows that
        are left without a row that shares a text with a part or with `reserved`.
    """
    texts = [{same_text(text) for text in row} for row in rows]
    taken = {same_text(text) for text in reserved}
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    parts: list[list[int]] = []
    for size in sizes:
        part: list[int] = []
        for row in order:
            if len(part) < size and not texts[row] & taken:
                part.append(row)
                taken |= texts[row]
        parts.append(sorted(part))
    return parts, [row for row in range(len(rows)) if not texts[row] & taken]

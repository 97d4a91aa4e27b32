"""The tasks of the comparison, which score a model item by item.

Letters: N items, H dimensions. Vectors have unit length.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from comparison.measured import Measured

Lookup = Callable[[Sequence[str]], np.ndarray]
"""The vectors [N,H] of N texts."""

MAIN = ("accuracy", "nDCG@10", "Spearman")
"""The metrics that choices are made by and that bars are about; the others are shown beside them."""
_NEIGHBOURS = 5


class Task(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def texts(self) -> list[str]:
        """All texts that it needs vectors of, some of them more than once."""

    def measure(self, vectors: Lookup) -> dict[str, Measured]:
        """Every metric of the task."""


@dataclass(frozen=True)
class Triplets:
    """Is a query nearer to its positive than to its negative? And is the positive found among all positives?"""

    name: str
    rows: list[tuple[str, str, str]]
    """Query, positive, negative."""

    @property
    def texts(self) -> list[str]:
        return [text for row in self.rows for text in row]

    def measure(self, vectors: Lookup) -> dict[str, Measured]:
        queries, positives, negatives = (vectors(list(column)) for column in zip(*self.rows, strict=True))
        nearer = (queries * positives).sum(1) > (queries * negatives).sum(1)
        found = ranking(queries @ positives.T, [[number] for number in range(len(self.rows))])
        return {"accuracy": Measured(nearer.astype(float)), **found}


@dataclass(frozen=True)
class Pairs:
    """Do cosines order pairs of texts as people do?"""

    name: str
    rows: list[tuple[str, str, float]]
    """Two texts, and their similarity by people."""

    @property
    def texts(self) -> list[str]:
        return [text for row in self.rows for text in row[:2]]

    def measure(self, vectors: Lookup) -> dict[str, Measured]:
        first, second, scores = zip(*self.rows, strict=True)
        return {"Spearman": Measured((vectors(first) * vectors(second)).sum(1), np.array(scores))}


@dataclass(frozen=True)
class Retrieval:
    """Are the relevant documents of a query found?"""

    name: str
    queries: list[tuple[str, list[int]]]
    """Text, and the positions of its relevant documents."""
    documents: list[str]

    @property
    def texts(self) -> list[str]:
        return [*(text for text, _ in self.queries), *self.documents]

    def measure(self, vectors: Lookup) -> dict[str, Measured]:
        similarity = vectors([text for text, _ in self.queries]) @ vectors(self.documents).T
        return ranking(similarity, [relevant for _, relevant in self.queries])


@dataclass(frozen=True)
class Labels:
    """Is the label of a text that of its nearest labelled texts?

    Each of the 5 nearest ones votes for its label with its cosine. Every label has as many texts as any other, so that
    the accuracy is the mean over the labels too.
    """

    name: str
    labelled: list[tuple[str, str]]
    """Text and label."""
    asked: list[tuple[str, str]]

    @property
    def texts(self) -> list[str]:
        return [text for text, _ in (*self.labelled, *self.asked)]

    def measure(self, vectors: Lookup) -> dict[str, Measured]:
        labels = sorted({label for _, label in self.labelled})
        one_hot = np.array([[label == name for name in labels] for _, label in self.labelled], dtype=float)
        similarity = vectors([text for text, _ in self.asked]) @ vectors([text for text, _ in self.labelled]).T
        nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :_NEIGHBOURS]
        votes = (np.take_along_axis(similarity, nearest, axis=1)[:, :, None] * one_hot[nearest]).sum(1)
        right = [labels[vote] == label for vote, (_, label) in zip(votes.argmax(1), self.asked, strict=True)]
        return {"accuracy": Measured(np.array(right, dtype=float))}


def ranking(similarity: np.ndarray, relevant: Sequence[Sequence[int]]) -> dict[str, Measured]:
    """R@1, MRR and nDCG@10 of each query; a document that is as similar as a relevant one ranks before it.

    Args:
        similarity: [N,M] of N queries and M documents.
        relevant: the positions of each query's relevant documents, at least one.
    """
    first, gain = np.zeros(len(similarity)), np.zeros(len(similarity))
    for query, (row, own) in enumerate(zip(similarity, relevant, strict=True)):
        others = np.delete(row, own)
        # The k-th of the relevant ones has k before it, and every other document that is at least as similar.
        ranks = [k + 1 + int((others >= value).sum()) for k, value in enumerate(sorted(row[own], reverse=True))]
        first[query] = ranks[0]
        ideal = sum(1 / np.log2(rank + 1) for rank in range(1, min(len(own), 10) + 1))
        gain[query] = sum(1 / np.log2(rank + 1) for rank in ranks if rank <= 10) / ideal
    return {"R@1": Measured((first == 1).astype(float)), "MRR": Measured(1 / first), "nDCG@10": Measured(gain)}

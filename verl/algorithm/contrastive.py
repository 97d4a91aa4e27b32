"""Contrast of rationales and queries within a step (InfoNCE, arXiv 1807.03748), and which candidates do not count.

Tensors and texts in, tensors out: no config objects, no distributed calls, no batches. Shapes: B trained rows,
G groups, H hidden size; m [B,H] trained rows, q [G,H] queries, n [K,H] the negatives of all groups, in the order of the
groups, or None, g [B] group of each row. C candidates: the G queries, and the K negatives if there are any. Where
queries are trained, they are the rows, and what is called a query here is their positive.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """The texts of a sample, to find false negatives."""

    query: str
    positives: tuple[str, ...]
    """All that are known of it, also those that are not in the step."""
    negatives: tuple[str, ...]
    """Those in the step."""

    @property
    def query_and_positives(self) -> frozenset[str]:
        """Never counted as its negatives."""
        return frozenset((self.query, *self.positives))


def false_negatives(groups: Sequence[Group], candidates: Sequence[Collection[str]]) -> Tensor:
    """[G,C] bool: whether one of a candidate's texts equals the query or a positive of a group.

    Args:
        candidates: the texts of each; the first G are those of the groups, and to its own group a candidate is no
            false negative.
    """
    of_groups = [group.query_and_positives for group in groups]
    same = torch.tensor([[not of_group.isdisjoint(texts) for texts in candidates] for of_group in of_groups])
    own = range(len(groups))
    same[own, own] = False
    return same


def negatives_of(groups: Sequence[Group]) -> list[Collection[str]]:
    """The texts of the K negatives as candidates, in the order of n."""
    return [(text,) for group in groups for text in group.negatives]


def query_log_probs(m: Tensor, q: Tensor, n: Tensor | None, g: Tensor, left_out: Tensor, temperature: float) -> Tensor:
    """[B,C] log-probabilities of the candidates of each row.

    Args:
        left_out: [G,C] bool, candidates that do not count for a group.
    """
    logits = m @ q.T
    if n is not None:
        logits = torch.cat([logits, m @ n.T], dim=1)
    return (logits / temperature).masked_fill(left_out[g], -torch.inf).log_softmax(1)


def row_log_probs(m: Tensor, q: Tensor, n: Tensor | None, g: Tensor, left_out: Tensor, temperature: float) -> Tensor:
    """[B] log-probability of each row for its group's query, beside the other groups' rows and all negatives.

    The other rows of a group are no candidates: each of them is as right.
    """
    num_groups = len(q)
    similarity = q @ m.T  # [G,B]
    own_group = g == torch.arange(num_groups, device=g.device).unsqueeze(1)
    own = (similarity * own_group).sum(0).unsqueeze(1)  # [B,1]
    others = similarity.masked_fill(own_group | left_out[:, :num_groups][:, g], -torch.inf)
    if n is not None:
        others = torch.cat([others, (q @ n.T).masked_fill(left_out[:, num_groups:], -torch.inf)], dim=1)
    # Not by indexing, whose backward adds the gradients of a query's rows in any order.
    logits = torch.cat([own, others.index_select(0, g)], dim=1)
    return (logits / temperature).log_softmax(1)[:, 0]


def symmetric_infonce(
    m: Tensor, q: Tensor, n: Tensor | None, g: Tensor, groups: Sequence[Group], temperature: float
) -> tuple[Tensor, Tensor]:
    """The contrastive loss of a step, and how often a row finds its query; both scalars.

    The mean over the rows of two cross-entropies: of the row's query among all queries and negatives, and of the row
    among the other groups' rows and all negatives for that query. A group that shares its query or a positive with
    another one is left out there, and so is a negative that equals the query or a positive.
    """
    candidates: list[Collection[str]] = [*(group.query_and_positives for group in groups), *negatives_of(groups)]
    left_out = false_negatives(groups, candidates).to(m.device)
    to_queries = query_log_probs(m, q, n, g, left_out, temperature)
    to_rows = row_log_probs(m, q, n, g, left_out, temperature)
    own = to_queries.gather(1, g.unsqueeze(1)).squeeze(1)
    found = (to_queries.argmax(1) == g).to(m.dtype)
    return -(own + to_rows).mean() / 2, found.mean()

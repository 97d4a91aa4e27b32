"""Measures of a set of embeddings: how good they are, and how much of the space they use.

N vectors of H dimensions. Vectors are [N,H] float tensors of unit length; results are Python floats unless a docstring
says otherwise.
"""

import torch
from torch import Tensor


def triplet_accuracy(query: Tensor, positive: Tensor, negative: Tensor) -> float:
    """Share of triplets whose query is more similar to its positive than to its negative."""
    return float(((query * positive).sum(1) > (query * negative).sum(1)).float().mean())


def retrieval_ranks(query: Tensor, documents: Tensor) -> Tensor:
    """[N] int64: the rank (from 1) of document i among all documents for query i; equal similarities rank before it."""
    similarity = query @ documents.T
    own = similarity.diagonal().unsqueeze(1)
    return (similarity >= own).sum(1)


def recall_at_1(query: Tensor, documents: Tensor) -> float:
    """Share of queries whose own document is the most similar of all documents."""
    return float((retrieval_ranks(query, documents) == 1).float().mean())


def mean_reciprocal_rank(query: Tensor, documents: Tensor) -> float:
    """Mean of 1 / rank of each query's own document (MRR)."""
    return float((1.0 / retrieval_ranks(query, documents)).mean())


def mean_cosine(vectors: Tensor) -> float:
    """Mean cosine of all pairs of different rows: near 1 when all vectors point in one direction."""
    count = len(vectors)
    total = vectors.sum(0).square().sum() - vectors.square().sum()
    return float(total / (count * (count - 1)))


def effective_rank(vectors: Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007; RankMe, arXiv 2210.02885)."""
    singular = torch.linalg.svdvals(vectors.double())
    share = singular / singular.sum()
    share = share[share > 0]
    return float(torch.exp(-(share * share.log()).sum()))


def alignment(first: Tensor, second: Tensor) -> float:
    """Mean squared distance of the pairs (first[i], second[i]) (arXiv 2005.10242); lower is better."""
    return float((first - second).square().sum(1).mean())


def uniformity(vectors: Tensor) -> float:
    """log of the mean of exp(-2 distance^2) over all pairs of rows (arXiv 2005.10242); lower is more uniform."""
    return float(torch.pdist(vectors).square().mul(-2).exp().mean().log())


def top_variance_share(vectors: Tensor) -> float:
    """Share of the largest principal component in the variance of the rows; 1 when all rows are equal.

    1 / H is the least it can be. Near 1, all rows lie on one line, and cosines follow one number of each text.
    """
    centred = vectors.double() - vectors.double().mean(0)
    variance = torch.linalg.svdvals(centred).square()
    # What rounding leaves of rows that are equal is no variance.
    if variance.sum() <= 1e-12 * len(vectors):
        return 1.0
    return float(variance[0] / variance.sum())


def triplet_report(query: Tensor, positive: Tensor, negative: Tensor) -> dict[str, float]:
    """All measures of a held-out set of triplets; retrieval searches all its positives."""
    everything = torch.cat([query, positive, negative])
    return {
        "triplet_accuracy": triplet_accuracy(query, positive, negative),
        "recall_at_1": recall_at_1(query, positive),
        "mrr": mean_reciprocal_rank(query, positive),
        "alignment": alignment(query, positive),
        **spread_report(everything),
    }


def spread_report(vectors: Tensor) -> dict[str, float]:
    """The measures of how much of the space a set of embeddings uses."""
    return {
        "mean_cosine": mean_cosine(vectors),
        "uniformity": uniformity(vectors),
        "effective_rank": effective_rank(vectors),
    }


def spearman(first: Tensor, second: Tensor) -> float:
    """Rank correlation of two series [N]; equal values get the mean of their ranks. NaN when a series is constant."""
    # A second to load, which only a validation with scored pairs needs.
    from scipy.stats import spearmanr

    return float(spearmanr(first.double().numpy(), second.double().numpy()).statistic)

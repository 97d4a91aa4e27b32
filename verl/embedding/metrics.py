"""How good, and how collapsed, a set of embeddings is.

All functions take unit vectors [N,H] and return plain floats.
"""

import numpy as np
import pandas as pd
import torch
from torch import Tensor


def triplet_accuracy(query: Tensor, positive: Tensor, negative: Tensor) -> float:
    """Share of triplets whose query is nearer to its positive than to its negative."""
    return float(((query * positive).sum(1) > (query * negative).sum(1)).float().mean())


def retrieval_ranks(query: Tensor, documents: Tensor) -> Tensor:
    """[N] int64, 1-based rank of document i for query i; ties count against it."""
    similarity = query @ documents.T
    own = similarity.diagonal().unsqueeze(1)
    return (similarity >= own).sum(1)


def recall_at_1(query: Tensor, documents: Tensor) -> float:
    """Share of queries whose own document is the nearest of all."""
    return float((retrieval_ranks(query, documents) == 1).float().mean())


def mean_reciprocal_rank(query: Tensor, documents: Tensor) -> float:
    return float((1.0 / retrieval_ranks(query, documents)).mean())


def mean_cosine(vectors: Tensor) -> float:
    """Mean cosine of different vectors: near 1 when they all point one way."""
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
    """Mean squared distance of pairs (arXiv 2005.10242)."""
    return float((first - second).square().sum(1).mean())


def uniformity(vectors: Tensor) -> float:
    """log of the mean Gaussian potential of different vectors (arXiv 2005.10242); lower is more uniform."""
    return float(torch.pdist(vectors).square().mul(-2).exp().mean().log())


def triplet_report(query: Tensor, positive: Tensor, negative: Tensor) -> dict[str, float]:
    """The figures of a held-out triplet set; retrieval is among all its positives."""
    everything = torch.cat([query, positive, negative])
    return {
        "triplet_accuracy": triplet_accuracy(query, positive, negative),
        "recall_at_1": recall_at_1(query, positive),
        "mrr": mean_reciprocal_rank(query, positive),
        "alignment": alignment(query, positive),
        **spread_report(everything),
    }


def spread_report(vectors: Tensor) -> dict[str, float]:
    """How much of the space a set of embeddings uses."""
    return {
        "mean_cosine": mean_cosine(vectors),
        "uniformity": uniformity(vectors),
        "effective_rank": effective_rank(vectors),
    }


def spearman(first: Tensor, second: Tensor) -> float:
    """Rank correlation of two series [N]; equal values share their mean rank."""
    ranks = [pd.Series(values.double().numpy()).rank().to_numpy() for values in (first, second)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])

"""Whether vectors use the rationales: what becomes of them when a rationale is left out, or exchanged.

A rationale that is pooled with its text may be ignored: then the vector is the same without it, or with that of another
text. P texts, H hidden size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from verl.embedding.metrics import alignment, mean_reciprocal_rank, spread_report, top_variance_share


@dataclass(frozen=True)
class ProbeVectors:
    """The same texts embedded in four ways; [P,H] float32 each, unit length."""

    own: Tensor
    """With a rationale of the text."""
    second: Tensor
    """With another rationale of the text."""
    other: Tensor
    """With a rationale of another text."""
    without: Tensor
    """Without a rationale."""

    def cosines(self) -> dict[str, Tensor]:
        """[P] each: the cosine of a text's own vector with the three others."""
        others = {"without": self.without, "other_rationale": self.other, "second_rationale": self.second}
        return {f"cos_{name}": (self.own * vectors).sum(1) for name, vectors in others.items()}


def probe_report(vectors: ProbeVectors, roles: Sequence[str], thinks: Tensor) -> dict[str, float]:
    """The figures of a probe.

    Args:
        roles: [P] of the texts: of every sample a positive, a query and a negative, in one order, or a positive alone.
        thinks: [P] bool: which texts have rationales; what rationales do is told of these.
    """
    cosines = {name: values[thinks] for name, values in vectors.cosines().items()}
    gain, error = _mean_and_error(cosines["cos_second_rationale"] - cosines["cos_other_rationale"])
    found = {
        **spread_report(vectors.own),
        "top1_variance_share": top_variance_share(vectors.own),
        **{name: float(values.mean()) for name, values in cosines.items()},
        "own_rationale_gain": gain,
        "own_rationale_gain_error": error,
    }
    query, positive = (torch.from_numpy(np.asarray(roles) == role) for role in ("query", "positive"))
    if not query.any():
        # A plain text is paired with itself under its second rationale.
        return {**found, "alignment": alignment(vectors.own, vectors.second)}
    documents = vectors.own[positive]
    return {
        **found,
        "alignment": alignment(vectors.own[query], documents),
        "mrr_thinking": mean_reciprocal_rank(vectors.own[query], documents),
        "mrr_without": mean_reciprocal_rank(vectors.without[query], vectors.without[positive]),
        # The documents keep their rationales, so that what the query's adds or spoils is seen alone.
        "mrr_shuffled": mean_reciprocal_rank(vectors.other[query], documents),
    }


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean of values [N], and its standard error."""
    exact = values.double()
    return float(exact.mean()), float(exact.std()) / math.sqrt(len(exact))

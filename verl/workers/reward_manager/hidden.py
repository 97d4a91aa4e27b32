"""The reward manager `hidden`: similarities of embeddings become rewards (arXiv 2510.04506, section 3).

Pure functions of unit vectors, two matrix products and segment reductions each. Shapes: B trained rows,
G groups, H hidden size; m [B,H] trained rows, q [G,H] their anchors, n [K,H] negatives of all groups, in the order of
the groups, owner [K] group of each negative, g [B] group of each row. Anchors are queries; where queries are trained
(data.trained_text=query), they are positives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from verl.algorithm.contrastive import Group, false_negatives, negatives_of, query_log_probs, symmetric_infonce
from verl.algorithm.groups import first_rows, group_size, group_sum, groups_of, within_group
from verl.config import HiddenRewardConfig
from verl.config_checks import build_reward_kwargs
from verl.embedding.pooling import unit, without_direction
from verl.protocol import DataProto, is_trained
from verl.workers.reward_manager.base import RewardOutput

CUT_OFF_REWARD = -1.0
# What a row is in the rewards.
_TRAINED, _ANCHOR, _NEGATIVE = "trained", "anchor", "negative"


@dataclass(frozen=True)
class Term:
    """One part of the reward."""

    raw: Tensor
    """[B]."""
    weight: float

    @property
    def weighted(self) -> Tensor:
        return self.weight * self.raw


def centred(vectors: Tensor) -> Tensor:
    """[N,H] unit vectors without the direction of their mean."""
    return unit(without_direction(vectors, vectors.mean(0)))


def positive_similarity(m: Tensor, q: Tensor, g: Tensor) -> Tensor:
    """[B] cosine of each row with its group's query."""
    return (m * q[g]).sum(1)


def negative_similarity(queries: Tensor, n: Tensor, owner: Tensor, g: Tensor) -> Tensor:
    """[B] minus the mean cosine of each row's query with its group's negatives.

    Args:
        queries: [B,H]: the group's query, so that all rows of a group have the same value; or, where queries are
            trained, the row itself.
    """
    # The mean of the cosines is the cosine's other factor with the mean of the negatives.
    mean = group_sum(n, owner) / group_size(owner).unsqueeze(1)
    return -(queries * mean[g]).sum(1)


def clustering(m: Tensor, g: Tensor) -> Tensor:
    """[B] mean cosine with the group's other rows; 0 in a group of one."""
    size = group_size(g)[g]
    others = (m * (group_sum(m, g)[g] - m)).sum(1) / (size - 1).clamp(min=1)
    return others.masked_fill(size == 1, 0.0)


def cross_group_supervised(m: Tensor, q: Tensor, g: Tensor) -> Tensor:
    """[B] minus the mean, over the other groups, of the group's query's largest cosine with their rows."""
    num_groups = len(q)
    if num_groups == 1:
        return m.new_zeros(len(m))
    similarity = q @ m.T  # [G,B]
    largest = similarity.new_full((num_groups, num_groups), -torch.inf)
    largest.scatter_reduce_(1, g.expand(num_groups, -1), similarity, reduce="amax")
    return -((largest.sum(1) - largest.diagonal()) / (num_groups - 1))[g]


def cross_group_unsupervised(m: Tensor, q: Tensor, g: Tensor) -> Tensor:
    """[B] mean cosine with the other groups' queries; positive, and subtracted from the reward."""
    num_groups = len(q)
    if num_groups == 1:
        return m.new_zeros(len(m))
    similarity = m @ q.T  # [B,G]
    own = similarity.gather(1, g.unsqueeze(1)).squeeze(1)
    return (similarity.sum(1) - own) / (num_groups - 1)


def contrast(m: Tensor, q: Tensor, n: Tensor | None, g: Tensor, groups: Sequence[Group], temperature: float) -> Tensor:
    """[B] log-probability of the own query among the candidates (InfoNCE, arXiv 1807.03748).

    Candidates of a row of group g: its query, the other groups' queries, and every group's negatives. A
    candidate whose text equals g's query or one of its positives is a false negative and is left out.
    """
    candidates = [*((group.query,) for group in groups), *negatives_of(groups)]
    left_out = false_negatives(groups, candidates).to(m.device)
    return query_log_probs(m, q, n, g, left_out, temperature).gather(1, g.unsqueeze(1)).squeeze(1)


def owners(groups: Sequence[Group]) -> Tensor:
    """[K] int64, the group of each negative."""
    return torch.arange(len(groups)).repeat_interleave(torch.tensor([len(group.negatives) for group in groups]))


def grace_terms(
    m: Tensor, q: Tensor, n: Tensor | None, g: Tensor, groups: Sequence[Group], config: HiddenRewardConfig,
    trains_queries: bool = False,
) -> dict[str, Term]:  # fmt: skip
    """The terms of the `grace` objective; their weighted sum is the reward before any penalty."""
    scale = 1.0 / config.temperature if config.with_scale else 1.0
    terms = {"positive": Term(positive_similarity(m, q, g), scale)}
    if n is not None:
        queries = m if trains_queries else q[g]
        terms["negative"] = Term(negative_similarity(queries, n, owners(groups).to(n.device), g), scale)
    if config.enable_clustering:
        terms["clustering"] = Term(clustering(m, g), scale * config.clustering_weight)
        if n is not None:
            terms["cross_group"] = Term(cross_group_supervised(m, q, g), scale * config.cross_group_weight)
        else:
            terms["cross_group"] = Term(cross_group_unsupervised(m, q, g), -scale * config.cross_group_weight)
    return terms


def infonce_terms(
    m: Tensor, q: Tensor, n: Tensor | None, g: Tensor, groups: Sequence[Group], config: HiddenRewardConfig
) -> dict[str, Term]:
    """The terms of the `infonce` objective."""
    terms = {"contrast": Term(contrast(m, q, n, g, groups, config.temperature), 1.0)}
    if config.enable_clustering:
        terms["clustering"] = Term(clustering(m, g), config.clustering_weight / config.temperature)
    return terms


def penalise(rewards: Tensor, truncated: Tensor, g: Tensor, config: HiddenRewardConfig) -> Tensor:
    """Lower the rewards of rationales that were cut off at the length limit.

    grace replaces them by -1, as the original does. infonce puts them `length_penalty` below their group's
    lowest reward, so that a penalty can never be a bonus.
    """
    if config.objective == "grace":
        return torch.where(truncated, torch.full_like(rewards, CUT_OFF_REWARD), rewards)
    lowest = rewards.new_full((int(g.max()) + 1,), torch.inf).scatter_reduce(0, g, rewards, reduce="amin")
    return torch.where(truncated, lowest[g] - config.length_penalty, rewards)


def variance_shares(terms: dict[str, Term], g: Tensor) -> dict[str, float]:
    """Share of each term in the variance of the reward within groups; they sum to 1, or are all 0.

    The share is cov(term, reward) / var(reward): what part of the advantage comes from that term.
    """
    deviations = {name: within_group(term.weighted, g) for name, term in terms.items()}
    total = torch.stack(list(deviations.values())).sum(0)
    variance = total.square().sum()
    if variance <= 1e-12:
        return dict.fromkeys(terms, 0.0)
    return {name: float((total * deviation).sum() / variance) for name, deviation in deviations.items()}


def mean_terms(found: Sequence[dict[str, Term]]) -> dict[str, Term]:
    """The terms of several views of the same rows, averaged; their weights are the same."""
    return {
        name: Term(torch.stack([terms[name].raw for terms in found]).mean(0), term.weight)
        for name, term in found[0].items()
    }


def total_reward(terms: dict[str, Term]) -> Tensor:
    """[B] weighted sum of the terms."""
    return torch.stack([term.weighted for term in terms.values()]).sum(0)


class HiddenRewardManager:
    """Scores each rationale of a positive by where its embedding lies; see `HiddenRewardConfig`.

    Raises:
        UserError: an unknown keyword, with the list of valid ones.
    """

    needs_embeddings = True

    def __init__(self, **reward_kwargs: Any) -> None:
        self.config = build_reward_kwargs(reward_kwargs)
        self.exclude_system_prompt = self.config.exclude_system_prompt
        self.text_share = self.config.text_share
        self.no_rationale_weight = self.config.no_rationale_weight
        self.matryoshka_dims = self.config.matryoshka_dims
        self.trains_anchors = self.config.contrastive and self.config.contrastive_anchors

    def __call__(self, rows: DataProto) -> RewardOutput:
        """Reward the trained rows by the embeddings of all rows.

        Args:
            rows: the N rows of a step, with `embeddings` [N,H] float32 of unit length; each sample has trained rows and
                an anchor.

        Returns:
            `scores` [B]; in `columns` each term's part of them [B], and their sum before the length penalty; where the
            contrastive loss has weight in this step, its gradient `embedding_grad` [N,H].

        Raises:
            KeyError: the rows lack a column.
            ValueError: they have no anchors.
        """
        rows.require("embeddings", "truncated", "response_length", "uid", "role", "text")
        at = _positions(rows)
        if _ANCHOR not in at:
            raise ValueError("the reward manager hidden needs an anchor for every sample: a query or a positive")
        main = rows[at[_TRAINED]]
        g = groups_of(main)
        groups = _groups(rows, at, g)
        trains_queries = main.non_tensor_batch["role"][0] == "query"
        terms = mean_terms(
            [self._terms(view, at, g, groups, trains_queries) for view in self._views(rows.batch["embeddings"])]
        )
        rewards = total_reward(terms)
        scores = rewards
        if self.config.enable_length_penalty:
            scores = penalise(rewards, main.batch["truncated"], g, self.config)
        columns = {name: term.weighted for name, term in terms.items()}
        output = RewardOutput(scores, {}, {**columns, "before_penalty": rewards})
        # A step without rationales has nothing that is rewarded.
        if rows.batch["response_length"].any():
            output.metrics |= _metrics(terms, g)
        if self.config.contrastive and (weight := self.config.contrastive_weight_in(rows.meta_info["step"])[0]):
            output.embedding_grad, found = self._contrastive_gradient(rows, at, g, groups, weight)
            output.metrics |= found
        return output

    def _views(self, embeddings: Tensor) -> list[Tensor]:
        """The embeddings [N,H] as they are compared: unit vectors [N,D], for each number of first dimensions."""
        whole = centred(embeddings) if self.config.centre else embeddings
        dims = self.config.matryoshka_dims
        return [whole] if dims is None else [unit(whole[:, :count]) for count in dims]

    def _terms(
        self, vectors: Tensor, at: dict[str, Tensor], g: Tensor, groups: Sequence[Group], trains_queries: bool
    ) -> dict[str, Term]:
        """The terms of the objective from vectors [N,D] of all rows."""
        m, q = vectors[at[_TRAINED]], vectors[at[_ANCHOR]]
        n = vectors[at[_NEGATIVE]] if _NEGATIVE in at else None
        if self.config.objective == "grace":
            return grace_terms(m, q, n, g, groups, self.config, trains_queries)
        return infonce_terms(m, q, n, g, groups, self.config)

    def _contrastive_gradient(
        self, rows: DataProto, at: dict[str, Tensor], g: Tensor, groups: Sequence[Group], weight: float
    ) -> tuple[Tensor, dict[str, float]]:
        """[N,H] float32, the gradient of the weighted contrastive loss by the rows' embeddings; and its metrics."""
        with torch.enable_grad():
            embeddings = rows.batch["embeddings"].clone().requires_grad_()
            views = [self._contrastive_loss(view, at, g, groups) for view in self._views(embeddings)]
            loss, accuracy = (torch.stack(values).mean() for values in zip(*views, strict=True))
            (grad,) = torch.autograd.grad(weight * loss, embeddings)
        found = {"loss": float(loss.detach()), "accuracy": float(accuracy), "weight": weight}
        return grad, {f"contrastive/{name}": value for name, value in found.items()}

    def _contrastive_loss(
        self, vectors: Tensor, at: dict[str, Tensor], g: Tensor, groups: Sequence[Group]
    ) -> tuple[Tensor, Tensor]:
        """The loss of vectors [N,D] of all rows, and its accuracy."""
        anchors = vectors if self.config.contrastive_anchors else vectors.detach()
        n = anchors.index_select(0, at[_NEGATIVE]) if _NEGATIVE in at else None
        return symmetric_infonce(
            vectors.index_select(0, at[_TRAINED]), anchors.index_select(0, at[_ANCHOR]), n, g, groups,
            self.config.contrastive_temperature,
        )  # fmt: skip


def _metrics(terms: dict[str, Term], g: Tensor) -> dict[str, float]:
    shares = variance_shares(terms, g)
    metrics = {}
    for name, term in terms.items():
        metrics[f"{name}/raw"] = float(term.raw.mean())
        metrics[f"{name}/weighted"] = float(term.weighted.mean())
        metrics[f"{name}/variance_share"] = shares[name]
    return metrics


def _positions(rows: DataProto) -> dict[str, Tensor]:
    """The positions of the trained rows in their order, and of anchors and negatives in the order of the groups."""
    roles, uids = rows.non_tensor_batch["role"], rows.non_tensor_batch["uid"]
    found = {_TRAINED: torch.from_numpy(np.flatnonzero(is_trained(rows)))}
    groups = dict.fromkeys(uids[found[_TRAINED].numpy()])
    for role in dict.fromkeys(roles[~is_trained(rows)]):
        places: dict[Any, list[int]] = {}
        for i in np.flatnonzero(roles == role):
            places.setdefault(uids[i], []).append(int(i))
        kind = _NEGATIVE if role == _NEGATIVE else _ANCHOR
        found[kind] = torch.tensor([i for uid in groups for i in places[uid]])
    return found


def _groups(rows: DataProto, at: dict[str, Tensor], g: Tensor) -> list[Group]:
    """The texts of each group."""
    texts, uids = rows.non_tensor_batch["text"], rows.non_tensor_batch["uid"]
    others = rows.non_tensor_batch.get("other_positives")
    negatives: dict[Any, list[str]] = {}
    for i in at[_NEGATIVE].tolist() if _NEGATIVE in at else ():
        negatives.setdefault(uids[i], []).append(texts[i])
    positive = at[_TRAINED][first_rows(g)].tolist()
    return [
        Group(
            query=texts[q],
            positives=(texts[p], *(() if others is None else others[p])),
            negatives=tuple(negatives.get(uids[p], ())),
        )
        for q, p in zip(at[_ANCHOR].tolist(), positive, strict=True)
    ]

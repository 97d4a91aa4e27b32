"""What a probe's vectors and rationales say: against closed forms, and against loops over pairs."""

import math

import numpy as np
import pytest
import torch

from verl.algorithm.groups import within_group_correlation
from verl.embedding.metrics import top_variance_share
from verl.embedding.ngrams import distinct_n, repetition
from verl.embedding.pooling import unit
from verl.embedding.rationale_use import ProbeVectors, probe_report
from verl.protocol import DataProto
from verl.trainer.ppo.diagnostics import token_mean

TRIPLET = ["positive", "query", "negative"]


def random_unit(count: int, size: int, seed: int) -> torch.Tensor:
    return unit(torch.randn(count, size, generator=torch.Generator().manual_seed(seed)))


def probe(own: torch.Tensor, **others: torch.Tensor) -> ProbeVectors:
    return ProbeVectors(own, *(others.get(name, own) for name in ("second", "other", "without")))


def report(vectors: ProbeVectors, roles: list[str]) -> dict[str, float]:
    """Of texts that all have rationales."""
    return probe_report(vectors, roles, torch.ones(len(roles), dtype=torch.bool))


def test_collapsed_vectors():
    found = report(probe(random_unit(1, 8, 0).repeat(12, 1)), TRIPLET * 4)
    assert found["effective_rank"] == pytest.approx(1, abs=1e-3)
    assert found["mean_cosine"] == pytest.approx(1, abs=1e-5) and found["uniformity"] == pytest.approx(0, abs=1e-5)
    assert found["top1_variance_share"] == 1 and found["alignment"] == pytest.approx(0, abs=1e-5)
    assert found["cos_without"] == pytest.approx(1, abs=1e-5) and found["own_rationale_gain"] == 0


def test_isotropic_vectors():
    """Every axis in both directions."""
    own = torch.cat([torch.eye(6), -torch.eye(6)])
    found = report(probe(own), TRIPLET * 4)
    assert found["effective_rank"] == pytest.approx(6, abs=1e-6)
    assert found["top1_variance_share"] == pytest.approx(1 / 6, abs=1e-9)
    assert found["mean_cosine"] == pytest.approx(-1 / 11, abs=1e-6)
    # Of 66 pairs, 6 are opposite (distance^2 4) and 60 orthogonal (2).
    assert found["uniformity"] == pytest.approx(math.log((6 * math.exp(-8) + 60 * math.exp(-4)) / 66), abs=1e-5)


def test_two_clusters():
    own = torch.eye(5)[[0] * 6 + [1] * 6]
    found = report(probe(own), TRIPLET * 4)
    assert found["effective_rank"] == pytest.approx(2, abs=1e-6)
    assert found["top1_variance_share"] == pytest.approx(1, abs=1e-9)
    assert found["mean_cosine"] == pytest.approx((15 + 15) / 66, abs=1e-6)


def test_the_largest_component_is_that_of_the_covariance():
    vectors = random_unit(30, 5, 1) + 3  # far from the origin, which a variance does not see
    eigenvalues = np.linalg.eigvalsh(np.cov(vectors.double().numpy().T))
    assert top_variance_share(vectors) == pytest.approx(eigenvalues[-1] / eigenvalues.sum(), abs=1e-9)


def test_cosines_and_retrieval_are_those_of_loops():
    vectors = ProbeVectors(*(unit(random_unit(15, 6, 7) + 0.7 * random_unit(15, 6, seed)) for seed in range(4)))
    found = report(vectors, TRIPLET * 5)
    own, second, other, without = (part.double().numpy() for part in vectors.__dict__.values())
    gains = []
    for i in range(15):
        gains.append(own[i] @ second[i] - own[i] @ other[i])
    for name, part in (("without", without), ("other_rationale", other), ("second_rationale", second)):
        assert found[f"cos_{name}"] == pytest.approx(np.mean([own[i] @ part[i] for i in range(15)]), abs=1e-6)
    assert found["own_rationale_gain"] == pytest.approx(np.mean(gains), abs=1e-6)
    assert found["own_rationale_gain_error"] == pytest.approx(np.std(gains, ddof=1) / 15**0.5, abs=1e-6)
    for name, queries, documents in (
        ("thinking", own, own), ("without", without, without), ("shuffled", other, own),
    ):  # fmt: skip
        reciprocal = []
        for i in range(5):
            scores = [queries[3 * i + 1] @ documents[3 * j] for j in range(5)]
            reciprocal.append(1 / (1 + sum(s > scores[i] for s in scores)))
        assert found[f"mrr_{name}"] == pytest.approx(np.mean(reciprocal), abs=1e-6), name
    squares = [np.sum((own[3 * i + 1] - own[3 * i]) ** 2) for i in range(5)]
    assert found["alignment"] == pytest.approx(np.mean(squares), abs=1e-6)


def test_plain_texts_are_aligned_with_their_second_rationale():
    own, second = random_unit(6, 4, 0), random_unit(6, 4, 1)
    found = report(probe(own, second=second), ["positive"] * 6)
    assert found["alignment"] == pytest.approx(float((own - second).square().sum(1).mean()), abs=1e-6)
    assert not [name for name in found if name.startswith("mrr")]


def test_what_rationales_do_is_told_of_texts_that_have_one():
    own, other = random_unit(6, 4, 0), random_unit(6, 4, 1)
    roles, thinks = ["positive", "query", "negative"] * 2, torch.tensor([False, True, False] * 2)
    found = probe_report(ProbeVectors(own, own, other, other), roles, thinks)
    cosines = [float(own[i] @ other[i]) for i in (1, 4)]
    assert found["cos_without"] == pytest.approx(np.mean(cosines), abs=1e-6)
    assert found["own_rationale_gain"] == pytest.approx(1 - np.mean(cosines), abs=1e-6)


def rows_of_ids() -> tuple[list[list[int]], torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = np.random.default_rng(3)
    rows = [generator.integers(0, 3, size).tolist() for size in (0, 1, 2, 3, 4, 7, 11, 11, 12)]
    rows += [rows[-1], [5, 6] * 6, [151_000 + i for i in range(12)]]
    ids = torch.full((len(rows), 12), 9)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return rows, ids, torch.tensor([len(row) for row in rows]), torch.arange(len(rows)) // 3


def grams(row: list[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]


@pytest.mark.parametrize("n", [1, 2, 4])
def test_ngrams_are_counted_as_by_loops(n):
    rows, ids, lengths, group = rows_of_ids()
    shares = []
    for g in range(int(group.max()) + 1):
        found = [gram for i, row in enumerate(rows) if group[i] == g for gram in grams(row, n)]
        if found:
            shares.append(len(set(found)) / len(found))
    assert distinct_n(ids, lengths, group, n) == pytest.approx(np.mean(shares), abs=1e-6)
    repeated = [1 - len(set(grams(row, n))) / len(grams(row, n)) for row in rows if grams(row, n)]
    assert repetition(ids, lengths, n) == pytest.approx(np.mean(repeated), abs=1e-6)


@pytest.mark.parametrize("width", [0, 1, 3])
def test_rationales_too_short_for_an_ngram_repeat_nothing(width):
    ids, lengths = torch.zeros(2, width, dtype=torch.int64), torch.full((2,), width)
    assert repetition(ids, lengths) == 0 and distinct_n(ids, lengths, torch.tensor([0, 0]), 4) == 0


def test_the_correlation_within_groups_does_not_see_what_groups_differ_in():
    length = torch.tensor([1, 2, 3, 101, 102, 104])
    reward = torch.tensor([0.3, 0.2, 0.1, 9.3, 9.1, 9.2])
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    deviations = [[-1, 0, 1, -4 / 3, -1 / 3, 5 / 3], [0.1, 0, -0.1, 0.1, -0.1, 0]]
    expected = np.corrcoef(*deviations)[0, 1]
    assert within_group_correlation(length, reward, group) == pytest.approx(expected, abs=1e-5)
    assert within_group_correlation(length, torch.tensor([1.0, 1, 1, 5, 5, 5]), group) is None


def test_a_likelihood_is_the_mean_over_the_rationales_own_tokens():
    rows = DataProto.from_dict({"responses": torch.zeros(2, 4), "response_length": torch.tensor([2, 4])}, {})
    log_probs = torch.tensor([[-1.0, -2.0, -50.0, -50.0], [-1.0, -2.0, -3.0, -4.0]])
    assert token_mean(rows, log_probs).tolist() == [-1.5, -2.5]

"""Embedding metrics and pooling against double loops over plain floats."""

import math
import random

import pytest
import torch

from verl.embedding.metrics import (
    alignment,
    effective_rank,
    mean_cosine,
    mean_reciprocal_rank,
    recall_at_1,
    retrieval_ranks,
    spread_report,
    triplet_accuracy,
    triplet_report,
    uniformity,
)
from verl.embedding.pooling import mean_pool

Vectors = list[list[float]]


def units(count: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, width, generator=generator), dim=1)


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def squared_distance(a: list[float], b: list[float]) -> float:
    return math.fsum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def slow_ranks(query: Vectors, documents: Vectors) -> list[int]:
    ranks = []
    for i, q in enumerate(query):
        own = dot(q, documents[i])
        ranks.append(1 + sum(1 for j, d in enumerate(documents) if j != i and dot(q, d) >= own))
    return ranks


@pytest.mark.parametrize("seed", range(3))
def test_triplet_accuracy_equals_its_loop(seed: int) -> None:
    query, positive, negative = (units(40, 5, 10 * seed + k) for k in range(3))
    q, p, n = query.tolist(), positive.tolist(), negative.tolist()
    wins = sum(1 for i in range(40) if dot(q[i], p[i]) > dot(q[i], n[i]))
    assert triplet_accuracy(query, positive, negative) == pytest.approx(wins / 40, abs=1e-6)


def test_a_tied_triplet_is_not_a_win() -> None:
    query, same = units(4, 3, 0), units(4, 3, 1)
    assert triplet_accuracy(query, same, same) == 0.0
    assert triplet_accuracy(query, query, -query) == 1.0


@pytest.mark.parametrize("seed", range(3))
def test_retrieval_equals_its_loop(seed: int) -> None:
    query, documents = units(25, 4, seed), units(25, 4, 50 + seed)
    ranks = slow_ranks(query.tolist(), documents.tolist())
    assert retrieval_ranks(query, documents).tolist() == ranks
    assert mean_reciprocal_rank(query, documents) == pytest.approx(math.fsum(1 / r for r in ranks) / 25, abs=1e-6)
    assert recall_at_1(query, documents) == pytest.approx(ranks.count(1) / 25, abs=1e-6)


def test_ties_count_against_the_own_document() -> None:
    axes = torch.eye(3)
    query = axes[[0, 0, 2, 1]]
    documents = axes[[0, 0, 2, 2]]
    assert retrieval_ranks(query, documents).tolist() == [2, 2, 2, 4]
    assert mean_reciprocal_rank(query, documents) == pytest.approx((1 / 2 + 1 / 2 + 1 / 2 + 1 / 4) / 4, abs=1e-6)
    assert recall_at_1(query, documents) == 0.0


def test_collapsed_embeddings_rank_last() -> None:
    collapsed = torch.eye(3)[[1] * 6]
    assert retrieval_ranks(collapsed, collapsed).tolist() == [6] * 6


@pytest.mark.parametrize("count", [2, 3, 17])
def test_mean_cosine_equals_its_loop(count: int) -> None:
    vectors = units(count, 6, count)
    rows = vectors.tolist()
    pairs = [dot(rows[i], rows[j]) for i in range(count) for j in range(count) if i != j]
    assert mean_cosine(vectors) == pytest.approx(math.fsum(pairs) / len(pairs), abs=1e-6)


def test_mean_cosine_of_known_sets() -> None:
    assert mean_cosine(torch.eye(5)) == pytest.approx(0.0, abs=1e-6)
    assert mean_cosine(units(1, 7, 0).repeat(4, 1)) == pytest.approx(1.0, abs=1e-6)
    assert mean_cosine(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == pytest.approx(-1.0, abs=1e-6)


def test_effective_rank_of_identical_vectors_is_one() -> None:
    assert effective_rank(units(1, 9, 3).repeat(12, 1)) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("count", [1, 4, 8])
def test_effective_rank_of_orthonormal_vectors_is_their_number(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q.float()
    assert effective_rank(rotation[:count]) == pytest.approx(count, abs=1e-5)


def test_effective_rank_is_exp_of_the_entropy_of_the_singular_values() -> None:
    """3 copies of one axis and 1 of another: singular values sqrt(3) and 1."""
    share = math.sqrt(3) / (math.sqrt(3) + 1)
    expected = math.exp(-share * math.log(share) - (1 - share) * math.log(1 - share))
    assert effective_rank(torch.eye(4)[[0, 0, 0, 2]]) == pytest.approx(expected, abs=1e-6)


def test_alignment_equals_its_loop() -> None:
    first, second = units(15, 6, 1), units(15, 6, 2)
    distances = [squared_distance(a, b) for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    assert alignment(first, second) == pytest.approx(math.fsum(distances) / 15, abs=1e-6)
    assert alignment(first, first) == 0.0
    assert alignment(first, -first) == pytest.approx(4.0, abs=1e-6)


def test_uniformity_equals_its_loop() -> None:
    vectors = units(13, 6, 4)
    rows = vectors.tolist()
    potentials = [math.exp(-2 * squared_distance(rows[i], rows[j])) for i in range(13) for j in range(i)]
    expected = math.log(math.fsum(potentials) / len(potentials))
    assert uniformity(vectors) == pytest.approx(expected, abs=1e-6)


def test_uniformity_of_known_sets() -> None:
    assert uniformity(torch.eye(6)) == pytest.approx(-4.0, abs=1e-6)
    assert uniformity(torch.eye(3)[[0, 0, 0]]) == pytest.approx(0.0, abs=1e-6)


def test_reports_hold_the_figures_under_their_names() -> None:
    query, positive, negative = (units(10, 5, k) for k in range(3))
    report = triplet_report(query, positive, negative)
    everything = torch.tensor(query.tolist() + positive.tolist() + negative.tolist())
    ranks = slow_ranks(query.tolist(), positive.tolist())
    assert report == pytest.approx(
        {
            "triplet_accuracy": triplet_accuracy(query, positive, negative),
            "recall_at_1": ranks.count(1) / 10,
            "mrr": math.fsum(1 / r for r in ranks) / 10,
            "alignment": alignment(query, positive),
            "mean_cosine": mean_cosine(everything),
            "uniformity": uniformity(everything),
            "effective_rank": effective_rank(everything),
        },
        abs=1e-6,
    )
    assert spread_report(everything) == {k: report[k] for k in ("mean_cosine", "uniformity", "effective_rank")}


def slow_pool(hidden: Vectors, spans: list[list[int]]) -> Vectors:
    pooled = []
    for span in spans:
        mean = [math.fsum(hidden[t][k] for t in span) / len(span) for k in range(len(hidden[0]))]
        pooled.append(mean)
    return pooled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mean_pool_equals_its_loop_in_float32(dtype: torch.dtype) -> None:
    """Long rows, whose sum in half precision would be off by far more than the tolerance."""
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(900, 6, generator=generator) + 0.5).to(dtype)
    draw = random.Random(0)
    spans = [list(range(0, 400)), [410], list(range(500, 503)), list(range(600, 900, 2))]
    pairs = [(t, row) for row, span in enumerate(spans) for t in span]
    draw.shuffle(pairs)
    tokens, rows = (torch.tensor(column) for column in zip(*pairs, strict=True))
    pooled = mean_pool(hidden, tokens, rows, num_rows=4)
    assert pooled.dtype == torch.float32
    expected = torch.tensor(slow_pool(hidden.double().tolist(), spans))
    torch.testing.assert_close(pooled, expected, atol=1e-6, rtol=0)


def test_tokens_that_are_not_pooled_change_nothing() -> None:
    hidden = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    tokens, rows = torch.tensor([1, 2, 4]), torch.tensor([0, 0, 1])
    before = mean_pool(hidden, tokens, rows, 2)
    hidden[[0, 3, 5]] = 1e6
    assert torch.equal(mean_pool(hidden, tokens, rows, 2), before)


@pytest.mark.parametrize(
    ("rows", "missing"), [([0, 0, 2], r"\[1\]"), ([1, 1, 1], r"\[0, 2, 3\]"), ([0, 1, 2], r"\[3\]")]
)
def test_a_row_with_nothing_to_pool_is_an_error_that_names_it(rows: list[int], missing: str) -> None:
    count = 4 if "3" in missing else 3
    with pytest.raises(ValueError, match=f"rows {missing} have no token to pool"):
        mean_pool(torch.ones(3, 2), torch.tensor([0, 1, 2]), torch.tensor(rows), count)

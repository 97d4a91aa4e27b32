"""Validation while training: what is embedded, what is reported, and what counts as better."""

import itertools
import json

import pytest
import torch

from verl.embedding.metrics import spearman
from verl.errors import UserError
from verl.trainer.ppo.validation import is_better, read_pairs


def spearman_by_hand(first, second) -> float:
    """Ranks by counting, and the correlation as its definition says."""

    def ranks(values):
        return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]

    a, b = ranks(first), ranks(second)
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    covariance = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    spread = sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b)
    return covariance / spread**0.5


def test_spearman_is_the_correlation_of_ranks_with_ties_shared():
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(0, 6, (40,), generator=generator).double()
    second = (first + torch.randn(40, generator=generator)).round()
    assert spearman(first, second) == pytest.approx(spearman_by_hand(first.tolist(), second.tolist()), abs=1e-12)
    assert spearman(first, first.exp()) == pytest.approx(1)
    assert spearman(first, -first) == pytest.approx(-1)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"sentence1": "a", "sentence2": "b"}', "line 2 is not a scored pair"),
        ('{"sentence1": "a", "sentence2": 3, "score": 1}', "line 2 is not a scored pair"),
        ('{"sentence1": "a", "sentence2": " ", "score": 1}', "line 2 has an empty text"),
        ('{"sentence1": "a", "sentence2": "b", "score": "high"}', "line 2 is not a scored pair"),
        ("nothing", "line 2: not valid JSON"),
    ],
)
def test_a_bad_pair_is_named_with_its_line(tmp_path, line, said):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"sentence1": "a", "sentence2": "b", "score": 1}) + f"\n{line}\n")
    with pytest.raises(UserError, match=said):
        read_pairs(file)


def test_a_missing_file_of_pairs_says_how_to_do_without(tmp_path):
    with pytest.raises(UserError, match=r"data\.val_sts_file=.* does not exist; .*null for none"):
        read_pairs(tmp_path / "none.jsonl")


def test_better_is_larger_but_for_distances():
    for name, (value, best) in itertools.product(("val/mrr", "val/alignment"), ((0.5, 0.4), (0.4, 0.5), (0.5, 0.5))):
        larger = name == "val/mrr"
        assert is_better(name, value, best) == (value > best if larger else value < best)
        assert is_better(name, value, None)
    assert not is_better("val/mrr", float("nan"), None)

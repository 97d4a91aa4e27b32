"""bench/best_of.py: which rationale is the best, and what it is worth."""

import math
import shutil
import sys

import best_of
import numpy as np
import pytest
from comparison.tasks import Triplets

from verl import GraceEncoder
from verl.embedding.settings import EmbedderSettings

ROWS = [
    ("a man plays a guitar", "a person makes music", "nobody plays"),
    ("where is my card", "my card has not come", "I found my card"),
    ("two dogs run in snow", "animals are outside", "two cats sleep"),
    ("it rains in Paris", "the weather is wet", "the sun shines"),
]


def test_the_best_and_the_worst_are_those_of_plain_loops(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "model")
    EmbedderSettings(max_new_tokens=12).write(tmp_path / "model")
    with GraceEncoder(tmp_path / "model", device="cpu") as encoder:
        found = best_of.measure(encoder, Triplets("triplets", ROWS), rationales=3)
        # Text by text, not all in one call.
        vector = {text: encoder.encode(text).astype(float) for row in ROWS for text in row}
        drawn = [[encoder.encode(row[1], seed=seed).astype(float) for row in ROWS] for seed in range(3)]
    queries, negatives = [vector[row[0]] for row in ROWS], [vector[row[2]] for row in ROWS]
    rewards = np.array([[loop_reward(m, queries, negatives, i) for i, m in enumerate(own)] for own in drawn])
    assert rewards.std(0).max() > 1e-3  # there is something to choose
    assert found.rewards == pytest.approx(rewards, abs=1e-4)
    for name, choose in (("best", np.argmax), ("worst", np.argmin)):
        chosen = [drawn[choose(rewards[:, i])][i] for i in range(len(ROWS))]
        assert_scores(found.scores[name], [chosen], queries, negatives)
    assert_scores(found.scores["drawn"], drawn, queries, negatives)
    pairs = [drawn[a][i] @ drawn[b][i] for i in range(4) for a in range(3) for b in range(3) if a != b]
    assert found.same == pytest.approx(np.mean(pairs), abs=1e-5)
    others = [own[i] @ own[j] for own in drawn for i in range(4) for j in range(4) if i != j]
    assert found.different == pytest.approx(np.mean(others), abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no/such/model"], "no/such/model"),
        (["model", "--rationales", "1"], "--rationales=1"),
        (["model", "--data", "no_such_folder"], "--data=no_such_folder"),
    ],
)
def test_a_wrong_argument_is_one_line_that_names_it(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["best_of.py", *arguments])
    assert best_of.main() == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def loop_reward(m, queries, negatives, own):
    """Log-probability of the own query, at temperature 0.1."""
    logits = [float(m @ other) / 0.1 for other in (*queries, *negatives)]
    return logits[own] - math.log(sum(math.exp(value) for value in logits))


def assert_scores(found, runs, queries, negatives):
    assert len(found["R@1"]) == len(runs)
    for number, positives in enumerate(runs):
        for i, query in enumerate(queries):
            similarity = [float(query @ positive) for positive in positives]
            rank = 1 + sum(value > similarity[i] for value in similarity)
            assert found["accuracy"][number].values[i] == (similarity[i] > query @ negatives[i])
            assert found["R@1"][number].values[i] == (rank == 1)
            assert found["nDCG@10"][number].values[i] == pytest.approx(1 / math.log2(rank + 1))

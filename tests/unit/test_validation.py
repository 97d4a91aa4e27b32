"""Validation while training: what is embedded, what is reported, and what counts as better."""

import itertools
import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny import tiny_tokenizer

from verl.config import RunConfig
from verl.data.collator import PromptCollator
from verl.data.dataset import PromptDataset
from verl.embedding.metrics import spearman
from verl.embedding.prompts import PromptRenderer, rationale_messages
from verl.embedding.settings import EmbedderSettings
from verl.errors import UserError
from verl.protocol import DataProto
from verl.trainer.ppo.validation import Validation, is_better, read_pairs
from verl.workers.reward_manager.base import RewardOutput


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


def test_an_over_long_scored_pair_is_told_before_the_run_where_no_text_may_be_cut(validation):
    validation(first="word " * 500)
    with pytest.raises(UserError, match=r"data.val_sts_file=.*pairs.jsonl: a prompt has \d+ tokens, more than"):
        validation(first="word " * 500, truncation="error")


# ---- the figures of a validation ----

# The direction of each text's vector in the plane, in degrees. The fourth triplet is one too many.
ANGLES = {
    "query 0": 0, "positive 0": 55, "negative 0": 80,
    "query 1": 90, "positive 1": 130, "negative 1": 100,
    "query 2": 200, "positive 2": 230, "negative 2": 350,
    "query 3": 45, "positive 3": 120, "negative 3": 50,
    "first 0": 0, "second 0": 20, "first 1": 0, "second 1": 100, "first 2": 0, "second 2": 60,
}  # fmt: skip
PAIR_SCORES = [5, 1, 0.5]
USED = range(3)


def cosine(first: str, second: str) -> float:
    return math.cos(math.radians(ANGLES[first] - ANGLES[second]))


def spread_by_loops(texts: list[str]) -> dict[str, float]:
    pairs = [cosine(a, b) for a, b in itertools.combinations(texts, 2)]
    # The squares of the two singular values are the eigenvalues of [[xx, xy], [xy, yy]].
    x, y = ([of(math.radians(ANGLES[text])) for text in texts] for of in (math.cos, math.sin))
    xx, yy, xy = (sum(a * b for a, b in zip(*both, strict=True)) for both in ((x, x), (y, y), (x, y)))
    root = math.sqrt((xx - yy) ** 2 + 4 * xy**2)
    singular = [math.sqrt((xx + yy + sign * root) / 2) for sign in (1, -1)]
    shares = [value / sum(singular) for value in singular]
    return {
        "val/mean_cosine": sum(pairs) / len(pairs),
        "val/uniformity": math.log(sum(math.exp(-2 * (2 - 2 * found)) for found in pairs) / len(pairs)),
        "val/effective_rank": math.exp(-sum(share * math.log(share) for share in shares)),
    }


def figures_by_loops() -> dict[str, float]:
    positives = [f"positive {i}" for i in USED]
    nearer, ranks, distances = [], [], []
    for i in USED:
        own = cosine(f"query {i}", f"positive {i}")
        nearer.append(own > cosine(f"query {i}", f"negative {i}"))
        ranks.append(sum(cosine(f"query {i}", text) >= own for text in positives))
        distances.append(2 - 2 * own)
    return {
        "val/triplet_accuracy": sum(nearer) / 3,
        "val/recall_at_1": sum(rank == 1 for rank in ranks) / 3,
        "val/mrr": sum(1 / rank for rank in ranks) / 3,
        "val/alignment": sum(distances) / 3,
        **spread_by_loops([f"{role} {i}" for role in ("query", "positive", "negative") for i in USED]),
        "val/sts_spearman": spearman_by_hand([cosine(f"first {i}", f"second {i}") for i in USED], PAIR_SCORES),
    }


@pytest.fixture
def validation(tmp_path):
    """Of four triplets, three of which are used, and three scored pairs."""

    def build(
        roles: tuple[str, ...] = ("positive", "query", "negative"), needs_embeddings: bool = True,
        val_kwargs: dict | None = None, first: str = "first 0", **data,
    ) -> Validation:  # fmt: skip
        rows = [
            {
                "data_source": "supervised",
                "prompt": rationale_messages(f"positive {i}"),
                "reward_model": {"style": "rule", "ground_truth": f"positive {i}"},
                "extra_info": {"index": i},
                "multi_input": {"query": f"query {i}", "instruction": "", "negative_document": f"negative {i}"},
            }
            for i in range(4)
        ]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test.parquet")
        pairs = [{"sentence1": f"first {i}", "sentence2": f"second {i}", "score": PAIR_SCORES[i]} for i in range(3)]
        pairs[0]["sentence1"] = first
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        settings = {"train_batch_size": 2, "val_max_samples": 3, "val_sts_file": str(tmp_path / "pairs.jsonl"), **data}
        rollout = {"val_kwargs": val_kwargs or {}}
        config = RunConfig.model_validate({"data": settings, "actor_rollout_ref": {"rollout": rollout}})
        renderer = PromptRenderer(tiny_tokenizer(), config.data.max_prompt_length, config.data.truncation)
        samples = PromptDataset([str(tmp_path / "test.parquet")], config.data, roles, renderer)
        collate = PromptCollator(renderer, EmbedderSettings(), config.data.reward_fn_key)
        return Validation(config, samples, collate, needs_embeddings)

    return build


def embed(prompts: DataProto) -> DataProto:
    angles = torch.tensor([float(ANGLES[text]) for text in prompts.non_tensor_batch["text"]]).deg2rad()
    return prompts.with_tensors(embeddings=torch.stack([angles.cos(), angles.sin()], dim=1))


def not_asked(rows: DataProto) -> RewardOutput:
    pytest.fail("rewards are not reported beside embeddings")


@pytest.mark.parametrize("size", [None, 3, 100])
def test_the_figures_are_those_of_loops_over_triplets_and_pairs(validation, size):
    found = validation(val_batch_size=size).run(embed, not_asked, step=7)
    expected = figures_by_loops()
    assert found == pytest.approx(expected, abs=1e-5)
    # None of them is one that another order of the texts or of the scores would give too.
    assert expected["val/triplet_accuracy"] == pytest.approx(2 / 3)
    assert expected["val/mrr"] == pytest.approx(5 / 6) and expected["val/recall_at_1"] == pytest.approx(2 / 3)
    assert expected["val/sts_spearman"] == pytest.approx(0.5)


def test_without_a_file_of_pairs_there_is_no_correlation(validation):
    expected = figures_by_loops()
    del expected["val/sts_spearman"]
    assert validation(val_sts_file=None).run(embed, not_asked, step=7) == pytest.approx(expected, abs=1e-5)


def test_of_plain_texts_the_spread_is_reported_and_each_is_embedded_once(validation):
    plain = validation(roles=("positive", "query"), train_mode="unsupervised", val_sts_file=None)
    assert [len(prompts) for _, prompts in plain.batches()] == [2, 1] and plain.num_texts == 3
    expected = spread_by_loops([f"positive {i}" for i in USED])
    assert plain.run(embed, not_asked, step=7) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("val_kwargs", "temperature"),
    [({}, 0), ({"temperature": 0.7}, 0), ({"do_sample": True, "temperature": 0.7}, 0.7), ({"do_sample": True}, 1)],
)
def test_rationales_are_greedy_unless_they_are_to_be_sampled(validation, val_kwargs, temperature):
    batches = list(validation(val_kwargs=val_kwargs).batches())
    texts = [list(prompts.non_tensor_batch["text"]) for _, prompts in batches]
    triplets = [[f"{role} {i}" for role in ("positive", "query", "negative")] for i in USED]
    pairs = [[f"first {i}", f"second {i}"] for i in USED]
    assert texts == [triplets[0] + triplets[1], triplets[2], pairs[0] + pairs[1], pairs[2]]
    for _, prompts in batches:
        assert prompts.batch["temperature"].tolist() == pytest.approx([temperature] * len(prompts))


def test_a_reward_that_is_not_from_embeddings_is_averaged_over_all_texts_and_told_the_step(validation):
    scores, steps = {"positive 0": 1.0, "positive 1": 2.0, "positive 2": 6.0}, []

    def manager(rows: DataProto) -> RewardOutput:
        steps.append(rows.meta_info["step"])
        return RewardOutput(torch.tensor([scores[text] for text in rows.non_tensor_batch["text"]]))

    by_rule = validation(roles=("positive",), needs_embeddings=False)
    # Batches of two and of one: the mean of their means would be 3.75.
    assert by_rule.run(lambda prompts: prompts, manager, step=7) == {"val/reward": pytest.approx(3)}
    assert steps == [7, 7] and by_rule.num_texts == 3

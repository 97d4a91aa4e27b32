"""The reward manager `hidden` end to end against double loops over plain floats."""

import math
import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from verl.config import HiddenRewardConfig
from verl.errors import UserError
from verl.protocol import DataProto
from verl.workers.reward_manager.base import RewardOutput
from verl.workers.reward_manager.hidden import HiddenRewardManager

WIDTH = 8
LAYOUTS = {
    "several groups": [3, 2, 4, 5],
    "one group": [4],
    "one row per group": [1, 1, 1],
    "mixed": [1, 3, 2],
}
WEIGHTS = {"temperature": 0.1, "clustering_weight": 0.3, "cross_group_weight": 0.7}


@dataclass(frozen=True, eq=False)
class Row:
    uid: str
    role: str
    text: str
    vector: list[float]
    """Exact values of a float32 unit vector."""
    truncated: bool = False


def unit(draw: random.Random) -> list[float]:
    values = torch.tensor([draw.gauss(0, 1) for _ in range(WIDTH)])
    return torch.nn.functional.normalize(values, dim=0).tolist()


def make_rows(sizes: list[int], negatives: bool = True, truncated: bool = False, seed: int = 0) -> list[Row]:
    """A step with groups of the given sizes, rows of all roles and samples mixed up."""
    draw = random.Random(seed)
    rows = []
    for g, size in enumerate(sizes):
        uid = f"sample-{g}"
        rows.append(Row(uid, "query", f"query {g}", unit(draw), truncated=True))
        if negatives:
            rows.append(Row(uid, "negative", f"negative {g}", unit(draw), truncated=True))
        for k in range(size):
            rows.append(Row(uid, "positive", f"positive {g}", unit(draw), truncated and (g + k) % 3 == 1))
    draw.shuffle(rows)
    return rows


def as_data(rows: list[Row]) -> DataProto:
    return DataProto.from_dict(
        {
            "embeddings": torch.tensor([row.vector for row in rows]),
            "truncated": torch.tensor([row.truncated for row in rows]),
            "response_length": torch.ones(len(rows), dtype=torch.int64),
            "trained": torch.tensor([row.role == "positive" for row in rows]),
        },
        {name: [getattr(row, name) for row in rows] for name in ("uid", "role", "text")},
    )


def reward(rows: list[Row], **kwargs: Any) -> RewardOutput:
    return HiddenRewardManager(**kwargs)(as_data(rows))


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def positives(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.role == "positive"]


def anchor(rows: list[Row], role: str, uid: str) -> Row:
    (found,) = [row for row in rows if row.role == role and row.uid == uid]
    return found


def siblings(rows: list[Row], row: Row) -> list[Row]:
    return [other for other in positives(rows) if other.uid == row.uid and other is not row]


def slow_clustering(rows: list[Row], row: Row) -> float:
    others = siblings(rows, row)
    return mean([dot(row.vector, other.vector) for other in others]) if others else 0.0


def slow_grace(rows: list[Row], row: Row, clustering: bool) -> dict[str, float]:
    """The raw terms of one row."""
    query = anchor(rows, "query", row.uid)
    supervised = any(r.role == "negative" for r in rows)
    terms = {"positive": dot(row.vector, query.vector)}
    if supervised:
        terms["negative"] = -dot(query.vector, anchor(rows, "negative", row.uid).vector)
    if not clustering:
        return terms
    terms["clustering"] = slow_clustering(rows, row)
    parts = []
    for uid in sorted({r.uid for r in rows} - {row.uid}):
        if supervised:
            parts.append(-max(dot(query.vector, r.vector) for r in positives(rows) if r.uid == uid))
        else:
            parts.append(dot(row.vector, anchor(rows, "query", uid).vector))
    terms["cross_group"] = mean(parts) if parts else 0.0
    return terms


def grace_weights(supervised: bool, with_scale: bool) -> dict[str, float]:
    scale = 10.0 if with_scale else 1.0
    sign = 1 if supervised else -1
    return {
        "positive": scale,
        "negative": scale,
        "clustering": 0.3 * scale,
        "cross_group": sign * 0.7 * scale,
    }


def slow_contrast(rows: list[Row], row: Row, temperature: float, masked: bool = True) -> float:
    query = anchor(rows, "query", row.uid)
    own = {query.text, row.text} if masked else set()
    candidates = [query]
    for other in rows:
        if other.role == "negative" or (other.role == "query" and other.uid != row.uid):
            if other.text not in own:
                candidates.append(other)
    logits = [dot(row.vector, c.vector) / temperature for c in candidates]
    top = max(logits)
    return logits[0] - top - math.log(math.fsum(math.exp(logit - top) for logit in logits))


def centred(rows: list[Row], values: list[float]) -> list[float]:
    """Each positive row's value minus the mean of its group."""
    main = positives(rows)
    result = []
    for row, value in zip(main, values, strict=True):
        group = [v for r, v in zip(main, values, strict=True) if r.uid == row.uid]
        result.append(value - mean(group))
    return result


def close(got: torch.Tensor, expected: list[float], atol: float) -> None:
    torch.testing.assert_close(got.double(), torch.tensor(expected, dtype=torch.float64), atol=atol, rtol=0)


def furthest(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("penalty", [True, False])
@pytest.mark.parametrize("clustering", [True, False])
@pytest.mark.parametrize("with_scale", [True, False])
@pytest.mark.parametrize("negatives", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_grace_equals_its_loop(layout: str, negatives: bool, with_scale: bool, clustering: bool, penalty: bool) -> None:
    """Raw terms to 1e-6, their sum to what float32 keeps of values of about 10, cut-off rows exactly -1."""
    rows = make_rows(LAYOUTS[layout], negatives, truncated=True)
    main = positives(rows)
    assert any(row.truncated for row in main)
    out = reward(rows, **WEIGHTS, with_scale=with_scale, enable_clustering=clustering, enable_length_penalty=penalty)
    raw = [slow_grace(rows, row, clustering) for row in main]
    weights = grace_weights(negatives, with_scale)
    assert set(out.columns) == {*raw[0], "before_penalty"}
    for name in raw[0]:
        close(out.columns[name] / weights[name], [terms[name] for terms in raw], atol=1e-6)
        assert out.metrics[f"{name}/raw"] == pytest.approx(mean([terms[name] for terms in raw]), abs=1e-6)
        weighted = weights[name] * mean([terms[name] for terms in raw])
        assert out.metrics[f"{name}/weighted"] == pytest.approx(weighted, abs=1e-5)
    total = [math.fsum(weights[name] * value for name, value in terms.items()) for terms in raw]
    close(out.columns["before_penalty"], total, atol=2e-5 if with_scale else 2e-6)
    final = [-1.0 if penalty and row.truncated else value for row, value in zip(main, total, strict=True)]
    close(out.scores, final, atol=2e-5 if with_scale else 2e-6)
    assert out.scores.dtype == torch.float32


def with_equal_texts(rows: list[Row]) -> list[Row]:
    """Some anchors get the text of another sample's query or positive, or of their own."""
    texts = {
        ("sample-1", "query"): "positive 0",
        ("sample-2", "negative"): "query 0",
        ("sample-0", "negative"): "positive 0",
        ("sample-2", "query"): "query 3",
        ("sample-3", "negative"): "query 3",
    }
    return [replace(row, text=texts.get((row.uid, row.role), row.text)) for row in rows]


@pytest.mark.parametrize("penalty", [0.0, 0.4, None])
@pytest.mark.parametrize("clustering", [True, False])
@pytest.mark.parametrize("same_texts", [True, False])
@pytest.mark.parametrize("negatives", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_infonce_equals_its_loop(
    layout: str, negatives: bool, same_texts: bool, clustering: bool, penalty: float | None
) -> None:
    rows = make_rows(LAYOUTS[layout], negatives, truncated=True)
    rows = with_equal_texts(rows) if same_texts else rows
    main = positives(rows)
    kwargs = {"enable_length_penalty": False} if penalty is None else {"length_penalty": penalty}
    out = reward(rows, objective="infonce", **WEIGHTS, enable_clustering=clustering, **kwargs)
    contrast = [slow_contrast(rows, row, 0.1) for row in main]
    close(out.columns["contrast"], contrast, atol=1e-5)
    total = contrast
    if clustering:
        cluster = [slow_clustering(rows, row) for row in main]
        close(out.columns["clustering"] * 0.1 / 0.3, cluster, atol=1e-6)
        assert out.metrics["clustering/raw"] == pytest.approx(mean(cluster), abs=1e-6)
        total = [c + 3.0 * k for c, k in zip(contrast, cluster, strict=True)]
    assert set(out.columns) == {"contrast", "before_penalty", *(["clustering"] if clustering else [])}
    close(out.columns["before_penalty"], total, atol=2e-5)
    final = list(total)
    for i, row in enumerate(main):
        if penalty is not None and row.truncated:
            final[i] = min(t for r, t in zip(main, total, strict=True) if r.uid == row.uid) - penalty
    close(out.scores, final, atol=2e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_infonce_contrast_to_1e_6_at_temperatures_that_float32_allows(temperature: float) -> None:
    rows = with_equal_texts(make_rows([3, 2, 4, 5]))
    out = reward(rows, objective="infonce", temperature=temperature)
    close(out.columns["contrast"], [slow_contrast(rows, r, temperature) for r in positives(rows)], atol=1e-6)


def test_false_negatives_in_the_example_matter() -> None:
    """Guards the tests above: with the equal texts left in, they would expect something else."""
    rows = with_equal_texts(make_rows([3, 2, 4, 5]))
    effect = {uid: 0.0 for uid in sorted({row.uid for row in rows})}
    for row in positives(rows):
        change = slow_contrast(rows, row, 0.1) - slow_contrast(rows, row, 0.1, masked=False)
        effect[row.uid] = max(effect[row.uid], change)
    assert min(effect["sample-0"], effect["sample-2"], effect["sample-3"]) > 0.01, effect


def test_infonce_where_every_other_candidate_is_a_false_negative_is_certain() -> None:
    rows = [replace(row, text="one text") for row in make_rows([2, 3])]
    out = reward(rows, objective="infonce", enable_clustering=False)
    assert out.scores.tolist() == [0.0] * 5


def test_a_cut_off_row_is_never_rewarded_above_its_group_with_infonce() -> None:
    rows = make_rows([4, 3, 5], truncated=True, seed=3)
    main = positives(rows)
    out = reward(rows, objective="infonce", temperature=0.1)
    for row, value in zip(main, out.scores.tolist(), strict=True):
        finished = [v for r, v in zip(main, out.scores.tolist(), strict=True) if r.uid == row.uid and not r.truncated]
        if row.truncated:
            assert value <= min(finished) - 1.0 + 1e-5


def with_other_negatives(rows: list[Row], seed: int) -> list[Row]:
    draw = random.Random(seed)
    return [replace(row, vector=unit(draw)) if row.role == "negative" else row for row in rows]


def test_negative_and_cross_group_terms_cancel_in_the_advantage_of_supervised_grace() -> None:
    rows = make_rows([3, 2, 4, 5])
    other = with_other_negatives(rows, seed=1)
    first, second = reward(rows, temperature=0.1), reward(other, temperature=0.1, cross_group_weight=5.0)
    assert furthest(first.scores.tolist(), second.scores.tolist()) > 1
    for out, step in ((first, rows), (second, other)):
        for name in ("negative", "cross_group"):
            assert furthest(centred(step, out.columns[name].tolist()), [0.0] * 14) < 1e-5
    advantages = [centred(rows, out.scores.tolist()) for out in (first, second)]
    assert furthest(*advantages) < 5e-5
    assert max(map(abs, advantages[0])) > 1


def test_negatives_reach_the_advantage_of_infonce() -> None:
    rows = make_rows([3, 2, 4, 5])
    other = with_other_negatives(rows, seed=1)
    advantages = [
        centred(step, reward(step, objective="infonce", temperature=0.1, enable_clustering=False).scores.tolist())
        for step in (rows, other)
    ]
    assert furthest(*advantages) > 0.1


def test_cross_group_term_reaches_the_advantage_of_unsupervised_grace() -> None:
    rows = make_rows([3, 2, 4, 5], negatives=False)
    advantages = [
        centred(rows, reward(rows, temperature=0.1, cross_group_weight=weight).scores.tolist()) for weight in (0.0, 1.0)
    ]
    assert furthest(*advantages) > 0.1


@pytest.mark.parametrize("negatives", [True, False])
@pytest.mark.parametrize("objective", ["grace", "infonce"])
def test_variance_shares_are_covariances_with_the_reward_and_sum_to_one(objective: str, negatives: bool) -> None:
    rows = make_rows([3, 2, 4, 5], negatives)
    out = reward(rows, objective=objective, **WEIGHTS)
    names = [name for name in out.columns if name != "before_penalty"]
    total = centred(rows, out.columns["before_penalty"].tolist())
    shares = {name: out.metrics[f"{name}/variance_share"] for name in names}
    for name in names:
        term = centred(rows, out.columns[name].tolist())
        expected = dot(total, term) / dot(total, total)
        assert shares[name] == pytest.approx(expected, abs=1e-5)
    assert math.fsum(shares.values()) == pytest.approx(1.0, abs=1e-5)
    if objective == "grace" and negatives:
        assert (shares["negative"], shares["cross_group"]) == pytest.approx((0.0, 0.0), abs=1e-5)


@pytest.mark.parametrize("objective", ["grace", "infonce"])
@pytest.mark.parametrize("size", [2, 3, 5, 6, 7, 8])
def test_variance_shares_of_identical_rows_are_zero(size: int, objective: str) -> None:
    """float32 rounds the mean of equal rewards; what is left of them must not be taken for variance."""
    for seed in range(12):
        rows = make_rows([size, size], seed=seed)
        same = {row.uid: row.vector for row in positives(rows)}
        rows = [replace(row, vector=same[row.uid]) if row.role == "positive" else row for row in rows]
        out = reward(rows, objective=objective, temperature=0.1)
        shares = {name: v for name, v in out.metrics.items() if name.endswith("variance_share")}
        assert shares == dict.fromkeys(shares, 0.0), f"seed {seed}"


@pytest.mark.parametrize("negatives", [True, False])
@pytest.mark.parametrize("objective", ["grace", "infonce"])
def test_permuting_the_rows_permutes_the_rewards(objective: str, negatives: bool) -> None:
    rows = make_rows([3, 1, 4, 2], negatives, truncated=True)
    first = reward(rows, objective=objective, **WEIGHTS)
    by_row = dict(zip(positives(rows), first.scores.tolist(), strict=True))
    for seed in range(5):
        moved = list(rows)
        random.Random(seed).shuffle(moved)
        second = reward(moved, objective=objective, **WEIGHTS)
        close(second.scores, [by_row[row] for row in positives(moved)], atol=2e-5)
        assert second.metrics == pytest.approx(first.metrics, abs=1e-4)


def test_samples_are_grouped_by_uid_and_not_by_text() -> None:
    rows = make_rows([2, 3])
    same = [replace(row, text="one text") for row in rows]
    assert torch.equal(reward(rows).scores, reward(same).scores)


def test_a_sample_without_a_query_is_an_error() -> None:
    with pytest.raises(ValueError, match="needs an anchor for every sample"):
        reward(positives(make_rows([2, 2])))


def test_a_missing_column_is_named() -> None:
    data = as_data(make_rows([2, 2])).select(["embeddings", "trained"], ["uid", "role", "text"])
    with pytest.raises(KeyError, match="truncated"):
        HiddenRewardManager()(data)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("temprature", "temperature"), ("cluster_weight", "clustering_weight"), ("zzz", None)],
)
def test_an_unknown_argument_lists_the_valid_ones_and_the_closest(wrong: str, meant: str | None) -> None:
    with pytest.raises(UserError) as error:
        HiddenRewardManager(**{wrong: 1.0})
    message = str(error.value)
    assert f"reward_model.reward_kwargs.{wrong} " in message
    assert (f"Did you mean {meant}?" in message) if meant else ("Did you mean" not in message)
    valid = message.split("Valid: ")[1].rstrip(".").split(", ")
    assert valid == list(HiddenRewardConfig.model_fields)


@pytest.mark.parametrize("temperature", [0.0, -0.1])
def test_a_temperature_that_is_not_positive_is_an_error(temperature: float) -> None:
    with pytest.raises(UserError, match=rf"temperature={temperature} must be above 0"):
        HiddenRewardManager(temperature=temperature)


@pytest.mark.parametrize("kwargs", [{"temperature": "warm"}, {"objective": "triplet"}, {"with_scale": "perhaps"}])
def test_a_value_of_the_wrong_type_names_its_argument(kwargs: dict[str, Any]) -> None:
    (name, value), *_ = kwargs.items()
    with pytest.raises(UserError, match=rf"reward_model.reward_kwargs.{name}='{value}'"):
        HiddenRewardManager(**kwargs)


@pytest.mark.parametrize("exclude", [True, False])
def test_the_place_where_pooling_starts_is_passed_on(exclude: bool) -> None:
    assert HiddenRewardManager(exclude_system_prompt=exclude).exclude_system_prompt is exclude


@pytest.mark.parametrize("negatives", [True, False])
def test_centred_rewards_compare_what_is_left_without_the_steps_mean(negatives: bool) -> None:
    rows = make_rows([3, 2, 4], negatives)
    centre = [mean([row.vector[k] for row in rows]) for k in range(WIDTH)]
    direction = [x / math.sqrt(dot(centre, centre)) for x in centre]
    left = []
    for row in rows:
        along = dot(row.vector, direction)
        rest = [x - along * c for x, c in zip(row.vector, direction, strict=True)]
        left.append(replace(row, vector=[x / math.sqrt(dot(rest, rest)) for x in rest]))
    expected = reward(left).scores
    torch.testing.assert_close(reward(rows, centre=True).scores, expected, atol=1e-5, rtol=0)
    assert (reward(rows).scores - expected).abs().max() > 1e-3
    assert torch.equal(reward(rows, centre=False).scores, reward(rows).scores)


@pytest.mark.parametrize("objective", ["grace", "infonce"])
def test_trained_queries_are_rewarded_as_positives_are_but_beside_their_own_negatives(objective: str) -> None:
    rows = make_rows([3, 2, 4])
    other = {"positive": "query", "query": "positive", "negative": "negative"}
    data = as_data([replace(row, role=other[row.role]) for row in rows])
    data.batch["trained"] = torch.tensor([row.role == "positive" for row in rows])
    kwargs = {"objective": objective, "enable_clustering": True, **WEIGHTS}
    if objective == "infonce":
        del kwargs["cross_group_weight"]
    found, same = HiddenRewardManager(**kwargs)(data), reward(rows, **kwargs)
    assert found.columns.keys() == same.columns.keys()
    negative = [-10 * dot(row.vector, anchor(rows, "negative", row.uid).vector) for row in positives(rows)]
    for name in found.columns.keys() - {"before_penalty"}:
        expected = negative if name == "negative" else same.columns[name].tolist()
        assert found.columns[name].tolist() == pytest.approx(expected, abs=1e-5)

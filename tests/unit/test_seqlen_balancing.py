"""Distributing rows over ranks and micro-batches: properties that must hold for every input."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl.utils.seqlen_balancing import balanced_partitions, pack_rows, partition_rows

COSTS = st.lists(st.integers(1, 500), max_size=40)


@st.composite
def grouped_rows(draw: st.DrawFn) -> tuple[list[str], list[int]]:
    """Group and cost of each row, rows of the groups mixed up."""
    rows = draw(st.lists(st.tuples(st.sampled_from("abcdefghij"), st.integers(1, 300)), min_size=1, max_size=40))
    return [group for group, _ in rows], [cost for _, cost in rows]


@st.composite
def prompted_rows(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    """Prompt, prompt tokens (the same for rows of a prompt) and response tokens of each row."""
    lengths = draw(st.lists(st.integers(1, 60), min_size=1, max_size=8))
    prompts = draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=40))
    responses = draw(st.lists(st.integers(1, 80), min_size=len(prompts), max_size=len(prompts)))
    return prompts, [lengths[p] for p in prompts], responses


def loads(parts: list[list[int]], costs: list[int]) -> list[int]:
    return [sum(costs[row] for row in part) for part in parts]


def tokens_of(batch: list[int], prompts: list[int], prompt_tokens: list[int], responses: list[int]) -> int:
    """Tokens of a micro-batch with each of its prompts counted once."""
    own = {prompts[row]: prompt_tokens[row] for row in batch}
    return sum(own.values()) + sum(responses[row] for row in batch)


@settings(max_examples=100, deadline=None)
@given(COSTS, st.integers(1, 9))
def test_partitions_hold_every_position_once_and_are_level(costs: list[int], num_parts: int) -> None:
    parts = balanced_partitions(costs, num_parts)
    assert len(parts) == num_parts
    assert sorted(i for part in parts for i in part) == list(range(len(costs)))
    assert max(loads(parts, costs)) - min(loads(parts, costs)) <= max(costs, default=0)


@pytest.mark.parametrize(
    ("costs", "num_parts", "expected"),
    [
        ([7, 1, 5, 3], 2, [[0, 1], [2, 3]]),
        ([4, 4, 4, 4], 2, [[0, 2], [1, 3]]),
        ([2, 9], 3, [[1], [0], []]),
        ([], 2, [[], []]),
    ],
)
def test_partitions_by_hand(costs: list[int], num_parts: int, expected: list[list[int]]) -> None:
    assert balanced_partitions(costs, num_parts) == expected


@settings(max_examples=100, deadline=None)
@given(grouped_rows(), st.integers(1, 12))
def test_rows_of_a_group_stay_together_and_ranks_are_level(rows: tuple[list[str], list[int]], num_parts: int) -> None:
    groups, costs = rows
    parts = partition_rows(groups, costs, num_parts)
    assert len(parts) == num_parts
    assert sorted(row for part in parts for row in part) == list(range(len(groups)))
    unit: Counter[object] = Counter()
    together = len(set(groups)) >= num_parts
    for row, cost in enumerate(costs):
        unit[groups[row] if together else row] += cost
    assert max(loads(parts, costs)) - min(loads(parts, costs)) <= max(unit.values())
    if together:
        places = {(groups[row], part) for part, members in enumerate(parts) for row in members}
        assert len(places) == len(set(groups))


def test_groups_are_split_only_where_there_are_fewer_than_ranks() -> None:
    assert partition_rows(["a", "b", "a", "b"], [10, 1, 10, 1], 2) == [[0, 2], [1, 3]]
    assert partition_rows(["a", "a", "a", "b"], [5, 4, 3, 2], 3) == [[0], [1], [2, 3]]


@settings(max_examples=100, deadline=None)
@given(prompted_rows(), st.one_of(st.none(), st.integers(1, 300)), st.one_of(st.none(), st.integers(1, 7)))
def test_micro_batches_keep_their_limits_and_are_as_full_as_these_allow(
    rows: tuple[list[int], list[int], list[int]], max_tokens: int | None, max_rows: int | None
) -> None:
    """That the next row would not have fitted holds only if a prompt is counted once per micro-batch."""
    prompts = rows[0]
    batches = pack_rows(*rows, max_tokens=max_tokens, max_rows=max_rows)
    assert sorted(row for batch in batches for row in batch) == list(range(len(prompts)))
    for batch in batches:
        within = max_tokens is None or tokens_of(batch, *rows) <= max_tokens
        assert within or len(batch) == 1
        assert max_rows is None or len(batch) <= max_rows
    for batch, following in zip(batches, batches[1:], strict=False):
        too_long = max_tokens is not None and tokens_of([*batch, following[0]], *rows) > max_tokens
        assert too_long or (max_rows is not None and len(batch) == max_rows)


@settings(max_examples=100, deadline=None)
@given(prompted_rows(), st.integers(1, 300))
def test_rows_of_a_prompt_are_next_to_each_other(rows: tuple[list[int], list[int], list[int]], max_tokens: int) -> None:
    line = [rows[0][row] for batch in pack_rows(*rows, max_tokens=max_tokens) for row in batch]
    changes = sum(1 for before, after in zip(line, line[1:], strict=False) if before != after)
    assert changes == len(set(line)) - 1


@pytest.mark.parametrize(
    ("max_tokens", "max_rows", "expected"),
    [
        (25, None, [[0, 2, 4], [1, 3]]),  # 10 + 3 x 5, then 10 + 2 x 5
        (24, None, [[0, 2], [4], [1, 3]]),
        (20, None, [[0, 2], [4], [1, 3]]),
        (19, None, [[0], [2], [4], [1], [3]]),
        (45, None, [[0, 2, 4, 1, 3]]),
        (44, None, [[0, 2, 4, 1], [3]]),
        (None, 2, [[0, 2], [4, 1], [3]]),
        (None, None, [[0, 2, 4, 1, 3]]),
        (1, None, [[0], [2], [4], [1], [3]]),  # each row alone has more than max_tokens
    ],
)
def test_a_prompt_is_counted_once_per_micro_batch(
    max_tokens: int | None, max_rows: int | None, expected: list[list[int]]
) -> None:
    prompts = ["x", "y", "x", "y", "x"]
    assert pack_rows(prompts, [10] * 5, [5] * 5, max_tokens, max_rows) == expected


def test_no_rows_make_no_micro_batch() -> None:
    assert pack_rows([], [], [], max_tokens=10) == []

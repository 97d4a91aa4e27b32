"""DataProto: what each operation does to the values of its rows."""

import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from verl.protocol import DataProto, object_array, response_mask

COUNT = 5


def sample(count: int = COUNT, first: int = 0) -> DataProto:
    """Row i holds the number first + i in every column."""
    numbers = list(range(first, first + count))
    return DataProto.from_dict(
        {
            "ids": torch.tensor([[n, n + 100, n + 200] for n in numbers], dtype=torch.int64),
            "weight": torch.tensor([n / 2 for n in numbers], dtype=torch.float32),
        },
        {"uid": [f"row {n}" for n in numbers], "turns": [[n, -n] for n in numbers]},
        {"step": 3},
    )


def check(rows: DataProto, numbers: list[int]) -> None:
    """That `rows` holds exactly these rows of `sample`, in every column."""
    assert len(rows) == len(numbers)
    assert rows.batch["ids"].tolist() == [[n, n + 100, n + 200] for n in numbers]
    assert rows.batch["weight"].tolist() == [n / 2 for n in numbers]
    assert list(rows.non_tensor_batch["uid"]) == [f"row {n}" for n in numbers]
    assert list(rows.non_tensor_batch["turns"]) == [[n, -n] for n in numbers]


def test_from_dict_keeps_values_dtypes_and_meta() -> None:
    rows = sample()
    check(rows, [0, 1, 2, 3, 4])
    assert (rows.batch["ids"].dtype, rows.batch["weight"].dtype) == (torch.int64, torch.float32)
    assert rows.meta_info == {"step": 3}
    bare = DataProto.from_dict({"a": torch.tensor([1, 2])})
    assert (bare.non_tensor_batch, bare.meta_info) == ({}, {})


@pytest.mark.parametrize(
    ("tensors", "columns", "message"),
    [
        ({}, {}, "one common number of rows"),
        ({"a": torch.zeros(2), "b": torch.zeros(3, 2)}, {}, r"\{'a': 2, 'b': 3\}"),
        ({"a": torch.zeros(2)}, {"uid": ["x", "y", "z"]}, "'uid' has 3 rows, the tensors have 2"),
    ],
)
def test_columns_of_different_lengths_are_an_error(
    tensors: dict[str, torch.Tensor], columns: dict[str, list[str]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        DataProto.from_dict(tensors, columns)


@pytest.mark.parametrize(
    "values",
    [
        [[1, 2], [3, 4]],
        [(1, 2), (3, 4)],
        [["a"], ["b"]],
        [[[1], [2]], [[3], [4]]],
        [{"a": 1}, {"a": 2}],
        ["xy", "zw"],
        [[], []],
        [None, [1]],
    ],
)
def test_object_columns_are_one_dimensional_whatever_they_hold(values: list[Any]) -> None:
    array = object_array(values)
    assert (array.shape, array.dtype) == ((2,), np.dtype(object))
    assert [array[0], array[1]] == values
    assert type(array[0]) is type(values[0])


def test_a_column_of_equal_length_arrays_is_one_dimensional() -> None:
    values = [np.array([1, 2]), np.array([3, 4])]
    array = object_array(values)
    assert array.shape == (2,)
    assert [a.tolist() for a in array] == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("index", "numbers"),
    [
        (slice(1, 3), [1, 2]),
        (slice(None, None, 2), [0, 2, 4]),
        (slice(-2, None), [3, 4]),
        (slice(None, None, -1), [4, 3, 2, 1, 0]),
        (slice(3, 3), []),
        ([4, 0, 0], [4, 0, 0]),
        ([-1], [4]),
        ([], []),
        ([True, False, False, True, False], [0, 3]),
        (np.array([2, 1]), [2, 1]),
        (np.array([False, True, True, False, False]), [1, 2]),
        (np.array([0, 0, 1, 1, 0], dtype=object) == 1, [2, 3]),
        (np.zeros(COUNT, dtype=bool), []),
        (torch.tensor([3, 1]), [3, 1]),
        (torch.tensor([True, False, False, False, True]), [0, 4]),
        (torch.tensor([], dtype=torch.int64), []),
    ],
)
def test_rows_are_taken_by_slice_list_mask_and_tensor(index: Any, numbers: list[int]) -> None:
    taken = sample()[index]
    check(taken, numbers)
    assert taken.meta_info == {"step": 3}


def test_a_position_that_is_not_there_is_an_error() -> None:
    with pytest.raises(IndexError):
        sample()[[5]]


def test_select_keeps_the_named_columns_only() -> None:
    rows = sample()
    part = rows.select(["weight"], ["uid"])
    assert (list(part.batch.keys()), list(part.non_tensor_batch)) == (["weight"], ["uid"])
    assert part.batch["weight"].data_ptr() == rows.batch["weight"].data_ptr()
    assert list(part.non_tensor_batch["uid"]) == list(rows.non_tensor_batch["uid"])
    assert part.meta_info == {"step": 3}
    assert list(rows.select(["ids"]).non_tensor_batch) == []
    check(rows, [0, 1, 2, 3, 4])
    with pytest.raises(KeyError):
        rows.select(["nothing"])


def test_union_joins_the_columns_of_both() -> None:
    rows = sample()
    extra = DataProto.from_dict({"score": torch.arange(COUNT) * 2.0}, {"role": list("abcde")}, {"seed": 9})
    joined = rows.union(extra)
    check(joined, [0, 1, 2, 3, 4])
    assert joined.batch["score"].tolist() == [0.0, 2.0, 4.0, 6.0, 8.0]
    assert "".join(joined.non_tensor_batch["role"]) == "abcde"
    assert joined.meta_info == {"step": 3, "seed": 9}
    assert "score" not in rows.batch.keys()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (DataProto.from_dict({"score": torch.zeros(4)}), "5 rows with 4 rows"),
        (DataProto.from_dict({"weight": torch.zeros(5)}), r"\['weight'\]"),
        (DataProto.from_dict({"score": torch.zeros(5)}, {"uid": list("abcde")}), r"\['uid'\]"),
    ],
)
def test_union_of_what_does_not_fit_is_an_error(other: DataProto, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample().union(other)


@pytest.mark.parametrize("counts", [[2, 0, 1, 3, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 4], np.array([0, 1, 0, 2, 1])])
def test_repeat_puts_the_copies_side_by_side(counts: Any) -> None:
    check(sample().repeat(counts), [n for n in range(COUNT) for _ in range(counts[n])])


def test_repeat_with_too_few_counts_is_an_error() -> None:
    with pytest.raises(ValueError):
        sample().repeat([1, 2])


def test_concat_keeps_the_order_and_undoes_a_cut() -> None:
    rows = sample()
    check(DataProto.concat([rows[:2], rows[2:3], rows[3:]]), [0, 1, 2, 3, 4])
    check(DataProto.concat([sample(2, first=8), sample(1, first=1)]), [8, 9, 1])
    first = sample(1)
    first.meta_info["step"] = 8
    assert DataProto.concat([first, rows]).meta_info == {"step": 8}


def test_pickle_round_trip_keeps_everything() -> None:
    rows = sample()[[3, 1]]
    back = pickle.loads(pickle.dumps(rows))
    check(back, [3, 1])
    assert back.meta_info == {"step": 3}
    assert back.batch["ids"].dtype == torch.int64


def test_moving_to_a_device_keeps_the_values() -> None:
    moved = sample().to("cpu")
    check(moved, [0, 1, 2, 3, 4])
    assert moved.batch["ids"].device.type == "cpu"


def test_require_names_what_is_missing() -> None:
    rows = sample()
    rows.require("ids", "uid")
    with pytest.raises(KeyError, match=r"\['embeddings', 'role'\]"):
        rows.require("ids", "embeddings", "uid", "role")


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"a": torch.zeros(3, 4)}, 48),
        ({"a": torch.zeros(3, 4), "b": torch.zeros(3, dtype=torch.int64)}, 48 + 24),
        ({"a": torch.zeros(2, 5, dtype=torch.bfloat16), "b": torch.zeros(2, dtype=torch.bool)}, 20 + 2),
        ({"a": torch.zeros(0, 5)}, 0),
    ],
)
def test_num_bytes_counts_the_tensors(tensors: dict[str, torch.Tensor], expected: int) -> None:
    assert DataProto.from_dict(tensors).num_bytes() == expected


@pytest.mark.parametrize("make", [lambda draw: draw.randint(1, 9), lambda draw: draw.choice([0, 1, 9])])
def test_response_mask_equals_its_loop(make: Callable[[random.Random], int]) -> None:
    draw = random.Random(0)
    lengths = [make(draw) for _ in range(20)]
    rows = DataProto.from_dict(
        {"responses": torch.zeros(20, 9, dtype=torch.int64), "response_length": torch.tensor(lengths)}
    )
    mask = response_mask(rows)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[t < length for t in range(9)] for length in lengths]

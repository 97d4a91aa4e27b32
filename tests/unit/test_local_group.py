"""The worker group in this process: what reaches the worker, what comes back, and what is left afterwards."""

import os

import pytest
import torch
import torch.distributed as dist

from verl.protocol import DataProto
from verl.single_controller.dispatch import Dispatch, register
from verl.single_controller.local_group import LocalWorkerGroup
from verl.single_controller.worker import Worker


class Doubler(Worker):
    def __init__(self, place, factor: int) -> None:
        super().__init__(place)
        self.factor = factor

    @register(Dispatch.ONE_TO_ALL)
    def places(self) -> tuple[int, int, bool]:
        return self.rank, self.world_size, dist.is_initialized()

    @register(Dispatch.DP_COMPUTE_PROTO, columns=("number", "role"), optional_columns=("extra",))
    def double(self, rows: DataProto) -> DataProto:
        self.seen = sorted([*rows.batch.keys(), *rows.non_tensor_batch])
        return DataProto.from_dict({"number": rows.batch["number"] * self.factor})

    @register(Dispatch.ONE_TO_ALL)
    def columns_seen(self) -> list[str]:
        return self.seen

    @register(Dispatch.DP_STREAM_PROTO, columns=("number",))
    def count(self, rows: DataProto, start: int):
        for number in rows.batch["number"].tolist():
            yield 1
            start += number
        yield DataProto.from_dict({"total": torch.tensor([start])})

    def unregistered(self) -> None: ...

    @register(Dispatch.ONE_TO_ALL)
    def fail(self) -> None:
        raise ZeroDivisionError("in the worker")


ROWS = DataProto.from_dict(
    {"number": torch.tensor([1, 2, 3]), "unused": torch.zeros(3, 100)}, {"role": ["a", "b", "c"]}
)


@pytest.fixture
def group():
    group = LocalWorkerGroup(Doubler, (10,), "cpu")
    yield group
    group.shutdown()


def test_the_worker_is_rank_0_of_1_in_a_process_group(group):
    assert group.call(Doubler.places) == (0, 1, True)


def test_only_the_declared_columns_are_sent_and_counted(group):
    (doubled,) = group.map_rows(Doubler.double, ROWS, [[2, 0]])
    assert doubled.batch["number"].tolist() == [30, 10]
    assert group.call(Doubler.columns_seen) == ["number", "role"]
    assert group.bytes_moved == 2 * 8 + 2 * 8
    group.map_rows(Doubler.double, ROWS.with_tensors(extra=torch.zeros(3)), [[0]])
    assert group.call(Doubler.columns_seen) == ["extra", "number", "role"]


def test_a_declared_column_that_the_rows_lack_is_named(group):
    with pytest.raises(KeyError, match="rows lack .*role"):
        group.map_rows(Doubler.double, DataProto.from_dict({"number": torch.ones(2)}), [[0, 1]])


def test_progress_is_passed_on_before_the_result(group):
    told = []
    (total,) = group.stream_rows(Doubler.count, ROWS, [[0, 1, 2]], told.append, 100)
    assert told == [1, 1, 1] and total.batch["total"].tolist() == [106]


def test_a_method_that_is_not_registered_or_of_another_mode_is_refused(group):
    with pytest.raises(TypeError, match="unregistered is not registered"):
        group.call(Doubler.unregistered)
    with pytest.raises(TypeError, match="double is registered for DP_COMPUTE_PROTO"):
        group.call(Doubler.double)


def test_an_error_of_the_worker_is_raised_as_it_is(group):
    with pytest.raises(ZeroDivisionError, match="in the worker"):
        group.call(Doubler.fail)


def test_nothing_is_left_of_it(monkeypatch):
    monkeypatch.setenv("RANK", "7")
    before, threads = dict(os.environ), torch.get_num_threads()
    torch.set_num_threads(1)
    group = LocalWorkerGroup(Doubler, (1,), "cpu")
    assert os.environ["RANK"] == "0"
    group.shutdown()
    assert dict(os.environ) == before and not dist.is_initialized() and torch.get_num_threads() == 1
    torch.set_num_threads(threads)

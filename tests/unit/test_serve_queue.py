"""The server's queue: who shares a batch, who is next, and what is dropped."""

import threading

import pytest

from verl.encoder.record import EncodedText
from verl.serve.batching import EndedError, Job, Options, Queue, QueueFullError

PLAIN, THINKING = Options(False, 0, 0), Options(True, 8, 0)


def job(name: str, count: int, options: Options = PLAIN) -> Job:
    return Job([f"{name}{i}" for i in range(count)], options)


def filled(*jobs: Job, most: int = 100, batch: int = 8) -> Queue:
    queue = Queue(most, batch)
    for each in jobs:
        queue.put(each)
    return queue


def test_a_short_request_is_done_in_its_first_batch_beside_long_ones():
    long, other, short = job("a", 20), job("b", 20), job("c", 2)
    queue = filled(long, other, short)
    assert queue.take() == {long: ["a0", "a1", "a2"], other: ["b0", "b1", "b2"], short: ["c0", "c1"]}
    assert len(queue) == 34 and not short.waiting


def test_requests_with_other_options_take_turns():
    first, other = job("a", 20), job("t", 20, THINKING)
    queue = filled(first, other)
    order = [next(iter(queue.take())) for _ in range(4)]
    assert order == [first, other, first, other]


def test_more_requests_than_a_batch_holds_are_taken_in_order():
    jobs = [job(f"{i}-", 2) for i in range(12)]
    queue = filled(*jobs)
    assert list(queue.take()) == jobs[:8]
    # Those that were begun went behind those that were not.
    assert list(queue.take()) == [*jobs[8:], *jobs[:4]]


def test_every_text_is_taken_once_whatever_the_sizes():
    jobs = [job(f"{i}-", size, options) for i, size in enumerate((1, 30, 7, 12)) for options in (PLAIN, THINKING)]
    queue = filled(*jobs, most=1000)
    taken: dict[Job, list[str]] = {}
    while len(queue):
        batch = queue.take()
        assert len({each.options for each in batch}) == 1 and sum(map(len, batch.values())) <= 8
        for each, texts in batch.items():
            taken.setdefault(each, []).extend(texts)
    assert taken == {each: list(each.texts) for each in jobs}


def test_a_text_that_occurs_twice_waits_once_and_is_given_twice():
    twice = Job(["x", "y", "x"], PLAIN)
    assert list(filled(twice).take()[twice]) == ["x", "y"]
    x, y = (EncodedText(None, name, 1, 0, False) for name in "xy")
    twice.take_in({"y": y})
    assert not twice.done.done()
    twice.take_in({"x": x})
    assert twice.done.result() == [x, y, x]


def test_a_full_queue_refuses_a_request_whole():
    queue = filled(job("a", 6), most=8)
    with pytest.raises(QueueFullError):
        queue.put(job("b", 3))
    queue.put(job("c", 2))
    assert len(queue) == 8


def test_what_has_not_begun_is_forgotten():
    gone, stays = job("a", 20), job("b", 3)
    queue = filled(gone, stays)
    queue.take()
    assert queue.forget(gone) == 15 and len(queue) == 0 and queue.forget(gone) == 0
    gone.done.cancel()
    gone.take_in({text: EncodedText(None, "", 1, 0, False) for text in gone.texts})
    gone.fail(EndedError())
    assert gone.done.cancelled()


def test_after_the_end_what_waits_is_still_given_and_nothing_is_taken_in():
    waits = job("a", 10)
    queue = filled(waits)
    assert queue.end() == [waits]
    with pytest.raises(EndedError):
        queue.put(job("b", 1))
    assert len(queue.take()[waits]) == 8 and len(queue.take(expected=5)[waits]) == 2 and queue.take() is None


def test_an_empty_queue_waits_for_a_request_and_for_those_that_are_expected():
    queue, given = Queue(100, 8), []
    thread = threading.Thread(target=lambda: given.append(queue.take(expected=2)))
    thread.start()
    first, second = job("a", 1), job("b", 1)
    with queue._change:  # both at once
        queue.put(first)
        queue.put(second)
    thread.join(10)
    assert list(given[0]) == [first, second]

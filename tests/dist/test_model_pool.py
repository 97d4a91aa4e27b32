"""An encoder of two processes gives what one process gives, and ends clearly when one of them fails."""

import os
import signal

import numpy as np
import pytest

from verl import GraceEncoder
from verl.workers.rollout.base import RolloutError

TEXTS = [f"text number {i} of the pool" * (1 + i % 3) for i in range(20)]
SAMPLED = {"max_new_tokens": 8, "temperature": 1.0, "return_rationales": True}


@pytest.fixture(scope="module")
def pooled(tiny_folder, tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    with GraceEncoder(tiny_folder, device="cpu", num_processes=2, store=store) as encoder:
        yield encoder


def test_two_processes_give_the_vectors_and_rationales_of_one(pooled, tiny_folder):
    alone = GraceEncoder(tiny_folder, device="cpu")
    expected, rationales = alone.encode(TEXTS, **SAMPLED)
    vectors, same = pooled.encode(TEXTS, **SAMPLED)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert same == rationales
    assert pooled.model.size == alone.model.size
    for name in ("rationales_made", "vectors_made", "generated_tokens", "forward_tokens", "truncated"):
        assert getattr(pooled.usage, name) == getattr(alone.usage, name), name
    # Again from the store, without thinking, and one text alone: less than there are processes.
    np.testing.assert_allclose(pooled.encode(TEXTS, **SAMPLED)[0], expected, atol=1e-5)
    assert pooled.usage.rationales_made == len(TEXTS)
    plain = pooled.encode(TEXTS[0], think=False)
    np.testing.assert_allclose(plain, alone.encode(TEXTS[0], think=False), atol=1e-5)


def test_an_error_in_a_process_comes_with_its_traceback_and_ends_the_pool(pooled, monkeypatch):
    prompts = pooled._render(["a text"])
    prompts[0].ids[0] = 10**6  # an id that the model does not know
    monkeypatch.setattr(pooled, "_render", lambda texts: prompts)
    with pytest.raises(RolloutError, match=r"(?s)process \d of the encoder failed:.*Traceback.*IndexError"):
        pooled.encode(["a text"], max_new_tokens=4)
    with pytest.raises(RolloutError, match="processes have ended, after a failure or close"):
        pooled.encode(["a text"], max_new_tokens=4)


def test_a_killed_process_is_an_error_that_says_so_and_leaves_none_behind(tiny_folder):
    with GraceEncoder(tiny_folder, device="cpu", num_processes=2) as encoder:
        os.kill(encoder.model._processes[1].pid, signal.SIGKILL)
        with pytest.raises(RolloutError, match="process 1 of the encoder ended with exit code -9"):
            encoder.encode(TEXTS, **SAMPLED)
    assert not any(process.is_alive() for process in encoder.model._processes)


def test_groups_that_do_not_divide_are_refused(tiny_folder):
    with pytest.raises(ValueError, match="tensor_parallel_size=2 does not divide the 3 processes"):
        GraceEncoder(tiny_folder, device="cpu", num_processes=3, tensor_parallel_size=2)

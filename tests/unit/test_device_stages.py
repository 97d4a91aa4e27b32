"""Errors of a device's stages on a CPU: those about memory name a way out, all others are left alone."""

import pytest
import torch

from verl.config import MicroBatchLimit
from verl.workers.device_stages import DeviceStages, OutOfDeviceMemory
from verl.workers.fsdp_workers import _smaller

REMEDY = "Lower actor_rollout_ref.actor.ppo_max_token_len_per_gpu."


def raised_in_a_stage(error: Exception) -> Exception:
    with pytest.raises((RuntimeError, ValueError)) as caught:
        with DeviceStages(torch.device("cpu")).stage("updating", REMEDY):
            raise error
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory while mapping the KV cache"),
        RuntimeError("CUDA Error: Out Of Memory at cumem_allocator.cpp:139"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    ],
    ids=["RuntimeError", "capitals", "OutOfMemoryError"],
)
def test_an_error_about_memory_names_the_stage_and_the_remedy(error):
    found = raised_in_a_stage(error)
    assert type(found) is OutOfDeviceMemory
    assert str(found) == f"out of GPU memory while updating. {REMEDY}\n({error})"
    assert found.__cause__ is error


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError("CUDA out of memory")], ids=repr)
def test_other_errors_are_left_alone(error):
    assert raised_in_a_stage(error) is error


def test_a_cpu_has_no_free_gpu_memory_to_report():
    stages = DeviceStages(torch.device("cpu"))
    with stages.stage("updating", REMEDY):
        pass
    assert stages.take_free() == {}


@pytest.fixture
def gpu(monkeypatch):
    """The stages of a GPU of which 5 GiB are free, then 3, then 2; and how often its cache was emptied."""
    free, emptied = iter([5, 3, 2]), []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (next(free) * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    return DeviceStages(torch.device("cuda", 0)), emptied


def test_free_gpu_memory_is_reported_once_as_it_was_after_each_stage(gpu):
    stages, _ = gpu
    with stages.stage("waking the cache", REMEDY):
        pass
    assert stages.take_free() == {"free_gb/waking_the_cache": 3.0}
    assert stages.take_free() == {}


def test_out_of_memory_on_a_gpu_says_what_was_free_before_the_stage(gpu):
    stages, _ = gpu
    with pytest.raises(OutOfDeviceMemory, match=r"while updating: 5\.0 GiB were free before it\. Lower"):
        with stages.stage("updating", REMEDY):
            raise torch.OutOfMemoryError("CUDA out of memory")
    assert stages.take_free() == {}


def test_only_a_gpu_has_a_cache_to_give_back(gpu):
    stages, emptied = gpu
    DeviceStages(torch.device("cpu")).release_cache()
    assert emptied == []
    stages.release_cache()
    assert emptied == [1]


def test_a_forward_that_does_not_fit_names_the_limit_that_it_has():
    by_tokens, by_rows = MicroBatchLimit(1000, None), MicroBatchLimit(None, 4)
    assert _smaller("ref.log_prob", by_tokens) == "Lower actor_rollout_ref.ref.log_prob_max_token_len_per_gpu."
    assert _smaller("actor.ppo", by_rows) == "Lower actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu."

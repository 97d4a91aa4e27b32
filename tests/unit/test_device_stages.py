"""Errors of a device's stages on a CPU: those about memory name a way out, all others are left alone."""

import pytest
import torch

from verl.workers.device_stages import DeviceStages, OutOfDeviceMemory

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

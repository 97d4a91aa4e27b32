"""The states of a rollout engine: every transition of `Rollout`'s table, on an engine that only records its calls."""

import pytest
import torch

from verl.workers.rollout.base import EngineState, Response, Rollout, RolloutError, finish

ANSWER = [Response([7], [-0.5], truncated=False)]
WEIGHTS = [("a", torch.zeros(1)), ("b", torch.ones(1))]


class RecordingEngine(Rollout):
    """Two weights and no model; its sleep keeps the weights aside or drops them."""

    name = "recording"

    def __init__(self, state: EngineState = EngineState.AWAKE, keeps_weights: bool = True) -> None:
        super().__init__(["a", "b"])
        self.state = state
        self.keeps_weights = keeps_weights
        self.calls: list[str] = []

    def wake_weights(self):
        self.calls.append("wake_weights")

    def sleep(self, keep_weights=False):
        self.calls.append("sleep")
        self.state = EngineState.ASLEEP if self.keeps_weights else EngineState.STALE

    def held(self, name, tensor, most_columns):
        return []

    def _generate(self, prompts, temperatures, max_new_tokens, seeds):
        self.calls.append("generate")
        yield dict(enumerate(ANSWER))

    def _load(self, weights):
        for name, _ in weights:
            self.calls.append(f"load {name}")

    def _score(self, prompts):
        self.calls.append("score")
        return [[-0.25]]

    def _wake_cache(self):
        self.calls.append("wake_cache")


def use(engine: RecordingEngine) -> None:
    assert finish(engine.generate([[1]], [1.0], 4, [0])) == ANSWER
    assert engine.score([[1, 2]]) == [[-0.25]]


def test_an_engine_starts_awake():
    class Fresh(RecordingEngine):
        def __init__(self) -> None:
            Rollout.__init__(self, ["a", "b"])
            self.calls = []

    engine = Fresh()
    assert engine.state is EngineState.AWAKE and engine.weight_names == {"a", "b"}
    use(engine)
    assert engine.calls == ["generate", "score"]


@pytest.mark.parametrize("state", EngineState)
def test_new_weights_make_any_engine_hold_the_policys_but_not_ready(state):
    engine = RecordingEngine(state)
    engine.update_weights(WEIGHTS)
    assert engine.calls == ["wake_weights", "load a", "load b"]
    assert engine.state is EngineState.WEIGHTS_ONLY


@pytest.mark.parametrize("state", [EngineState.WEIGHTS_ONLY, EngineState.ASLEEP, EngineState.AWAKE])
def test_waking_up_maps_the_weights_and_then_the_cache(state):
    engine = RecordingEngine(state)
    engine.wake_up()
    assert engine.calls == ["wake_weights", "wake_cache"]
    assert engine.state is EngineState.AWAKE
    use(engine)


def test_a_stale_engine_does_not_wake_up():
    engine = RecordingEngine(EngineState.STALE)
    with pytest.raises(RolloutError, match="engine recording has no weights to wake up with; sync them first"):
        engine.wake_up()
    assert engine.calls == [] and engine.state is EngineState.STALE


@pytest.mark.parametrize("state", EngineState)
def test_any_engine_can_be_marked_stale(state):
    engine = RecordingEngine(state)
    engine.mark_stale()
    assert engine.state is EngineState.STALE and engine.calls == []


@pytest.mark.parametrize("state", [EngineState.WEIGHTS_ONLY, EngineState.ASLEEP, EngineState.STALE])
def test_an_engine_that_is_not_awake_refuses_at_once_and_computes_nothing(state):
    engine = RecordingEngine(state)
    refusal = f"engine recording must not generate while it is {state.name}: {state.value}"
    with pytest.raises(RolloutError, match=refusal):
        engine.generate([[1]], [1.0], 4, [0])
    with pytest.raises(RolloutError, match=refusal):
        engine.score([[1, 2]])
    assert engine.calls == [] and engine.state is state


def test_a_sleep_that_keeps_the_weights_ends_in_waking_up():
    engine = RecordingEngine(keeps_weights=True)
    engine.sleep()
    assert engine.state is EngineState.ASLEEP
    with pytest.raises(RolloutError, match="ASLEEP"):
        engine.score([[1, 2]])
    engine.wake_up()
    assert engine.calls == ["sleep", "wake_weights", "wake_cache"]
    use(engine)


def test_a_sleep_that_drops_the_weights_ends_in_a_sync():
    engine = RecordingEngine(keeps_weights=False)
    engine.sleep()
    with pytest.raises(RolloutError, match="no weights to wake up with"):
        engine.wake_up()
    assert engine.calls == ["sleep"] and engine.state is EngineState.STALE
    engine.update_weights(WEIGHTS)
    engine.wake_up()
    use(engine)


def breaks_off():
    yield WEIGHTS[0]
    raise OSError("the sender is gone")


@pytest.mark.parametrize(
    ("weights", "error", "message", "loaded"),
    [
        (breaks_off, OSError, "the sender is gone", ["load a"]),
        (lambda: WEIGHTS[1:], ValueError, "1 weights were not sent, among them 'a'", ["load b"]),
        (lambda: [], ValueError, "2 weights were not sent, among them 'a'", []),
        (lambda: [*WEIGHTS, WEIGHTS[0]], ValueError, "'a' was sent twice", ["load a", "load b"]),
        (lambda: [WEIGHTS[0], ("c", torch.zeros(1))], ValueError, "'c' is not one of the engine's", ["load a"]),
    ],
    ids=["breaks off", "one missing", "none", "twice", "unknown"],
)
def test_an_update_that_fails_halfway_leaves_the_engine_stale(weights, error, message, loaded):
    engine = RecordingEngine()
    with pytest.raises(error, match=message):
        engine.update_weights(weights())
    assert engine.state is EngineState.STALE
    assert engine.calls == ["wake_weights", *loaded]
    with pytest.raises(RolloutError, match="no weights to wake up with"):
        engine.wake_up()


def test_an_engine_that_finds_no_memory_for_new_weights_is_stale():
    class Full(RecordingEngine):
        def wake_weights(self):
            raise RuntimeError("out of memory")

    engine = Full()
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.update_weights(WEIGHTS)
    assert engine.state is EngineState.STALE

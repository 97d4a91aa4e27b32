"""The plan of a CPU run against what the allocator gives out in it: real weights, real updates."""

from pathlib import Path

import pytest
from measured import peak_of

from verl.config import ActorConfig, MicroBatchLimit, ModelConfig
from verl.models.load import load_causal_lm
from verl.models.policy import PolicyModel
from verl.planning.trace import DEPTHS, Row, Setup, Trace, extended, in_own_process, planned_rows
from verl.workers.actor import Actor

pytestmark = pytest.mark.usefixtures("process_group")

# Groups of four; more of them than a micro-batch takes, so that the second one meets the first one's gradients.
TINY = tuple(Row(60, 40, group // 4) for group in range(16))
SMOL = tuple(Row(48, 32, group // 4) for group in range(8))


def a_setup(folder: Path, rows: tuple[Row, ...], tokens: int, num_layers: int | None = None, **changes) -> Setup:
    model = ModelConfig(path=str(folder), enable_gradient_checkpointing=changes.pop("checkpointing", False))
    actor = ActorConfig(ppo_max_token_len_per_gpu=tokens, **changes.pop("actor", {}))
    values = {"embeds": True, "trains_embeddings": False, "keeps_forward": False, "num_layers": num_layers, **changes}
    return Setup(model, actor, "cpu", 1, rows, rows, MicroBatchLimit(tokens, None), **values)


def peaks(trace: Trace) -> dict[str, int]:
    return {name: sum(trace.stages[name].peak.values()) for name in ("score", "update")}


def measured(setup: Setup) -> dict[str, int]:
    return {stage: peak_of(lambda stage=stage: prepared(setup, stage)) for stage in ("score", "update")}


def prepared(setup: Setup, stage: str):
    """A worker's policy and optimizer, ready for the stage, which is returned."""
    rows = planned_rows(setup.rows, setup)
    lm = load_causal_lm(setup.model.path)
    if setup.model.enable_gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    actor = Actor(PolicyModel(lm), setup.actor, 1.0, 24, total_steps=10, one_mini_batch=setup.keeps_forward)

    def score() -> None:
        actor.score(rows, setup.score_limit, setup.embeds, train_anchors=setup.trains_embeddings)

    def update() -> None:
        if setup.keeps_forward:
            score()
        actor.update(rows, 1)

    if stage == "score":
        return score
    actor.update(rows, 1)
    return update


def test_peaks_of_the_tiny_model(tiny_folder):
    both_measured = {"embedding_grad_share": 0.5, "embedding_grad_every": 1}
    setups = [
        a_setup(tiny_folder, TINY, 600),
        a_setup(tiny_folder, TINY, 600, checkpointing=True),
        a_setup(tiny_folder, TINY, 5000, keeps_forward=True),
        a_setup(tiny_folder, TINY, 600, trains_embeddings=True, actor=both_measured),
        a_setup(tiny_folder, TINY, 600, actor={"entropy_coeff": 0.1}),
    ]
    for setup, trace in zip(setups, in_own_process(setups), strict=True):
        found = measured(setup)
        assert peaks(trace) == pytest.approx(found, rel=0.1), (setup, peaks(trace), found)


def test_peaks_of_smollm2_from_the_line_through_two_of_fewer_layers(repo):
    folder = repo / "models" / "SmolLM2-135M-Instruct"
    if not (folder / "model.safetensors").is_file():
        pytest.skip("SmolLM2 is not there; python3 -m verl.get_demo_model")
    setups = [a_setup(folder, SMOL, 300, layers) for layers in DEPTHS]
    trace = extended(DEPTHS, in_own_process(setups), 30)
    found = measured(setups[0])
    assert peaks(trace) == pytest.approx(found, rel=0.1), (peaks(trace), found)

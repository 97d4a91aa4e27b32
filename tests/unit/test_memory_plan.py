"""The plan of a run's memory: how it is put together, what it refuses, and what it advises."""

import dataclasses
import re
from pathlib import Path

import pytest
import scale
from family_models import tiny
from steps import tiny_policy
from tiny import tiny_config
from transformers import Qwen2Config

import verl.plan
from verl.config import ActorConfig, ModelConfig, RunConfig
from verl.errors import UserError
from verl.models.policy import PolicyModel
from verl.planning import trace as tracing
from verl.planning.plan import GIB, Machines, MemoryPlan, Work, make_plan
from verl.planning.remedies import remedies, with_settings
from verl.planning.trace import DEPTHS, Row, Setup, Trace, extended, in_own_process, planned_rows, traced
from verl.trainer.memory_plan import remedy_lines
from verl.workers.micro_batches import MicroBatchLimit, micro_batches

WORK = Work(num_anchors=2, embeds=True, trains_embeddings=False, trains_anchors=False)


def a_setup(folder: Path, layers: int | None = None, checkpointing: bool = True, world_size: int = 4, **actor) -> Setup:
    rows = tuple(Row(20, 30, group) for group in range(6))
    model = ModelConfig(path=str(folder), enable_gradient_checkpointing=checkpointing)
    return Setup(
        model, ActorConfig(ppo_max_token_len_per_gpu=150, **actor), "cuda", world_size, rows, rows, (150, None),
        embeds=True, trains_embeddings=False, keeps_forward=False, num_layers=layers,
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory) -> Path:
    """One for this file, in place of the user's."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "grace" / "plans"


@pytest.fixture(scope="module")
def traces(tiny_folder) -> dict[tuple[int, bool], Trace]:
    """By number of layers, and whether checkpointing is on."""
    cases = [(layers, checkpointing) for checkpointing in (True, False) for layers in (*DEPTHS, 9)]
    found = in_own_process([a_setup(tiny_folder, *case) for case in cases])
    return dict(zip(cases, found, strict=True))


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_line_through_two_traces_is_the_trace_of_more_layers(traces, checkpointing):
    few, more, full = (traces[layers, checkpointing] for layers in (*DEPTHS, 9))
    found = extended(DEPTHS, [few, more], 9)
    for count in ("parameters", "trained", "largest_weight"):
        assert getattr(found, count) == getattr(full, count)
    for name, stage in full.stages.items():
        assert sum(found.stages[name].peak.values()) == sum(stage.peak.values()), name
        assert found.stages[name].wire == pytest.approx(stage.wire), name


def test_moments_that_take_turns_at_being_the_peak_are_lines_of_their_own(tmp_path):
    """In this shape the peak between layers has logits from five layers on, and the root's gradients before."""
    Qwen2Config(
        hidden_size=5120, num_attention_heads=40, num_key_value_heads=8, intermediate_size=27648, vocab_size=152064,
        num_hidden_layers=64,
    ).save_pretrained(tmp_path)  # fmt: skip
    rows = tuple(Row(683, 1365, group) for group in range(4))
    setup = dataclasses.replace(a_setup(tmp_path), rows=rows, score_rows=rows[:1], score_limit=(4096, None))
    setup = dataclasses.replace(setup, actor=ActorConfig(ppo_max_token_len_per_gpu=4096))
    few, more, full = in_own_process([dataclasses.replace(setup, num_layers=layers) for layers in (*DEPTHS, 6)])
    peaks = {
        name: {key: sum(parts.values()) for key, parts in stage.peaks.items()} for name, stage in full.stages.items()
    }
    found = extended(DEPTHS, [few, more], 6)
    for name, stage in found.stages.items():
        assert {key: sum(parts.values()) for key, parts in stage.peaks.items()} == pytest.approx(peaks[name], rel=0.01)


def test_parts_are_what_they_are_by_count(traces):
    """Shards, gradients and moments of float32 weights of which a rank has a quarter; traffic of bfloat16 ones."""
    trace = traces[9, True]
    config = tiny_config()
    hidden, inner, heads_size = 64, 128, 32
    layer = 2 * hidden**2 + 2 * hidden * heads_size + 3 * hidden * inner + 2 * hidden + hidden + 2 * heads_size
    root = config.vocab_size * hidden + hidden
    assert trace.parameters == 9 * layer + root
    update = trace.stages["update"]
    # Every dimension is a multiple of four, but for the vocabulary of 259 tokens, which is padded.
    padded = 9 * layer + -(-config.vocab_size // 4) * 4 * hidden + hidden
    assert trace.stages["score"].peak["shards"] == padded
    moments = max(parts["optimizer"] for parts in update.peaks.values())
    assert moments == pytest.approx(2 * padded, rel=0.01)
    # The first of two forwards gathers the root too, and each forward and each backward pass the layers.
    score = trace.stages["score"]
    assert score.sent(1)["all-gather"] == pytest.approx(2 * 0.75 * padded, rel=0.01)
    assert score.sent(3)["all-gather"] - score.sent(2)["all-gather"] == pytest.approx(2 * 0.75 * 9 * layer, rel=0.01)
    assert update.sent(5)["reduce-scatter"] == pytest.approx(5 * 4 * 0.75 * padded, rel=0.01)
    # What docs/scale.md counts with leaves out norms and biases, 1 % here, and the vocabulary's padding.
    shape = scale.Shape(hidden, 9, 4, 2, inner, config.vocab_size, tied=True)
    for stage, expected in ((score, scale.scoring_bytes(shape, 4)), (update, scale.update_bytes(shape, 4))):
        another = sum(stage.sent(3).values()) - sum(stage.sent(2).values())
        assert another == pytest.approx(expected, rel=0.015)
    assert sum(trace.stages["sync"].wire.values()) == pytest.approx(scale.sync_bytes(shape, 4), rel=0.015)


def test_adapters_have_the_only_gradients_and_moments_and_are_their_own_reference(tiny_folder):
    values = {
        "data": {"train_batch_size": 8, "max_prompt_length": 40, "max_response_length": 40},
        "actor_rollout_ref": {
            "model": {"path": str(tiny_folder)}, "rollout": {"name": "hf", "n": 4},
            "actor": {"ppo_mini_batch_size": 8, "ppo_max_token_len_per_gpu": 200, "use_kl_loss": True},
        },
    }  # fmt: skip
    machines, plans = Machines(80 * GIB, 4), {}
    for rank in (0, 4):
        values["actor_rollout_ref"]["model"]["lora_rank"] = rank
        plans[rank] = make_plan(RunConfig.model_validate(values), machines, WORK)
    whole, adapted = (plans[rank].stages["update"] for rank in (0, 4))
    # A and B of 7 layers of sizes 64, 32 and 128, three times; float32, a quarter on each rank.
    trained = 3 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    assert adapted["gradient shards"] == pytest.approx(4 * trained / 4, rel=0.05)
    assert adapted["optimizer"] == pytest.approx(2 * 4 * trained / 4, rel=0.05)
    assert adapted["gradient shards"] + adapted["optimizer"] < 0.2 * (whole["gradient shards"] + whole["optimizer"])
    assert "reference" in whole and "reference" not in adapted
    assert plans[4].checkpoint == 16 * trained < plans[0].checkpoint


def test_a_plan_finds_no_config_of_a_model_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="a plan needs its config.json"):
        traced(a_setup(tmp_path / "none"), 3)


def test_a_model_whose_sizes_depend_on_numbers_is_refused(tmp_path):
    from transformers import MixtralConfig

    MixtralConfig(
        vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    ).save_pretrained(tmp_path)  # fmt: skip
    setup = a_setup(tmp_path, 2)
    # A loop over the experts, each with the tokens that chose it.
    model = setup.model.model_copy(update={"override_config": {"experts_implementation": "eager"}})
    with pytest.raises(tracing.PlanError, match="depend on the numbers"):
        in_own_process([dataclasses.replace(setup, model=model)])


def test_rows_that_share_no_prompt_count_each_in_full(process_group, monkeypatch):
    """On a GPU the prompt of a group is computed for each of its rows."""
    policy = tiny_policy()
    setup = a_setup(Path())
    rows = planned_rows([Row(30, 10, group=0) for _ in range(8)], setup)
    limit = MicroBatchLimit(160, None)
    shared = [micro.packed.input_ids.shape[1] for micro in micro_batches(rows, limit, policy)]
    assert shared == [30 + 8 * 10]
    monkeypatch.setattr(PolicyModel, "shares_prompts", property(lambda _: False))
    apart = [micro.packed.input_ids.shape[1] for micro in micro_batches(rows, limit, policy)]
    assert apart == [160, 160]


def a_run(folder: Path, **changes) -> RunConfig:
    """Of a model of random numbers that is wide enough to fill small GPUs."""
    values = {
        "data": {"max_prompt_length": 50, "max_response_length": 50, "train_batch_size": 8},
        "actor_rollout_ref": {
            "model": {"path": str(folder)},
            "actor": {"ppo_mini_batch_size": 8, "ppo_max_token_len_per_gpu": 1600},
            "rollout": {"name": "vllm", "n": 4},
        },
        "trainer": {"diag_freq": -1},
    }
    return with_settings(RunConfig.model_validate(values), tuple(changes.items()))


def test_a_trace_is_kept_and_used_again(tiny_folder, cache, monkeypatch):
    setup = a_setup(tiny_folder)
    before = set(cache.glob("*"))
    first = traced(setup, 3)
    assert len(set(cache.glob("*")) - before) == 1
    monkeypatch.setattr(tracing, "ProcessPoolExecutor", None)  # a second trace would need it
    assert traced(setup, 3) == first
    with pytest.raises(TypeError):
        traced(dataclasses.replace(setup, world_size=2), 3)


def test_offload_moves_weights_and_moments_out_of_the_other_stages(tiny_folder):
    machines = Machines(GIB, 4)
    stays = make_plan(a_run(tiny_folder), machines, WORK)
    moves = make_plan(
        a_run(tiny_folder, **{
            "actor_rollout_ref.actor.fsdp_config.param_offload": True,
            "actor_rollout_ref.actor.fsdp_config.optimizer_offload": True,
        }), machines, WORK,
    )  # fmt: skip
    assert {"shards", "optimizer"} <= stays.stages["generation"].keys()
    assert moves.stages["generation"].keys() == {"engine weights", "KV cache"}
    assert "optimizer" in stays.stages["score"] and "optimizer" not in moves.stages["score"]
    assert stays.stages["update"] == moves.stages["update"]
    assert (stays.moved, moves.host["steps"] > stays.host["steps"]) == (0, True)
    assert sum(stays.stages["generation"].values()) - sum(moves.stages["generation"].values()) == sum(
        stays.stages["generation"][name] for name in ("shards", "optimizer")
    )


def test_loading_takes_shards_and_a_small_model_or_whole_ones_where_weights_are_converted(tiny_folder, tmp_path):
    plan = make_plan(a_run(tiny_folder), Machines(GIB, 4), WORK)
    assert plan.stages["start"] == {"shards": plan.stages["score"]["shards"]}
    # By hand: embedding, untied or not, two layers of width 64 with 4 heads and 2 key heads and an MLP of 64, a norm.
    layer = 2 * (64 * 64) + 64 + 2 * (64 * 32 + 32) + 3 * 64 * 64 + 2 * 64
    assert plan.host["start"] == 4 * 4 * (256 * 64 + 2 * layer + 64)
    neox = tiny(tmp_path, "gpt_neox")
    converted = make_plan(a_run(tmp_path), Machines(GIB, 4), WORK)
    assert converted.host["start"] == 4 * 4 * sum(weight.numel() for weight in neox.parameters())
    assert converted.stages["start"]["whole layer"] > 4 * sum(p.numel() for p in neox.gpt_neox.layers[0].parameters())


def test_what_does_not_fit_is_named_with_settings_that_make_it_fit(tiny_folder):
    config = a_run(tiny_folder, **{"actor_rollout_ref.rollout.gpu_memory_utilization": 0.1})
    plan = make_plan(config, Machines(GIB, 2), WORK)
    # Between the needs of the update with all tokens and with half of them.
    update = sum(plan.stages["update"].values())
    machines = Machines(int(0.8 * update / 0.9), 2)
    plan = make_plan(config, machines, WORK)
    assert plan.misfits() == ["update"]
    found = remedies(config, machines, WORK, plan)
    text = "\n".join(remedy_lines(plan, found))
    assert text.startswith("does not fit: update.")
    assert "it fits with actor_rollout_ref.actor.ppo_max_token_len_per_gpu=800" in text
    for change in found:
        if change.settings:
            changed = a_run(
                tiny_folder, **{"actor_rollout_ref.rollout.gpu_memory_utilization": 0.1, **dict(change.settings)}
            )
            assert not make_plan(changed, machines, WORK).misfits(), change


def test_nothing_that_helps_is_said_too():
    plan = MemoryPlan(Machines(GIB, 1), {"start": {"whole model": 2 * GIB}}, 0, None, 1, {}, 0, {}, 0, 0, {})
    text = list(remedy_lines(plan, []))
    assert text[0].startswith("does not fit: start.") and "smaller model" in text[1]


def test_the_program_tells_plan_and_exit_code(tiny_folder, capsys):
    common = [
        f"actor_rollout_ref.model.path={tiny_folder}", "data.train_files=none.parquet", "data.max_prompt_length=50",
        "data.max_response_length=50", "actor_rollout_ref.rollout.name=vllm", "--gpus", "2",
    ]  # fmt: skip
    assert verl.plan.main([*common, "--gpu", "1"]) == 0
    said = capsys.readouterr().out
    assert "everything fits" in said and re.search(r"planned for +1 x 2 GPU\(s\) of 1 GiB", said)
    for stage in ("start", "sync", "generation", "score", "update", "reference"):
        assert re.search(rf"^  {stage} +\d+\.\d GiB = ", said, re.MULTILINE), stage
    assert verl.plan.main([*common, "--gpu", "80", "data.max_prompt=3"]) == 2
    assert "unknown key data.max_prompt" in capsys.readouterr().err

"""The plan of a run's memory: how it is put together, what it refuses, and what it advises."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
import scale
import torch
from family_models import tiny
from peft import LoraConfig
from steps import tiny_policy
from tiny import tiny_config, tiny_model
from transformers import Qwen2Config

import verl.plan
from verl.config import ActorConfig, MicroBatchLimit, ModelConfig, RunConfig
from verl.errors import UserError
from verl.models.attention import ATTENTION
from verl.models.policy import PolicyModel
from verl.planning import trace as tracing
from verl.planning.plan import GIB, Machines, MemoryPlan, Work, lines, make_plan
from verl.planning.remedies import remedies, with_settings
from verl.planning.trace import DEPTHS, Row, Setup, Trace, extended, in_own_process, planned_rows, traced
from verl.trainer.memory_plan import remedy_lines
from verl.workers.micro_batches import micro_batches
from verl.workers.rollout.decoding import Decoding, Forward

WORK = Work(num_anchors=2, embeds=True, trains_embeddings=False, trains_anchors=False)


def a_setup(folder: Path, layers: int | None = None, checkpointing: bool = True, world_size: int = 4, **actor) -> Setup:
    rows = tuple(Row(20, 30, group) for group in range(6))
    model = ModelConfig(path=str(folder), enable_gradient_checkpointing=checkpointing)
    return Setup(
        model, ActorConfig(ppo_max_token_len_per_gpu=150, **actor), "cuda", world_size, rows, rows,
        MicroBatchLimit(150, None), embeds=True, trains_embeddings=False, keeps_forward=False, num_layers=layers,
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
    limit = MicroBatchLimit(4096, None)
    setup = dataclasses.replace(a_setup(tmp_path), rows=rows, score_rows=rows[:1], score_limit=limit)
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


def test_an_update_that_measures_both_gradients_holds_both(tiny_folder):
    setup = a_setup(tiny_folder, 3)
    one, both = in_own_process([setup, dataclasses.replace(setup, trains_embeddings=True)])
    held = [max(parts.get("gradient shards", 0) for parts in t.stages["update"].peaks.values()) for t in (one, both)]
    assert held[1] == pytest.approx(2 * held[0], rel=0.1)
    assert both.pinned["gradient shards"] == 2 * one.pinned["gradient shards"] > 0


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


def test_a_plan_refuses_an_adapter_as_training_does(tiny_folder, tmp_path):
    LoraConfig(r=2, base_model_name_or_path=str(tiny_folder)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a LoRA adapter. To go on training it, set model.path="):
        traced(a_setup(tmp_path), 3)


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


def test_a_model_whose_keys_and_values_differ_in_size_has_a_plan(tmp_path):
    """No flash attention computes it, and training takes sdpa."""
    tiny(tmp_path, "deepseek_v3")
    assert make_plan(a_run(tmp_path), Machines(GIB, 4), WORK).stages["update"]["activations"] > 0


def test_without_rationales_there_is_no_engine_and_rows_are_texts(tiny_folder):
    machines = Machines(GIB, 4)
    writes = a_run(tiny_folder, **{"actor_rollout_ref.actor.fsdp_config.param_offload": True})
    bare = make_plan(with_settings(writes, (("data.think", False),)), machines, WORK)
    one_token = (("data.max_response_length", 1), ("actor_rollout_ref.rollout.n", 1))
    short = make_plan(with_settings(writes, one_token), machines, WORK)
    assert bare.stages.keys() == short.stages.keys() - {"sync", "generation"}
    assert not any("engine weights" in parts for parts in bare.stages.values())
    assert (bare.cached_tokens, bare.longest_row) == (None, writes.data.max_prompt_length)
    assert bare.tokens["written"] == 0 and bare.wire.keys() == short.wire.keys() - {"sync"}
    # Weights go there and back for two stages of three.
    assert 3 * bare.moved == 2 * short.moved > 0
    assert bare.rows < short.rows and not any("KV cache" in what for what, _ in lines(bare))


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


BY_TORCH = {
    section: {
        "actor_rollout_ref.actor.strategy": "fsdp2",
        f"actor_rollout_ref.{section}.fsdp_config.offload_policy": True,
    }
    for section in ("actor", "ref")
}
WITH_REFERENCE = {"algorithm.use_kl_in_reward": True}


def test_shards_that_torch_keeps_on_the_host_are_not_on_the_gpu_at_the_start(tiny_folder):
    def start(*changes: dict) -> dict[str, int]:
        settings = {key: value for change in changes for key, value in change.items()}
        return make_plan(a_run(tiny_folder, **settings), Machines(GIB, 4), WORK).stages["start"]

    shards = start()["shards"]
    assert start(BY_TORCH["actor"]) == {}
    assert start(WITH_REFERENCE) == {"shards": shards, "reference": shards}
    # Loaded on the GPU, and gone before the policy comes.
    assert start(WITH_REFERENCE, {"actor_rollout_ref.ref.fsdp_config.param_offload": True}) == {"shards": shards}
    assert start(WITH_REFERENCE, BY_TORCH["actor"]) == {"reference": shards}
    assert start(WITH_REFERENCE, BY_TORCH["actor"], BY_TORCH["ref"]) == {}


def test_pinned_host_memory_is_rounded_up_to_powers_of_two(tiny_folder):
    """torch pins moments that are moved and what its offload policy keeps, but not weights that are moved."""
    ranks, diagnoses = 4, {"trainer.diag_freq": 50}
    parts = [-(-len(weight) // ranks) * weight[0].numel() * 4 for weight in tiny_model().parameters()]
    pinned = sum(2 ** math.ceil(math.log2(part)) for part in parts)
    assert pinned > sum(parts)

    def planned(*changes: dict) -> MemoryPlan:
        settings = {key: value for change in changes for key, value in change.items()}
        return make_plan(a_run(tiny_folder, **settings), Machines(GIB, ranks), WORK)

    # An engine's weights wait there only where there is room.
    assert planned().host["steps"] == 0
    fsdp = "actor_rollout_ref.actor.fsdp_config"
    assert planned({f"{fsdp}.param_offload": True}).host["steps"] == ranks * sum(parts)
    assert planned({f"{fsdp}.optimizer_offload": True}).host["steps"] == ranks * 2 * pinned
    assert planned(diagnoses, BY_TORCH["ref"]).host["steps"] == ranks * pinned
    moments = planned().stages["generation"]["optimizer"]
    assert planned(BY_TORCH["actor"]).host["steps"] == ranks * (2 * pinned + moments)


def test_the_hf_engine_has_the_cache_that_it_allocates_and_only_while_it_generates(tiny_folder):
    engine = {"actor_rollout_ref.rollout.name": "hf", "actor_rollout_ref.rollout.dtype": "float32"}
    plan = make_plan(a_run(tiny_folder, **engine), Machines(GIB, 4), WORK)
    # 8 samples, each with 4 rationales and 2 anchors, on 4 ranks; prompts of 50 tokens that have no common beginning.
    rows = 12
    lm = tiny_model()
    lm.set_attn_implementation(ATTENTION)
    decoding = Decoding(
        Forward(lm), [[row] * 50 for row in range(rows)], [1.0] * rows, [50] * rows, range(rows), (), 1024, None
    )
    with torch.no_grad():
        assert sum(len(ended) for ended in decoding.run()) == rows
    cached = [one for caches in (decoding.cache._keys, decoding.cache._values) for one in caches.values()]
    assert plan.stages["generation"]["KV cache"] == sum(one.trunk.nbytes + one.rows.nbytes for one in cached)
    assert plan.cached_tokens == rows * 100
    assert {name for name, parts in plan.stages.items() if "KV cache" in parts} == {"generation"}
    engine["actor_rollout_ref.rollout.max_num_seqs"] = 5
    fewer = make_plan(a_run(tiny_folder, **engine), Machines(GIB, 4), WORK)
    assert fewer.cached_tokens == 5 * 100


def test_a_cache_of_the_hf_engine_that_does_not_fit_is_of_fewer_rows(tiny_folder):
    config = a_run(tiny_folder, **{
        "actor_rollout_ref.rollout.name": "hf", "actor_rollout_ref.rollout.max_num_seqs": 4096,
        "data.train_batch_size": 2048,
    })  # fmt: skip
    generation = sum(make_plan(config, Machines(GIB, 2), WORK).stages["generation"].values())
    machines = Machines(int(0.8 * generation / 0.9), 2)
    plan = make_plan(config, machines, WORK)
    assert plan.misfits() == ["generation"]
    found = [dict(change.settings) for change in remedies(config, machines, WORK, plan)]
    assert {"actor_rollout_ref.rollout.max_num_seqs": 2048} in found


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory) -> Path:
    """Of a model whose weights are much more than the activations of short rows."""
    folder = tmp_path_factory.mktemp("deep")
    Qwen2Config(
        vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=24, num_attention_heads=4,
        num_key_value_heads=2,
    ).save_pretrained(folder)  # fmt: skip
    return folder


ONE_ROW = {"actor_rollout_ref.actor.ppo_max_token_len_per_gpu": 100}


def test_an_untrained_model_that_does_not_fit_is_kept_on_the_host_or_not_asked(deep_folder):
    """Of the diagnoses alone, beside a policy that torch keeps on the host."""
    config = a_run(
        deep_folder, **BY_TORCH["actor"], **ONE_ROW,
        **{"trainer.diag_freq": 50, "actor_rollout_ref.rollout.gpu_memory_utilization": 0.8},
    )  # fmt: skip
    # A tenth of the GPU may not be filled.
    machines = Machines(sum(make_plan(config, Machines(GIB, 1), WORK).stages["reference"].values()), 1)
    plan = make_plan(config, machines, WORK)
    assert plan.misfits() == ["reference"]
    found = [dict(change.settings) for change in remedies(config, machines, WORK, plan)]
    assert {"trainer.diag_log_likelihood": False} in found
    assert BY_TORCH["ref"] in found
    kept = make_plan(with_settings(config, tuple(BY_TORCH["ref"].items())), machines, WORK)
    assert kept.host["steps"] > plan.host["steps"]


def test_a_reference_that_leaves_too_little_memory_waits_on_the_host(deep_folder):
    offload = {f"actor_rollout_ref.actor.fsdp_config.{name}_offload": True for name in ("param", "optimizer")}
    config = a_run(deep_folder, **WITH_REFERENCE, **ONE_ROW, **offload)
    update = make_plan(config, Machines(GIB, 1), WORK).stages["update"]
    machines = Machines(int((sum(update.values()) - update["reference"] / 2) / 0.9), 1)
    plan = make_plan(config, machines, WORK)
    assert plan.misfits() == ["update"]
    found = [dict(change.settings) for change in remedies(config, machines, WORK, plan)]
    assert {"actor_rollout_ref.ref.fsdp_config.param_offload": True} in found
    assert BY_TORCH["ref"] in found
    assert not any("trainer.diag_log_likelihood" in settings for settings in found)


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


@pytest.mark.parametrize(("strategy", "proposed"), [("fsdp", True), ("fsdp2", False)])
def test_offloading_is_proposed_unless_torchs_policy_does_it_already(strategy, proposed, monkeypatch):
    """offload_policy=True alone does nothing with strategy=fsdp."""
    monkeypatch.setattr("verl.planning.remedies._fits", lambda *_: True)
    actor = {"strategy": strategy, "fsdp_config": {"offload_policy": True}}
    config = RunConfig.model_validate({"actor_rollout_ref": {"actor": actor}})
    plan = MemoryPlan(Machines(GIB, 1), {"update": {"activations": 2 * GIB}}, 0, 1, 1, {}, 0, {}, 0, 0, {})
    found = [dict(change.settings) for change in remedies(config, plan.machines, WORK, plan)]
    assert ({"actor_rollout_ref.actor.fsdp_config.param_offload": True} in found) is proposed
    assert (BY_TORCH["actor"] in found) is proposed


def test_nothing_that_helps_is_said_too():
    plan = MemoryPlan(Machines(GIB, 1), {"start": {"whole model": 2 * GIB}}, 0, 1, 1, {}, 0, {}, 0, 0, {})
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

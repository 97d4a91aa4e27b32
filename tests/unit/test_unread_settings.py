"""Settings that nothing reads: an error where they were meant to change a result, a note where they were not."""

import re
from functools import reduce
from typing import Any

import pytest

from verl.algorithm.loss import KlController
from verl.config import HiddenRewardConfig, RunConfig
from verl.config_checks import build_config
from verl.config_fields import nested, walk_fields
from verl.errors import UserError
from verl.step_schedule import StepSchedule
from verl.unread_settings import READERS, REWARD_READERS, start_notes, unread_settings

ACTOR, ROLLOUT, REF = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.ref"


def config_of(settings: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(nested(settings))


# A setting, and what makes it count.
CASES: list[tuple[str, Any, dict[str, Any]]] = [
    ("trainer.resume_from_path", "global_step_3", {"trainer.resume_mode": "resume_path"}),
    ("trainer.max_actor_ckpt_to_keep", 2, {"trainer.save_freq": 5}),
    ("trainer.report", True, {"trainer.save_freq": -1}),
    ("custom_reward_function.name", "score", {"custom_reward_function.path": "mine.py"}),
    ("custom_reward_function.reward_kwargs", {"a": 1}, {"custom_reward_function.path": "mine.py"}),
    (f"{ACTOR}.optim.min_lr_ratio", 0.1, {f"{ACTOR}.optim.warmup_style": "cosine"}),
    (f"{ACTOR}.optim.num_cycles", 1.0, {f"{ACTOR}.optim.warmup_style": "cosine"}),
    (f"{ACTOR}.optim.lr_warmup_steps_ratio", 0.1, {f"{ACTOR}.optim.lr_warmup_steps": -1}),
    (f"{ACTOR}.clip_ratio", 0.3, {f"{ACTOR}.clip_ratio_high": None}),
    (f"{ACTOR}.ppo_max_token_len_per_gpu", 99, {f"{ACTOR}.use_dynamic_bsz": True}),
    (f"{ACTOR}.ppo_micro_batch_size_per_gpu", 3, {f"{ACTOR}.use_dynamic_bsz": None}),
    (f"{ROLLOUT}.log_prob_max_token_len_per_gpu", 99, {f"{ROLLOUT}.log_prob_use_dynamic_bsz": True}),
    (f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu", 3, {f"{ROLLOUT}.log_prob_use_dynamic_bsz": None}),
    (f"{REF}.log_prob_max_token_len_per_gpu", 99, {f"{REF}.log_prob_use_dynamic_bsz": True}),
    (f"{REF}.log_prob_micro_batch_size_per_gpu", 3, {f"{REF}.log_prob_use_dynamic_bsz": None}),
    (f"{ACTOR}.kl_loss_coef", 0.1, {f"{ACTOR}.use_kl_loss": True}),
    (f"{ACTOR}.kl_loss_type", "k1", {f"{ACTOR}.use_kl_loss": True}),
    ("algorithm.kl_penalty", "k3", {"algorithm.use_kl_in_reward": True}),
    ("algorithm.kl_ctrl.kl_coef", 0.1, {"algorithm.use_kl_in_reward": True}),
    ("algorithm.kl_ctrl.type", "adaptive", {"algorithm.use_kl_in_reward": True}),
    ("algorithm.kl_ctrl.horizon", 5, {"algorithm.kl_ctrl.type": "adaptive", "algorithm.use_kl_in_reward": True}),
    ("algorithm.kl_ctrl.target_kl", 0.5, {"algorithm.kl_ctrl.type": "adaptive", "algorithm.use_kl_in_reward": True}),
    ("algorithm.gamma", 0.9, {"algorithm.adv_estimator": "reinforce_plus_plus"}),
    (f"{ROLLOUT}.val_kwargs.temperature", 0.7, {f"{ROLLOUT}.val_kwargs.do_sample": True}),
    ("data.seed", 5, {"data.shuffle": True}),
    ("data.negatives_per_query", 2, {"reward_model.reward_manager": "hidden"}),
    ("actor_rollout_ref.model.lora_alpha", 32, {"actor_rollout_ref.model.lora_rank": 8}),
    ("actor_rollout_ref.model.target_modules", ["q_proj"], {"actor_rollout_ref.model.lora_rank": 8}),
    ("trainer.merge_lora", True, {"actor_rollout_ref.model.lora_adapter_path": "adapter"}),
    (f"{ROLLOUT}.anchor_temperature", 0.1, {"reward_model.reward_manager": "hidden"}),
    (f"{ACTOR}.embedding_grad_share", 0.5, {"reward_model.reward_manager": "mine.py:Mine"}),
    (f"{ACTOR}.embedding_grad_every", 5, {"reward_model.reward_manager": "mine.py:Mine"}),
    ("trainer.contrastive_warmup_steps", 5, {"reward_model.reward_manager": "mine.py:Mine"}),
    ("trainer.contrastive_steps_between", 5, {"reward_model.reward_manager": "mine.py:Mine"}),
    (
        "data.contrastive_batch_size",
        32,
        {"trainer.contrastive_steps_between": 1, "reward_model.reward_manager": "mine.py:Mine"},
    ),
    ("trainer.resume_force", True, {"trainer.resume_mode": "auto"}),
    ("trainer.diag_texts", 9, {"trainer.diag_freq": 5}),
    ("trainer.diag_log_likelihood", False, {"trainer.diag_freq": 5}),
    (f"{ROLLOUT}.gpu_memory_utilization", 0.3, {f"{ROLLOUT}.name": "auto"}),
    (f"{ROLLOUT}.enforce_eager", False, {f"{ROLLOUT}.name": "auto"}),
    (f"{ROLLOUT}.enable_chunked_prefill", False, {f"{ROLLOUT}.name": "vllm"}),
    (f"{ROLLOUT}.free_cache_engine", False, {f"{ROLLOUT}.name": "vllm"}),
    (f"{ROLLOUT}.load_format", "auto", {f"{ROLLOUT}.name": "vllm"}),
    (f"{ROLLOUT}.max_num_batched_tokens", 99, {f"{ROLLOUT}.name": "vllm"}),
    (f"{ROLLOUT}.max_model_len", 9999, {f"{ROLLOUT}.name": "vllm"}),
    (f"{ROLLOUT}.engine_kwargs", {"vllm": {"a": 1}}, {f"{ROLLOUT}.name": "vllm"}),
]
# In which nothing reads them.
WITHOUT: dict[str, Any] = {
    "trainer.resume_mode": "disable", "trainer.save_freq": 0, "trainer.diag_freq": -1, f"{ROLLOUT}.name": "hf",
    "data.shuffle": False, "reward_model.reward_manager": "naive", f"{ACTOR}.optim.lr_warmup_steps": 4,
    f"{ACTOR}.clip_ratio_low": 0.1, f"{ACTOR}.clip_ratio_high": 0.1,
}  # fmt: skip
BY_ROWS = {f"{ACTOR}.use_dynamic_bsz": False, f"{ROLLOUT}.log_prob_use_dynamic_bsz": False}
BY_ROWS |= {f"{REF}.log_prob_use_dynamic_bsz": False}
BY_TOKENS = dict.fromkeys(BY_ROWS, True)


@pytest.mark.parametrize(("key", "value", "companion"), CASES)
def test_a_setting_without_effect_is_an_error_and_with_its_companion_it_is_none(key, value, companion):
    sizes = BY_TOKENS if "micro_batch_size" in key else BY_ROWS if "max_token_len" in key else {}
    (line,) = unread_settings(config_of({**WITHOUT, **sizes, key: value}))
    assert line.startswith(f"{key}={value} has no effect: it is read with ") and "Set that, or leave" in line
    assert list(unread_settings(config_of({**WITHOUT, **sizes, **companion, key: value}))) == []


def test_every_key_of_the_table_has_a_case_here_and_exists():
    assert {key for reader in READERS for key in reader.keys} == {key for key, _, _ in CASES} | set(ADDED_TO_POLICY)
    assert {key for key, _, _ in CASES} <= dict(walk_fields(RunConfig)).keys()
    assert {key for reader in REWARD_READERS for key in reader.keys} <= HiddenRewardConfig.model_fields.keys()


def test_a_weight_of_zero_says_the_same_as_a_term_that_is_off():
    off = {f"{ACTOR}.kl_loss_coef": 0, "algorithm.kl_ctrl.kl_coef": 0, f"{ROLLOUT}.val_kwargs.temperature": 0}
    assert list(unread_settings(config_of(off))) == []


def test_an_adaptive_coefficient_of_zero_would_stay_zero():
    kl = {"algorithm.use_kl_in_reward": True, "algorithm.kl_ctrl.type": "adaptive", "algorithm.kl_ctrl.kl_coef": 0}
    (line,) = unread_settings(config_of(kl))
    assert "algorithm.kl_ctrl.type=adaptive has no effect: it is read with algorithm.kl_ctrl.kl_coef above 0" in line


@pytest.mark.parametrize(
    ("kwargs", "name", "companion"),
    [
        ({"with_scale": False, "objective": "infonce"}, "with_scale", {"objective": "grace"}),
        ({"clustering_weight": 0.5, "enable_clustering": False}, "clustering_weight", {"enable_clustering": True}),
        ({"cross_group_weight": 0.5, "objective": "infonce"}, "cross_group_weight", {"objective": "grace"}),
        ({"length_penalty": 2.0}, "length_penalty", {"objective": "infonce"}),
        ({"contrastive_temperature": 0.1}, "contrastive_temperature", {"contrastive_weight": 0.5}),
        ({"contrastive_anchors": True}, "contrastive_anchors", {"contrastive_weight": 0.5}),
        ({"contrastive_first_weight": 1.0}, "contrastive_first_weight", {"contrastive_first_steps": 9}),
        ({"contrastive_first_steps": 9}, "contrastive_first_steps", {"contrastive_first_weight": 1.0}),
    ],
)
def test_reward_arguments_without_effect_are_errors_too(kwargs, name, companion):
    def lines(given: dict[str, Any]) -> list[str]:
        with pytest.raises(UserError) as caught:
            build_config({"reward_model": {"reward_kwargs": given}})
        return [line for line in str(caught.value).splitlines() if "reward_kwargs" in line]

    (line,) = lines(kwargs)
    assert line.startswith(f"reward_model.reward_kwargs.{name}={kwargs[name]} has no effect")
    assert lines({**kwargs, **companion}) == []


def test_which_steps_write_rationales_is_asked_of_no_run_that_writes_none():
    given = {**WITHOUT_POLICY, "trainer.contrastive_warmup_steps": 3, "trainer.contrastive_steps_between": 2}
    assert list(unread_settings(config_of(given))) == []
    lines = list(unread_settings(config_of({**given, "data.think": False})))
    assert [line.partition("=")[0] for line in lines] == list(given)[2:]
    assert all("it is read with data.think=True only" in line for line in lines)
    notes = dict(start_notes(config_of({**WITHOUT_POLICY, "data.think": False, f"{ROLLOUT}.n": 3}), "cpu"))
    assert notes["no effect without rationales"] == f"{ROLLOUT}.n"


def test_settings_of_the_embedding_gradient_count_where_hidden_gives_one():
    settings = {f"{ACTOR}.embedding_grad_share": 0.5, "trainer.contrastive_warmup_steps": 3}
    assert len(list(unread_settings(config_of(settings)))) == 2
    for kwargs in ({"contrastive_weight": 0.1}, {"contrastive_first_weight": 1.0, "contrastive_first_steps": 5}):
        assert list(unread_settings(config_of({**settings, "reward_model.reward_kwargs": kwargs}))) == []


ADDED_TO_POLICY = [f"{ACTOR}.entropy_coeff", "algorithm.use_kl_in_reward"]
WITHOUT_POLICY = {f"{ACTOR}.embedding_grad_share": 1, "reward_model.reward_kwargs": {"contrastive_weight": 0.1}}


@pytest.mark.parametrize("key", ADDED_TO_POLICY)
def test_without_a_policy_gradient_nothing_reads_what_is_added_to_it(key):
    (line,) = unread_settings(config_of({**WITHOUT_POLICY, key: 1}))
    assert line.startswith(f"{key}=") and f"{ACTOR}.embedding_grad_share below 1" in line


def test_without_a_policy_gradient_a_recipes_settings_of_it_are_told_and_a_group_may_be_of_one():
    given = {**WITHOUT_POLICY, f"{ACTOR}.clip_ratio": 0.3, "actor_rollout_ref.rollout.n": 1}
    given |= {f"{ACTOR}.use_kl_loss": True, f"{ACTOR}.kl_loss_coef": 0.1}
    given |= {"algorithm.use_kl_in_reward": True, "algorithm.kl_ctrl.kl_coef": 0}
    config = config_of(given)
    assert list(unread_settings(config)) == []
    assert ("no effect without a policy gradient", f"{ACTOR}.clip_ratio") in list(start_notes(config, "cpu"))
    # The KL term weighs its tokens by it.
    for has_kl, noted in ((True, False), (False, True)):
        changed = {**given, f"{ACTOR}.use_kl_loss": has_kl, f"{ACTOR}.loss_agg_mode": "seq-mean-token-sum"}
        notes = dict(start_notes(config_of(changed), "cpu"))
        assert (f"{ACTOR}.loss_agg_mode" in notes["no effect without a policy gradient"]) is noted
    for share, refused in ((1, False), (0.5, True)):
        with pytest.raises(UserError) as caught:
            build_config(nested({**given, f"{ACTOR}.embedding_grad_share": share}))
        assert ("a group of one has no advantage" in str(caught.value)) is refused


@pytest.mark.parametrize(
    ("given", "reader", "note"),
    [
        ({"data.val_max_samples": 9, "data.val_sts_file": None, f"{ROLLOUT}.val_kwargs.do_sample": True},
         {"trainer.test_freq": 5}, "no effect without validation"),
        ({"algorithm.adv_estimator": "rloo", "algorithm.norm_adv_by_std_in_grpo": False},
         {"algorithm.adv_estimator": "grpo"}, "no effect with adv_estimator=rloo"),
    ],
)  # fmt: skip
def test_what_nothing_reads_in_this_run_is_told_at_its_start(given, reader, note):
    (told,) = (keys for what, keys in start_notes(config_of(given), "cpu") if what == note)
    assert told.split(", ") == [key for key in given if key != "algorithm.adv_estimator"]
    assert note not in dict(start_notes(config_of({**given, **reader}), "cpu"))


def test_an_estimator_of_the_users_own_may_read_whatever_it_is_called_with():
    given = {"algorithm.adv_estimator": "mine", "algorithm.gamma": 0.9, "algorithm.norm_adv_by_std_in_grpo": False}
    assert list(unread_settings(config_of(given))) == []
    assert not [what for what in notes(given, "cpu") if "adv_estimator" in what]


def test_without_a_policy_gradient_there_has_to_be_a_contrastive_loss():
    with pytest.raises(UserError) as caught:
        build_config(nested({**WITHOUT_POLICY, "reward_model.reward_kwargs": {}}))
    assert f"{ACTOR}.embedding_grad_share=1.0 has no effect: it is read with" in str(caught.value)


@pytest.mark.parametrize(("horizon", "refused"), [(20, True), (21, False)])
def test_an_adaptive_coefficient_stays_above_0(horizon, refused):
    given = {
        "algorithm.use_kl_in_reward": True, "algorithm.kl_ctrl.type": "adaptive", "algorithm.kl_ctrl.horizon": horizon,
        "data.train_batch_size": 20, "actor_rollout_ref.rollout.n": 5,
    }  # fmt: skip
    controller = KlController(0.5, True, 0.1, horizon)
    controller.update(0.0, 100)
    assert (controller.coef <= 0) is refused
    with pytest.raises(UserError) as caught:  # other settings are missing
        build_config(nested(given))
    assert (f"algorithm.kl_ctrl.horizon={horizon} with 100 rows a step" in str(caught.value)) is refused
    assert ("Set the horizon to 21 or more" in str(caught.value)) is refused


@pytest.mark.parametrize(
    ("kind", "steps", "refused"),
    [("k1", 2, True), ("kl", 2, True), ("k1", 0, False), ("k2", 2, False), ("low_var_kl", 2, False)],
)
def test_a_signed_kl_has_no_meaning_for_texts_that_were_not_drawn(kind, steps, refused):
    given = {
        f"{ACTOR}.use_kl_loss": True, f"{ACTOR}.kl_loss_type": kind, "trainer.contrastive_steps_between": steps,
        "reward_model.reward_kwargs": {"contrastive_weight": 1},
    }  # fmt: skip
    with pytest.raises(UserError) as caught:  # other settings are missing
        build_config(nested(given))
    line = f"kl_loss_type={kind} with trainer.contrastive_steps_between={steps}: in these steps the term is of given"
    assert (line in str(caught.value)) is refused


@pytest.mark.parametrize("weight", [0, 0.1])
@pytest.mark.parametrize("first", [None, (0, 1), (0, 5), (1, 3), (1, 5)])
@pytest.mark.parametrize(("warm_up", "between"), [(0, 0), (0, 2), (5, 0), (3, 1), (4, 2)])
@pytest.mark.parametrize("share", [0.5, 1])
def test_every_step_that_follows_no_policy_gradient_needs_the_contrastive_loss(weight, first, warm_up, between, share):
    """The first step that would train nothing is named, whichever stretch of the weights it is in."""
    kwargs = {"contrastive_weight": weight}
    kwargs |= {} if first is None else {"contrastive_first_weight": first[0], "contrastive_first_steps": first[1]}
    given = {
        "trainer.contrastive_warmup_steps": warm_up, "trainer.contrastive_steps_between": between,
        f"{ACTOR}.embedding_grad_share": share, "reward_model.reward_kwargs": kwargs,
    }  # fmt: skip
    schedule = StepSchedule(1000, 1, 1, warm_up, between)
    idle = {}
    for step in range(1, 30):
        early = first is not None and step <= first[1]
        has_loss = first[0] if early else weight
        if not has_loss and not (schedule.writes_rationales(step) and share != 1):
            idle.setdefault("contrastive_first_weight" if early else "contrastive_weight", step)
    with pytest.raises(UserError) as caught:  # other settings are missing
        build_config(nested(given))
    said = re.findall(r"(contrastive\w*weight)=0: with .*, step (\d+) follows no policy gradient", str(caught.value))
    if weight or (first and first[0]):
        assert dict(said) == {name: str(step) for name, step in idle.items()}
        return
    assert not said, "without any loss each of its settings is told instead"
    for name in given.keys() - {"reward_model.reward_kwargs"}:
        told = re.search(rf"^{re.escape(name)}=(\S+) has no effect: it is read with", str(caught.value), re.MULTILINE)
        assert (float(told[1]) if told else 0) == given[name]


@pytest.mark.parametrize(
    ("mode", "sizes", "refused"),
    [
        ("unsupervised", (1, None), True), ("unsupervised", (2, None), False), ("supervised", (1, None), False),
        ("unsupervised", (2, 1), True), ("unsupervised", (1, 2), True), ("supervised", (2, 1), False),
    ],
)  # fmt: skip
def test_a_step_of_one_text_has_nothing_to_contrast_it_with(mode, sizes, refused):
    with pytest.raises(UserError) as caught:
        build_config(
            {
                "data": {"train_mode": mode, "train_batch_size": sizes[0], "contrastive_batch_size": sizes[1]},
                "reward_model": {"reward_kwargs": {"contrastive_weight": 0.1}},
            }
        )
    assert ("a step of one text has nothing to contrast it with" in str(caught.value)) == refused


def test_the_size_of_micro_batches_alone_sets_their_kind():
    def limits(**settings: Any) -> list[tuple[int | None, int | None]]:
        section = config_of({key.replace("__", "."): value for key, value in settings.items()}).actor_rollout_ref
        return [section.actor.update_limit, section.actor.score_limit(section.rollout)]

    rows, own = "actor_rollout_ref__actor__ppo_micro_batch_size_per_gpu", "actor_rollout_ref__rollout__log_prob_"
    assert limits() == [(16384, None), (16384, None)]
    assert limits(**{rows: 4}) == [(None, 4), (None, 4)]
    assert limits(**{f"{own}micro_batch_size_per_gpu": 9}) == [(16384, None), (None, 9)]
    assert limits(**{rows: 4, f"{own}use_dynamic_bsz": True}) == [(None, 4), (16384, None)]
    assert limits(**{f"{own}max_token_len_per_gpu": 99}) == [(16384, None), (99, None)]


def notes(settings: dict[str, Any], device: str) -> dict[str, str]:
    return dict(start_notes(config_of(settings), device))


def test_an_engine_that_keeps_its_memory_says_what_it_costs():
    kept = {f"{ROLLOUT}.name": "vllm", f"{ROLLOUT}.free_cache_engine": False, f"{ROLLOUT}.gpu_memory_utilization": 0.4}
    assert "vllm keeps 40% of each GPU while training" in notes(kept, "cuda")["free_cache_engine=False"]
    assert "free_cache_engine=False" not in notes({**kept, f"{ROLLOUT}.free_cache_engine": True}, "cuda")


def test_what_the_machine_leaves_without_effect_is_told_at_start():
    offload = {f"{ACTOR}.fsdp_config.{name}": True for name in ("param_offload", "offload_policy")}
    settings = {**offload, f"{REF}.fsdp_config.param_offload": True, f"{ROLLOUT}.name": "hf", "trainer.use_ray": False}
    settings |= {f"{ROLLOUT}.max_num_seqs": 4, f"{ROLLOUT}.load_format": "auto", "trainer.phase_timeout_s": 9}
    # The diagnoses score by the untrained model too.
    assert "no effect without a reference model" not in notes(settings, "cpu")
    settings["trainer.diag_log_likelihood"] = False
    assert notes(settings, "cpu") == {
        "no effect on a CPU": ", ".join([*offload, f"{REF}.fsdp_config.param_offload"]),
        "no effect with the engine hf": f"{ROLLOUT}.load_format",
        "no effect without a reference model": f"{REF}.fsdp_config.param_offload",
        "no effect without Ray": "trainer.phase_timeout_s",
    }
    assert notes(settings, "cuda")["no effect with actor.strategy=fsdp"] == f"{ACTOR}.fsdp_config.offload_policy"
    assert notes({f"{ROLLOUT}.name": "hf"}, "cuda") == {}
    unscaled = {"reward_model.reward_kwargs": {"with_scale": False, "temperature": 0.1}}
    assert notes(unscaled, "cuda") == {"no effect with with_scale=False": "temperature"}


@pytest.mark.parametrize("flag", ["param_offload", "optimizer_offload"])
@pytest.mark.parametrize("section", [ACTOR, REF])
def test_what_torchs_offload_policy_does_anyway_is_told(section, flag):
    settings = {f"{section}.fsdp_config.offload_policy": True, f"{section}.fsdp_config.{flag}": True}
    note, key = "no effect with fsdp_config.offload_policy=True", f"{section}.fsdp_config.{flag}"
    by_torch = {**settings, f"{ACTOR}.strategy": "fsdp2"}
    assert notes(by_torch, "cuda")[note] == key
    assert note not in notes(by_torch, "cpu") and note not in notes(settings, "cuda")
    assert note not in notes({**by_torch, f"{section}.fsdp_config.offload_policy": False}, "cuda")


def test_defaults_are_read_as_they_are():
    config = RunConfig()
    for key, field in walk_fields(RunConfig):
        assert reduce(getattr, key.split("."), config) == field.get_default(call_default_factory=True)
    assert list(unread_settings(config)) == []

"""verl's keys: each is known, passes where it changes nothing, and is refused with its reason where it would."""

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from verl_scripts import SCRIPTS

from verl.config import RunConfig
from verl.config_checks import build_config, split_keys
from verl.config_fields import nested, walk_fields
from verl.errors import UserError
from verl.trainer.compose import compose_config
from verl.verl_keys import ABSENT, DIFFERENCES, ONLY_VALUES, find_absent, leaves, verl_defaults


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name in ("train.parquet", "test.parquet"):
        (tmp_path / name).touch()
    return tmp_path


def problems_of(values: dict) -> list[str]:
    """The lines of what is wrong with a configuration, without what is not set."""
    try:
        build_config(values)
    except UserError as error:
        return [line for line in str(error).splitlines() if "is not set" not in line]
    return []


def key_of(line: str) -> str:
    return re.match(r"(?:unknown key )?([\w.-]+?)\.?(?:[=: ]|$)", line)[1]


def test_the_whole_configuration_of_verl_is_known_and_what_cannot_stay_is_told_at_once():
    values = OmegaConf.to_container(OmegaConf.create(nested(verl_defaults())), resolve=True)
    values["data"] |= {"train_files": None, "val_files": None}
    values["trainer"] |= {"val_before_train": False}
    assert {key_of(line) for line in problems_of(values)} == {
        "actor_rollout_ref.model.use_remove_padding",
        "actor_rollout_ref.rollout.calculate_log_probs",
        "algorithm.adv_estimator",
        # In verl, too, use_dynamic_bsz=False needs a size.
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu",
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu",
    }


def test_a_key_of_verl_that_would_change_something_is_refused_with_its_reason():
    absent = {key: found for key in verl_defaults() if (found := find_absent(key))}
    refused = [key for key, found in absent.items() if not found.passes and found.only is None]
    assert len(refused) > 100
    for key in refused:
        switches = {switch: 1 for switch in [find_absent(key).switch] if switch}
        lines = problems_of(nested({**switches, key: "else"}))
        expected = f"{key}=else is a key of verl that has no counterpart here: {find_absent(key).why}."
        assert expected in lines


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("actor_rollout_ref.actor.ulysses_sequence_parallel_size", 1),
        ("trainer.val_only", False),
        ("actor_rollout_ref.actor.policy_loss.loss_mode", "vanilla"),
        ("trainer.default_hdfs_dir", None),
        ("actor_rollout_ref.rollout.val_kwargs.n", 1),
        ("actor_rollout_ref.ref.strategy", "fsdp"),
        ("actor_rollout_ref.rollout.prompt_length", 1024),
        ("actor_rollout_ref.actor.use_torch_compile", False),
        ("actor_rollout_ref.model.use_liger", True),
        ("algorithm.filter_groups.metric", "acc"),
        ("reward_model.overlong_buffer.len", 4096),
        ("actor_rollout_ref.rollout.multi_turn.max_user_turns", 5),
        ("actor_rollout_ref.rollout.engine_kwargs.sglang.attention_backend", None),
    ],
)
def test_a_key_of_verl_passes_where_it_changes_nothing(override, value):
    known, problems = split_keys(nested({override: value, "data.max_prompt_length": 1024}))
    assert problems == [] and known == {"data": {"max_prompt_length": 1024}}


@pytest.mark.parametrize(("key", "only"), ONLY_VALUES.items())
def test_a_key_that_can_have_one_value_passes_with_that_one_alone(key, only):
    assert split_keys(nested({key: only})) == ({}, [])
    for other in (None, True, False, "else", {}, verl_defaults()[key]):
        if other != only:
            told = f"{key}={other} is not supported: {ABSENT[key].why}. Set it to {only} or leave it out."
            assert split_keys(nested({key: other})) == ({}, [told])


def test_a_command_line_may_spell_the_only_values(data):
    base = [f"data.train_files={data}/train.parquet", "actor_rollout_ref.model.path=m"]
    assert compose_config([*base, *(f"{key}={only}" for key, only in ONLY_VALUES.items())]) == compose_config(base)


def test_an_interpolated_default_passes_only_while_it_is_the_other_keys_value():
    _, problems = split_keys(nested({"actor_rollout_ref.rollout.prompt_length": 512, "data.max_prompt_length": 1024}))
    assert problems == [
        "actor_rollout_ref.rollout.prompt_length=512 is a key of verl that has no counterpart here: "
        "set data.max_prompt_length."
    ]


def test_the_tables_speak_of_keys_that_are_as_they_say():
    keys = dict(walk_fields(RunConfig)).keys()
    assert not keys & ABSENT.keys()
    assert keys >= DIFFERENCES.keys()
    assert verl_defaults().keys() >= ONLY_VALUES.keys()
    answered = {key for key in verl_defaults() if find_absent(key) or key in keys}
    assert verl_defaults().keys() - answered == {"actor_rollout_ref.rollout.engine_kwargs.vllm.swap_space"}


def test_arguments_of_the_engine_at_null_are_not_passed_on():
    given = {"vllm": {"swap_space": None, "disable_mm_preprocessor_cache": False, "enable_prefix_caching": True}}
    known, problems = split_keys({"actor_rollout_ref": {"rollout": {"engine_kwargs": given}}})
    assert problems == []
    rollout = RunConfig.model_validate(known).actor_rollout_ref.rollout
    assert rollout.vllm_arguments == {"enable_prefix_caching": True}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_public_script_is_told_all_that_is_to_be_changed_and_composes_without_it(name, data):
    script = SCRIPTS[name]
    overrides = [text.replace("DATA", str(data)) for text in script.overrides]
    refused: set[str] = set()
    try:
        compose_config(overrides)
    except UserError as error:
        refused = {key_of(line) for line in str(error).splitlines()}
    assert refused == script.refused
    left = [text for text in overrides if text.split("=")[0].lstrip("+") not in refused]
    if "reward_model.reward_manager" in refused:
        left = [text for text in left if "reward_kwargs" not in text]
    if "data.train_batch_size" in refused:
        left.append("data.train_batch_size=512")
    config = compose_config(left)
    given = dict(text.lstrip("+").split("=", 1) for text in left)
    actor = config.actor_rollout_ref.actor
    assert actor.optim.lr == float(given["actor_rollout_ref.actor.optim.lr"])
    assert actor.ppo_mini_batch_size == int(given["actor_rollout_ref.actor.ppo_mini_batch_size"])
    assert config.trainer.experiment_name == given["trainer.experiment_name"]
    # Without dynamic batches the rows count, as in verl.
    rows = given.get("actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu")
    assert actor.update_limit == ((actor.ppo_max_token_len_per_gpu, None) if rows is None else (None, int(rows)))


def test_dapos_keys_with_their_switches_off_pass(data):
    off = ["algorithm.filter_groups.enable=False", "algorithm.filter_groups.max_num_gen_batches=10",
           "reward_model.overlong_buffer.enable=False", "reward_model.overlong_buffer.penalty_factor=1.0",
           "data.gen_batch_size=64", "hydra.run.dir=outputs/${now:%Y-%m-%d}"]  # fmt: skip
    base = [f"data.train_files={data}/train.parquet", "actor_rollout_ref.model.path=m"]
    assert compose_config([*base, *off]) == compose_config(base)


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("custom_prompt", "process_data.py --system_prompt"),
        ("overlong_buffer_cfg", "use enable_length_penalty"),
        ("max_resp_len", "data.max_response_length is the limit"),
    ],
)
def test_an_argument_of_another_reward_manager_says_what_to_use(name, use):
    lines = problems_of({"reward_model": {"reward_kwargs": {name: "x"}}})
    assert len(lines) == 1 and lines[0].startswith(f"reward_model.reward_kwargs.{name} ") and use in lines[0]


def test_leaves_keep_empty_mappings():
    assert dict(leaves({"a": {"b": 1, "c": {}}, "d": None})) == {"a.b": 1, "a.c": {}, "d": None}

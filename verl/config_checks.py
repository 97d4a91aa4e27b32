"""Building a checked configuration: unknown keys, wrong values, missing files and bad combinations are errors.

Every message names the key, its value and a way out. Imports neither torch, ray nor transformers.
"""

import difflib
import typing
from collections.abc import Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from verl.config import HiddenRewardConfig, RunConfig, file_list
from verl.errors import UserError
from verl.verl_keys import NO_COUNTERPART, ONLY_VALUE

# What validation reports as val/<name>; plain texts have no triplets, and `reward` stands for all where a rule rewards.
_TRIPLET_FIGURES = {"triplet_accuracy", "recall_at_1", "mrr", "alignment"}
_FIGURES = {"mean_cosine", "uniformity", "effective_rank", "sts_spearman", "reward"}


def build_config(values: Mapping[str, Any]) -> RunConfig:
    """Merge a plain nested mapping into a checked `RunConfig`.

    Raises:
        UserError: unknown key, wrong type, or a combination that cannot work.
    """
    for key in _leaf_keys(values, RunConfig):
        check_key(key)
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise _as_user_error(error, RunConfig) from None
    _check_required(config)
    _check_only_values(config)
    _check_sizes(config)
    _check_engine(config)
    _check_without_ray(config)
    _check_algorithm(config)
    _check_save_best(config)
    return config


def check_key(key: str) -> None:
    """Raise `UserError` unless `key` (dotted) exists; say why, or name the closest one."""
    known = set(all_keys())
    if key in known or any(key.startswith(k + ".") for k in known if _is_open(k)):
        return
    for prefix in sorted(NO_COUNTERPART, key=len, reverse=True):
        if key == prefix or key.startswith(prefix + "."):
            raise UserError(f"{key} is a key of verl that has no counterpart here: {NO_COUNTERPART[prefix]}.")
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    same_leaf = [k for k in sorted(known) if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    hint = f" Did you mean {(same_leaf or close)[0]}?" if same_leaf or close else ""
    raise UserError(f"unknown key {key}.{hint} (all keys: verl/trainer/config/ppo_trainer.yaml)")


def all_keys() -> Iterator[str]:
    """Every leaf key, dotted."""
    for key, _ in walk_fields(RunConfig):
        yield key


def walk_fields(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every leaf field of a section as (dotted key, pydantic field)."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from walk_fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def build_reward_kwargs(kwargs: Mapping[str, Any]) -> HiddenRewardConfig:
    """Check `reward_model.reward_kwargs` of the reward manager `hidden`.

    Raises:
        UserError: unknown name (the valid ones are listed) or wrong type.
    """
    valid = list(HiddenRewardConfig.model_fields)
    for name in kwargs:
        if name not in valid:
            close = difflib.get_close_matches(name, valid, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise UserError(
                f"reward_model.reward_kwargs.{name} is not known to the reward manager hidden.{hint} "
                f"Valid: {', '.join(valid)}."
            )
    try:
        return HiddenRewardConfig.model_validate(dict(kwargs))
    except ValidationError as error:
        raise _as_user_error(error, HiddenRewardConfig, "reward_model.reward_kwargs.") from None


def multiples_near(value: int, divisor: int) -> str:
    """The multiples of `divisor` around `value`, for an error message."""
    lower = value // divisor * divisor
    return " or ".join(str(v) for v in (lower, lower + divisor) if v > 0)


def _is_open(key: str) -> bool:
    """Whether a leaf is a mapping that takes keys of the user's."""
    annotation = {k: f.annotation for k, f in walk_fields(RunConfig)}[key]
    return typing.get_origin(annotation) is dict


def _leaf_keys(values: Mapping[str, Any], section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        field = section.model_fields.get(name)
        inner = field.annotation if field else None
        if isinstance(value, Mapping) and isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _leaf_keys(value, inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _as_user_error(error: ValidationError, section: type[BaseModel], prefix: str = "") -> UserError:
    """Every value that is not allowed, with what its key allows."""
    fields = dict(walk_fields(section))
    messages = []
    for found in error.errors():
        path = [str(part) for part in found["loc"]]
        # After the key, pydantic names members of unions and tuples.
        candidates = [".".join(path[:end]) for end in range(len(path), 0, -1)]
        key = next((name for name in candidates if name in fields), candidates[0])
        if found["type"] in _OUT_OF_RANGE:
            or_null = ", or null" if type(None) in typing.get_args(fields[key].annotation) else ""
            messages.append(f"{prefix}{key}={found['input']} must be {limits_of(fields[key])}{or_null}.")
        else:
            messages.append(f"{prefix}{key}={found['input']!r}: {found['msg']}.")
    return UserError("\n".join(dict.fromkeys(messages)))


_OUT_OF_RANGE = {"greater_than", "greater_than_equal", "less_than", "less_than_equal"}


def limits_of(field: FieldInfo) -> str:
    """The range of a number in words, such as "above 0, at most 1"; empty without one."""
    words = [
        text.format(getattr(constraint, name))
        for constraint in [*field.metadata, *_inner_constraints(field.annotation)]
        for name, text in (("gt", "above {}"), ("ge", "{} or more"), ("lt", "below {}"), ("le", "at most {}"))
        if getattr(constraint, name, None) is not None
    ]
    return ", ".join(dict.fromkeys(words))


def _inner_constraints(annotation: Any) -> Iterator[Any]:
    """The constraints of the members of a union or a tuple."""
    for part in typing.get_args(annotation):
        if typing.get_origin(part) is Annotated:
            for constraint in part.__metadata__:
                yield from constraint.metadata if isinstance(constraint, FieldInfo) else [constraint]


def _value_of(config: BaseModel, key: str) -> Any:
    return reduce(getattr, key.split("."), config)


def _check_required(config: RunConfig) -> None:
    if not config.actor_rollout_ref.model.path:
        raise UserError("actor_rollout_ref.model.path is not set; give a model folder or hub name.")
    if not config.data.train_files:
        raise UserError("data.train_files is not set; give the train.parquet that process_data.py wrote.")
    _check_files("data.train_files", config.data.train_files)
    if config.validates:
        if not config.data.val_files:
            raise UserError(
                "validation is on (trainer.test_freq or trainer.val_before_train) but data.val_files is not set; "
                "give a parquet file, or set trainer.test_freq=-1 trainer.val_before_train=False."
            )
        _check_files("data.val_files", config.data.val_files)
    if config.trainer.resume_mode == "resume_path" and not config.trainer.resume_from_path:
        raise UserError("trainer.resume_mode=resume_path needs trainer.resume_from_path=.../global_step_N.")


def _check_files(key: str, files: str | list[str]) -> None:
    for name in file_list(files):
        if not Path(name).expanduser().is_file():
            raise UserError(f"{key}: the file {name!r} does not exist; make it with process_data.py.")


def _check_only_values(config: RunConfig) -> None:
    for key, (only, why) in ONLY_VALUE.items():
        if (value := _value_of(config, key)) != only:
            raise UserError(f"{key}={value} is not supported: {why}. Set it to {only} or leave it out.")


def _check_sizes(config: RunConfig) -> None:
    data, actor = config.data, config.actor_rollout_ref.actor
    if data.train_batch_size % actor.ppo_mini_batch_size:
        size, mini = data.train_batch_size, actor.ppo_mini_batch_size
        divisors = [d for d in range(1, size + 1) if size % d == 0]
        near = sorted(divisors, key=lambda d: abs(d - mini))[:3]
        raise UserError(
            f"data.train_batch_size={size} is not a multiple of actor_rollout_ref.actor.ppo_mini_batch_size={mini} "
            f"(both count prompts). Nearest: train_batch_size {multiples_near(size, mini)}, "
            f"or ppo_mini_batch_size {', '.join(map(str, sorted(near)))}."
        )
    for key, dynamic, rows in _micro_batch_rules(config):
        if not dynamic and rows is None:
            raise UserError(
                f"{key}: micro-batches need a size when dynamic batching is off; set it, or use_dynamic_bsz=True."
            )


def _check_engine(config: RunConfig) -> None:
    data, rollout = config.data, config.actor_rollout_ref.rollout
    prefix = "actor_rollout_ref.rollout."
    needed = data.max_prompt_length + data.max_response_length
    if rollout.max_model_len is not None and rollout.max_model_len < needed:
        raise UserError(
            f"{prefix}max_model_len={rollout.max_model_len} is less than data.max_prompt_length="
            f"{data.max_prompt_length} + data.max_response_length={data.max_response_length} = {needed}; "
            "leave it out, or lower those."
        )
    if not rollout.enable_chunked_prefill and rollout.max_num_batched_tokens < (rollout.max_model_len or needed):
        raise UserError(
            f"{prefix}max_num_batched_tokens={rollout.max_num_batched_tokens} cannot take a sequence of "
            f"{rollout.max_model_len or needed} tokens while {prefix}enable_chunked_prefill=False; raise it, or set "
            f"{prefix}enable_chunked_prefill=True."
        )
    if unknown := set(rollout.engine_kwargs) - {"vllm"}:
        raise UserError(f"{prefix}engine_kwargs.{min(unknown)} belongs to no engine; put arguments under .vllm.")


def _check_without_ray(config: RunConfig) -> None:
    """Without Ray there is one worker, in this process."""
    trainer, size = config.trainer, config.actor_rollout_ref.rollout.tensor_model_parallel_size
    several = {
        "trainer.nnodes": trainer.nnodes,
        "trainer.n_gpus_per_node": trainer.n_gpus_per_node or 1,
        "actor_rollout_ref.rollout.tensor_model_parallel_size": size,
    }
    for key, count in several.items():
        if not trainer.use_ray and count > 1:
            raise UserError(f"{key}={count} needs Ray, and trainer.use_ray=False runs one worker; set it to 1.")


def _micro_batch_rules(config: RunConfig) -> list[tuple[str, bool, int | None]]:
    actor = config.actor_rollout_ref.actor
    rules = [("actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu", actor.use_dynamic_bsz)]
    sizes = [actor.ppo_micro_batch_size_per_gpu]
    for name, section in (
        ("rollout", config.actor_rollout_ref.rollout),
        ("ref", config.actor_rollout_ref.ref),
    ):
        dynamic = section.log_prob_use_dynamic_bsz
        rules.append(
            (
                f"actor_rollout_ref.{name}.log_prob_micro_batch_size_per_gpu",
                actor.use_dynamic_bsz if dynamic is None else dynamic,
            )
        )
        sizes.append(section.log_prob_micro_batch_size_per_gpu or actor.ppo_micro_batch_size_per_gpu)
    return [(key, dynamic, rows) for (key, dynamic), rows in zip(rules, sizes, strict=True)]


def _check_save_best(config: RunConfig) -> None:
    name = config.trainer.save_best
    if name is None:
        return
    figures = _FIGURES | (_TRIPLET_FIGURES if config.train_mode == "supervised" else set())
    figures -= {"sts_spearman"} if config.data.val_sts_file is None else set()
    if name not in {f"val/{figure}" for figure in figures}:
        listed = ", ".join(sorted(f"val/{figure}" for figure in figures))
        raise UserError(f"trainer.save_best={name} is not a figure of this run's validation; use one of {listed}.")
    if config.trainer.test_freq <= 0:
        raise UserError(f"trainer.save_best={name} needs validation; set trainer.test_freq to some steps.")


_CRITIC_ESTIMATORS = {
    "gae": "it needs a critic (value model)",
    "remax": "it needs a greedy rollout of each prompt",
}
_GROUP_ESTIMATORS = {"grpo", "rloo", "reinforce_plus_plus_baseline", "opo", "grpo_passk"}


def _check_algorithm(config: RunConfig) -> None:
    estimator, n = config.algorithm.adv_estimator, config.actor_rollout_ref.rollout.n
    if estimator in _CRITIC_ESTIMATORS:
        raise UserError(
            f"algorithm.adv_estimator={estimator} is not supported: {_CRITIC_ESTIMATORS[estimator]}. "
            f"Use one of {', '.join(sorted(_GROUP_ESTIMATORS | {'reinforce_plus_plus'}))}."
        )
    if estimator in _GROUP_ESTIMATORS and n < 2:
        raise UserError(
            f"actor_rollout_ref.rollout.n={n} with algorithm.adv_estimator={estimator}: a group of one has no "
            "advantage. Set actor_rollout_ref.rollout.n to 2 or more (the paper uses 8)."
        )
    if config.custom_reward_function.path and config.reward_model.reward_manager != "naive":
        raise UserError(
            f"custom_reward_function.path={config.custom_reward_function.path} is read by reward_model.reward_manager="
            f"naive only, and that is {config.reward_model.reward_manager}; set one of them."
        )
    if config.reward_model.reward_manager == "hidden":
        build_reward_kwargs(config.reward_model.reward_kwargs)

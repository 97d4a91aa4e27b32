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

# What validation reports as val/<name>: the first set for triplets only, `reward` alone if rewards come from a rule.
_TRIPLET_METRICS = {"triplet_accuracy", "recall_at_1", "mrr", "alignment"}
_METRICS = {"mean_cosine", "uniformity", "effective_rank", "sts_spearman", "reward"}

_CRITIC_ESTIMATORS = {
    "gae": "it needs a critic (value model)",
    "remax": "it needs a greedy rollout of each prompt",
}
_GROUP_ESTIMATORS = {"grpo", "rloo", "reinforce_plus_plus_baseline", "opo", "grpo_passk"}

_OUT_OF_RANGE = {"greater_than", "greater_than_equal", "less_than", "less_than_equal"}
_LIMITS = (("gt", "above {}"), ("ge", "{} or more"), ("lt", "below {}"), ("le", "at most {}"))


def build_config(values: Mapping[str, Any]) -> RunConfig:
    """A checked `RunConfig` of a plain nested mapping; keys that it lacks have their defaults.

    Raises:
        UserError: unknown key, wrong type, value out of range, or a combination that cannot work.
    """
    for key in _leaf_keys(values, RunConfig):
        check_key(key)
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, RunConfig)) from None
    _check_required(config)
    _check_only_values(config)
    _check_batch_sizes(config)
    _check_micro_batches(config)
    _check_engine(config)
    _check_without_ray(config)
    _check_algorithm(config)
    _check_save_best(config)
    return config


def check_key(key: str) -> None:
    """Raise `UserError` unless `key` (dotted) exists; the message has the reason, or the closest key."""
    known = dict(walk_fields(RunConfig))
    mappings = [name for name, field in known.items() if typing.get_origin(field.annotation) is dict]
    if key in known or any(key.startswith(f"{name}.") for name in mappings):
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
        raise UserError(_explain(error, HiddenRewardConfig, "reward_model.reward_kwargs.")) from None


def multiples_near(value: int, divisor: int) -> str:
    """The multiples of `divisor` around `value`, for an error message."""
    lower = value // divisor * divisor
    return " or ".join(str(v) for v in (lower, lower + divisor) if v > 0)


def limits_of(field: FieldInfo) -> str:
    """The range of a number in words, such as "above 0, at most 1"; empty without one."""
    words = [
        text.format(getattr(constraint, name))
        for constraint in [*field.metadata, *_inner_constraints(field.annotation)]
        for name, text in _LIMITS
        if getattr(constraint, name, None) is not None
    ]
    return ", ".join(dict.fromkeys(words))


def _inner_constraints(annotation: Any) -> Iterator[Any]:
    """The constraints of the members of a union or a tuple."""
    for part in typing.get_args(annotation):
        if typing.get_origin(part) is Annotated:
            for constraint in part.__metadata__:
                yield from constraint.metadata if isinstance(constraint, FieldInfo) else [constraint]


def _leaf_keys(values: Mapping[str, Any], section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every leaf key of `values`, dotted, known or not."""
    for name, value in values.items():
        field = section.model_fields.get(name)
        inner = field.annotation if field else None
        if isinstance(value, Mapping) and isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _leaf_keys(value, inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _explain(error: ValidationError, section: type[BaseModel], prefix: str = "") -> str:
    """Each rejected value with its key and what the key allows, one a line."""
    fields = dict(walk_fields(section))
    messages = []
    for found in error.errors():
        path = [str(part) for part in found["loc"]]
        # Behind the key, `loc` has the member of a union, tuple or list.
        candidates = [".".join(path[:end]) for end in range(len(path), 0, -1)]
        key = next((name for name in candidates if name in fields), candidates[0])
        if found["type"] in _OUT_OF_RANGE:
            or_null = ", or null" if type(None) in typing.get_args(fields[key].annotation) else ""
            messages.append(f"{prefix}{key}={found['input']} must be {limits_of(fields[key])}{or_null}.")
        else:
            messages.append(f"{prefix}{key}={found['input']!r}: {found['msg']}.")
    return "\n".join(dict.fromkeys(messages))


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
        value = reduce(getattr, key.split("."), config)
        if value != only:
            raise UserError(f"{key}={value} is not supported: {why}. Set it to {only} or leave it out.")


def _check_batch_sizes(config: RunConfig) -> None:
    size, mini = config.data.train_batch_size, config.actor_rollout_ref.actor.ppo_mini_batch_size
    if size % mini:
        divisors = [d for d in range(1, size + 1) if size % d == 0]
        near = sorted(divisors, key=lambda d: abs(d - mini))[:3]
        raise UserError(
            f"data.train_batch_size={size} is not a multiple of actor_rollout_ref.actor.ppo_mini_batch_size={mini} "
            f"(both count prompts). Nearest: train_batch_size {multiples_near(size, mini)}, "
            f"or ppo_mini_batch_size {', '.join(map(str, sorted(near)))}."
        )


def _check_micro_batches(config: RunConfig) -> None:
    """Each kind of forward needs a size of micro-batches, its own or the actor's."""
    section = config.actor_rollout_ref
    actor = section.actor
    kinds = [("actor.ppo", actor.use_dynamic_bsz, actor.ppo_micro_batch_size_per_gpu)] + [
        (f"{name}.log_prob", kind.log_prob_use_dynamic_bsz, kind.log_prob_micro_batch_size_per_gpu)
        for name, kind in (("rollout", section.rollout), ("ref", section.ref))
    ]
    for name, dynamic, rows in kinds:
        by_tokens = actor.use_dynamic_bsz if dynamic is None else dynamic
        if not by_tokens and not (rows or actor.ppo_micro_batch_size_per_gpu):
            raise UserError(
                f"actor_rollout_ref.{name}_micro_batch_size_per_gpu: micro-batches need a size when dynamic batching "
                "is off; set it, or use_dynamic_bsz=True."
            )


def _check_engine(config: RunConfig) -> None:
    data, rollout = config.data, config.actor_rollout_ref.rollout
    prefix = "actor_rollout_ref.rollout."
    needed = data.max_prompt_length + data.max_response_length
    if rollout.max_model_len is not None and rollout.max_model_len < needed:
        raise UserError(
            f"{prefix}max_model_len={rollout.max_model_len} is less than data.max_prompt_length="
            f"{data.max_prompt_length} + data.max_response_length={data.max_response_length} = {needed}; "
            "leave it out, or lower these two."
        )
    if not rollout.enable_chunked_prefill and rollout.max_num_batched_tokens < (rollout.max_model_len or needed):
        raise UserError(
            f"{prefix}max_num_batched_tokens={rollout.max_num_batched_tokens} cannot take a sequence of "
            f"{rollout.max_model_len or needed} tokens while {prefix}enable_chunked_prefill=False; raise it, or set "
            f"{prefix}enable_chunked_prefill=True."
        )
    if unknown := set(rollout.engine_kwargs) - {"vllm"}:
        raise UserError(
            f"{prefix}engine_kwargs.{min(unknown)}: only engine_kwargs.vllm is read; put arguments under it."
        )


def _check_without_ray(config: RunConfig) -> None:
    """Without Ray there is one worker, in the driver's process."""
    trainer, rollout = config.trainer, config.actor_rollout_ref.rollout
    if trainer.use_ray:
        return
    counts = {
        "trainer.nnodes": trainer.nnodes,
        "trainer.n_gpus_per_node": trainer.n_gpus_per_node or 1,
        "actor_rollout_ref.rollout.tensor_model_parallel_size": rollout.tensor_model_parallel_size,
    }
    for key, count in counts.items():
        if count > 1:
            raise UserError(f"{key}={count} needs Ray, and trainer.use_ray=False runs one worker; set it to 1.")


def _check_save_best(config: RunConfig) -> None:
    name = config.trainer.save_best
    if name is None:
        return
    metrics = _METRICS | (_TRIPLET_METRICS if config.train_mode == "supervised" else set())
    metrics -= {"sts_spearman"} if config.data.val_sts_file is None else set()
    names = sorted(f"val/{metric}" for metric in metrics)
    if name not in names:
        raise UserError(
            f"trainer.save_best={name} is not a metric of this run's validation; use one of {', '.join(names)}."
        )
    if config.trainer.test_freq <= 0:
        raise UserError(f"trainer.save_best={name} needs validation; set trainer.test_freq to a number of steps.")


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
            f"naive only, and this run uses {config.reward_model.reward_manager}; change one of them."
        )
    if config.reward_model.reward_manager == "hidden":
        build_reward_kwargs(config.reward_model.reward_kwargs)

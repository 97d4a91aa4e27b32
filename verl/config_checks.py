"""Building a checked configuration: unknown keys, wrong values, missing files and bad combinations are errors.

All that is wrong is told at once; every line names the key, its value and a way out. Imports neither torch, ray nor
transformers.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from verl.config import ESTIMATORS, HiddenRewardConfig, RunConfig, file_list
from verl.config_fields import closest_key, nested, walk_fields, wrong_values
from verl.errors import UserError
from verl.text_roles import DEFAULT_TASK, INSTRUCTION
from verl.unread_settings import unread_reward_kwargs, unread_settings
from verl.verl_keys import ABSENT_REWARD_KWARGS, ABSENT_VALUES, changes_nothing, find_absent, leaves

# What validation reports as val/<name> of embeddings: the first set for triplets only.
_TRIPLET_METRICS = {"triplet_accuracy", "recall_at_1", "mrr", "alignment"}
_METRICS = {"mean_cosine", "uniformity", "effective_rank", "sts_spearman"}

_FIELDS = dict(walk_fields(RunConfig))


def build_config(values: Mapping[str, Any], has_data: bool = True) -> RunConfig:
    """A checked `RunConfig` of a plain nested mapping; keys that it lacks have their defaults.

    Args:
        has_data: False = its files of data need not be there yet.

    Raises:
        UserError: unknown keys, wrong types, values out of range, or combinations that cannot work; one a line.
    """
    known, problems = split_keys(values)
    config, wrong = _validate(known)
    problems += wrong.values()
    for check in (*_CHECKS, *([_check_data] if has_data else [])):
        # What a rejected value should have been is not known, nor what depends on it.
        problems += [text for text in check(config) if not any(key in text for key in wrong)]
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return config


def split_keys(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The part of `values` whose keys exist here, and what is wrong with the others.

    A key of verl that does not exist here is left out where its value changes nothing.
    """
    problems: list[str] = []
    return _known_part(values, "", dict(leaves(values)), problems), problems


def _known_part(
    values: Mapping[str, Any], prefix: str, given: Mapping[str, Any], problems: list[str]
) -> dict[str, Any]:
    known = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            if part := _known_part(value, f"{key}.", given, problems):
                known[name] = part
        elif absent := find_absent(key):
            if not changes_nothing(key, value, given):
                problems.append(absent.refusal(key, value))
        elif problem := _unknown(key, value):
            problems.append(problem)
        else:
            known[name] = value
    return known


def _unknown(key: str, value: Any) -> str | None:
    """Why there is no such key; None for a key, and for what lies in one."""
    if any(f"{key}.".startswith(f"{name}.") for name in _FIELDS):
        return None
    if any(name.startswith(f"{key}.") for name in _FIELDS):
        return None if value == {} else f"{key}={value}: {key} is a section of keys, such as {key}.{_first_in(key)}."
    return f"unknown key {key}.{closest_key(key, _FIELDS)} (all keys: verl/trainer/config/ppo_trainer.yaml)"


def _first_in(section: str) -> str:
    return next(name.removeprefix(f"{section}.") for name in _FIELDS if name.startswith(f"{section}."))


def _validate(known: dict[str, Any]) -> tuple[RunConfig, dict[str, str]]:
    """The configuration, with the defaults in place of wrong values; and these, by key."""
    try:
        return RunConfig.model_validate(known), {}
    except ValidationError as error:
        wrong = wrong_values(error, RunConfig)
    right = {key: value for key, value in leaves(known) if not any(f"{key}.".startswith(f"{bad}.") for bad in wrong)}
    return RunConfig.model_validate(nested(right)), wrong


def build_reward_kwargs(kwargs: Mapping[str, Any]) -> HiddenRewardConfig:
    """Check `reward_model.reward_kwargs` of the reward manager `hidden`.

    Raises:
        UserError: unknown names (the valid ones are listed), or wrong types.
    """
    prefix, valid = "reward_model.reward_kwargs.", list(HiddenRewardConfig.model_fields)
    problems = [_reward_kwarg_problem(name, valid) for name in kwargs if name not in valid]
    config, wrong = HiddenRewardConfig(), {}
    try:
        config = HiddenRewardConfig.model_validate({name: kwargs[name] for name in kwargs if name in valid})
    except ValidationError as error:
        wrong = wrong_values(error, HiddenRewardConfig)
    problems += [f"{prefix}{text}" for text in wrong.values()]
    if problems:
        raise UserError("\n".join(problems))
    return config


def _reward_kwarg_problem(name: str, valid: list[str]) -> str:
    start = f"reward_model.reward_kwargs.{name} is not known to the reward manager hidden"
    if name in ABSENT_REWARD_KWARGS:
        return f"{start}: {ABSENT_REWARD_KWARGS[name]}."
    close = difflib.get_close_matches(name, valid, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    return f"{start}.{hint} Valid: {', '.join(valid)}."


def multiples_near(value: int, divisor: int) -> str:
    """The multiples of `divisor` around `value`, for an error message."""
    lower = value // divisor * divisor
    return " or ".join(str(v) for v in (lower, lower + divisor) if v > 0)


def _check_required(config: RunConfig) -> Iterator[str]:
    if not config.actor_rollout_ref.model.path:
        yield "actor_rollout_ref.model.path is not set; give a model folder or hub name."
    if config.trainer.resume_mode == "resume_path" and not config.trainer.resume_from_path:
        yield "trainer.resume_mode=resume_path needs trainer.resume_from_path=.../global_step_N."


def _check_data(config: RunConfig) -> Iterator[str]:
    if not config.data.train_files:
        yield "data.train_files is not set; give the train.parquet that process_data.py wrote."
    yield from _missing_files("data.train_files", config.data.train_files)
    if config.validates:
        if not config.data.val_files:
            yield (
                "validation is on (trainer.test_freq or trainer.val_before_train) but data.val_files is not set; "
                "give a parquet file, or set trainer.test_freq=-1 trainer.val_before_train=False."
            )
        yield from _missing_files("data.val_files", config.data.val_files)


def _missing_files(key: str, files: str | list[str] | None) -> Iterator[str]:
    for name in file_list(files):
        if not Path(name).is_file():
            several = f" For several files: {key}=['a.parquet','b.parquet']." if "," in name else ""
            yield f"{key}: the file {name!r} does not exist; make it with process_data.py.{several}"


def _check_batch_sizes(config: RunConfig) -> Iterator[str]:
    size, mini = config.data.train_batch_size, config.actor_rollout_ref.actor.ppo_mini_batch_size
    if size % mini:
        divisors = [d for d in range(1, size + 1) if size % d == 0]
        near = sorted(divisors, key=lambda d: abs(d - mini))[:3]
        yield (
            f"data.train_batch_size={size} is not a multiple of actor_rollout_ref.actor.ppo_mini_batch_size={mini} "
            f"(both count prompts). Nearest: train_batch_size {multiples_near(size, mini)}, "
            f"or ppo_mini_batch_size {', '.join(map(str, sorted(near)))}."
        )
    elif config.data.contrastive_size % config.num_mini_batches:
        contrastive, updates = config.data.contrastive_size, config.num_mini_batches
        yield (
            f"data.contrastive_batch_size={contrastive} is not a multiple of the {updates} mini-batches of a step "
            f"(data.train_batch_size={size} / actor_rollout_ref.actor.ppo_mini_batch_size={mini}). Nearest: "
            f"{multiples_near(contrastive, updates)}."
        )


def _check_without_rationales(config: RunConfig) -> Iterator[str]:
    data, actor = config.data, config.actor_rollout_ref.actor
    if data.think:
        return
    if actor.trains_policy:
        yield (
            f"data.think=False, and actor_rollout_ref.actor.embedding_grad_share={actor.embedding_grad_share}: without "
            "rationales there is no policy gradient. Set the share to 1."
        )
    if config.diagnoses:
        yield (
            f"data.think=False, and trainer.diag_freq={config.trainer.diag_freq}: diagnoses are of rationales. Set "
            "trainer.diag_freq=-1."
        )
    if config.train_mode == "unsupervised":
        yield (
            "data.think=False with data.train_mode=unsupervised: without rationales both vectors of a text are the "
            "same, and there is nothing to learn. Train on triplets, or leave data.think out."
        )


def _check_roles(config: RunConfig) -> Iterator[str]:
    data = config.data
    trained = data.query if data.trained_text == "query" else data.document
    if config.train_mode == "supervised" and not trained.think:
        role, other = ("query", "positive") if data.trained_text == "query" else ("document", "query")
        yield (
            f"data.{role}.think=False, but data.trained_text={data.trained_text} trains what {role} texts think. Leave "
            f"it out, or train the other text: data.trained_text={other}."
        )
    templates = {"data.template": data.template}
    for role, own in (("query", data.query), ("document", data.document)):
        templates[f"data.{role}.template"] = own.template or ""
        if (own.max_new_tokens or 0) > data.max_response_length:
            yield (
                f"data.{role}.max_new_tokens={own.max_new_tokens} is more than "
                f"data.max_response_length={data.max_response_length}. Lower it, or raise that."
            )
    asking = [key for key, template in templates.items() if INSTRUCTION in template]
    if asking and DEFAULT_TASK not in data.instructions:
        yield (
            f"{asking[0]} has {INSTRUCTION}, and data.instructions={data.instructions} has none named {DEFAULT_TASK}, "
            f"for texts whose task is not named. Add it: +data.instructions.{DEFAULT_TASK}='...'."
        )


def _check_micro_batches(config: RunConfig) -> Iterator[str]:
    """Each kind of forward needs a size of micro-batches, its own or the actor's."""
    section = config.actor_rollout_ref
    limits = {
        "actor.ppo": section.actor.update_limit,
        "rollout.log_prob": section.actor.score_limit(section.rollout),
        "ref.log_prob": section.actor.score_limit(section.ref),
    }
    for name, limit in limits.items():
        if limit == (None, None):
            yield (
                f"actor_rollout_ref.{name}_micro_batch_size_per_gpu: micro-batches need a size when dynamic batching "
                "is off; set it, or use_dynamic_bsz=True."
            )


def _check_engine(config: RunConfig) -> Iterator[str]:
    data, rollout = config.data, config.actor_rollout_ref.rollout
    if not data.think:
        return
    prefix = "actor_rollout_ref.rollout."
    needed = config.longest_row
    if rollout.max_model_len is not None and rollout.max_model_len < needed:
        yield (
            f"{prefix}max_model_len={rollout.max_model_len} is less than data.max_prompt_length="
            f"{data.max_prompt_length} + data.max_response_length={data.max_response_length} = {needed}; "
            "leave it out, or lower these two."
        )
    if not rollout.enable_chunked_prefill and rollout.max_num_batched_tokens < (rollout.max_model_len or needed):
        yield (
            f"{prefix}max_num_batched_tokens={rollout.max_num_batched_tokens} cannot take a sequence of "
            f"{rollout.max_model_len or needed} tokens while {prefix}enable_chunked_prefill=False; raise it, or set "
            f"{prefix}enable_chunked_prefill=True."
        )
    if unknown := set(rollout.engine_kwargs) - {"vllm"}:
        yield (f"{prefix}engine_kwargs.{min(unknown)}: only engine_kwargs.vllm is read; put arguments under it.")


def _check_attention(config: RunConfig) -> Iterator[str]:
    model = config.actor_rollout_ref.model
    if "attn_implementation" in model.override_config:
        yield (
            "actor_rollout_ref.model.override_config.attn_implementation has no effect; set "
            "actor_rollout_ref.model.attn_implementation."
        )


def _check_without_ray(config: RunConfig) -> Iterator[str]:
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
            yield (f"{key}={count} needs Ray, and trainer.use_ray=False runs one worker; set it to 1.")


def _check_save_best(config: RunConfig) -> Iterator[str]:
    name = config.trainer.save_best
    if name is None:
        return
    names = sorted(f"val/{metric}" for metric in _validated(config))
    if name not in names:
        yield (f"trainer.save_best={name} is not a metric of this run's validation; use one of {', '.join(names)}.")
    if config.trainer.test_freq <= 0:
        yield (f"trainer.save_best={name} needs validation; set trainer.test_freq to a number of steps.")


def _validated(config: RunConfig) -> set[str]:
    """What validation reports; a reward manager of the user's own may embed or not (`prepare.check_save_best`)."""
    embedded = _METRICS | (_TRIPLET_METRICS if config.train_mode == "supervised" else set())
    embedded -= {"sts_spearman"} if config.data.val_sts_file is None else set()
    by_manager = {"hidden": embedded, "naive": {"reward"}}
    return by_manager.get(config.reward_model.reward_manager, embedded | {"reward"})


def _check_algorithm(config: RunConfig) -> Iterator[str]:
    estimator, n = config.algorithm.adv_estimator, config.actor_rollout_ref.rollout.n
    if why := ABSENT_VALUES["algorithm.adv_estimator"].get(estimator):
        yield (
            f"algorithm.adv_estimator={estimator} is not supported: {why}. Use one of {', '.join(sorted(ESTIMATORS))}."
        )
    manager = config.reward_model.reward_manager
    if why := ABSENT_VALUES["reward_model.reward_manager"].get(manager):
        yield f"reward_model.reward_manager={manager} is not supported: {why}."
    if config.algorithm.estimator.compares_group and n < 2 and config.actor_rollout_ref.actor.trains_policy:
        yield (
            f"actor_rollout_ref.rollout.n={n} with algorithm.adv_estimator={estimator}: a group of one has no "
            "advantage. Set actor_rollout_ref.rollout.n to 2 or more (the paper uses 8)."
        )
    kl, rows = config.algorithm.kl_ctrl, config.data.train_batch_size * n
    # Each step multiplies the coefficient by at least 1 - 0.2 x rows / horizon.
    if config.algorithm.use_kl_in_reward and kl.type == "adaptive" and rows >= 5 * kl.horizon:
        yield (
            f"algorithm.kl_ctrl.horizon={kl.horizon} with {rows} rows a step (data.train_batch_size x rollout.n): one "
            f"step could bring the adaptive coefficient to 0 or below. Set the horizon to {rows // 5 + 1} or more."
        )
    if config.custom_reward_function.path and manager != "naive":
        yield (
            f"custom_reward_function.path={config.custom_reward_function.path} is read by reward_model.reward_manager="
            f"naive only, and this run uses {manager}; change one of them."
        )
    if manager == "hidden":
        yield from _check_reward_kwargs(config)


def _check_reward_kwargs(config: RunConfig) -> Iterator[str]:
    try:
        rewards = build_reward_kwargs(config.reward_model.reward_kwargs)
    except UserError as error:
        yield from str(error).split("\n")
        return
    yield from unread_reward_kwargs(rewards)
    if rewards.contrastive and config.train_mode == "unsupervised":
        for name in ("train_batch_size", "contrastive_batch_size"):
            if getattr(config.data, name) == 1:
                yield (
                    f"data.{name}=1 with reward_model.reward_kwargs.contrastive_weight={rewards.contrastive_weight}: "
                    f"a step of one text has nothing to contrast it with. Set {name} to 2 or more."
                )
    yield from _check_contrastive_weights(config, rewards)


def _check_contrastive_weights(config: RunConfig, rewards: HiddenRewardConfig) -> Iterator[str]:
    """In steps that follow no policy gradient the contrastive loss needs weight."""
    if not rewards.contrastive:
        return
    begins = (1, rewards.contrastive_first_steps + 1)
    for step, setting in dict.fromkeys(found for begin in begins if (found := step_without_policy(config, begin))):
        weight, name = rewards.contrastive_weight_in(step)
        if weight == 0:
            yield (
                f"reward_model.reward_kwargs.{name}=0: with {setting}, step {step} follows no policy gradient, so it "
                f"would train nothing. Set {name} above 0, or have no such step."
            )


def step_without_policy(config: RunConfig, begin: int = 1) -> tuple[int, str] | None:
    """The first step from `begin` on that follows no policy gradient, and the setting that makes it one."""
    if not config.actor_rollout_ref.actor.trains_policy:
        return begin, "actor_rollout_ref.actor.embedding_grad_share=1"
    return config.step_without_rationales(begin)


def _check_kl_loss(config: RunConfig) -> Iterator[str]:
    """A signed estimate has a meaning for tokens that the policy drew; of given texts it would lower the likelihood."""
    actor, bare = config.actor_rollout_ref.actor, config.step_without_rationales()
    if bare and actor.has_kl_loss and actor.kl_loss_type in ("k1", "kl"):
        yield (
            f"actor_rollout_ref.actor.kl_loss_type={actor.kl_loss_type} with {bare[1]}: in these steps the term is of "
            "given texts, whose likelihood it would lower without end. Set it to low_var_kl, mse or abs."
        )


_CHECKS: tuple[Callable[[RunConfig], Iterable[str]], ...] = (
    _check_required,
    _check_batch_sizes,
    _check_without_rationales,
    _check_roles,
    _check_micro_batches,
    _check_engine,
    _check_attention,
    _check_without_ray,
    _check_algorithm,
    _check_kl_loss,
    _check_save_best,
    unread_settings,
)

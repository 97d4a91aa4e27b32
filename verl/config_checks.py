"""Building a checked configuration: unknown keys, wrong types, missing files and bad combinations end here.

Every message names the key, its value and a way out. Imports neither torch, ray nor transformers.
"""

import difflib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from verl.config import HiddenRewardConfig, RunConfig, file_list
from verl.errors import UserError

# Keys of verl 0.4 that mean nothing here. The longest matching prefix wins.
NO_COUNTERPART = {
    "critic": "GRPO has no critic",
    "data.tokenizer": "the tokenizer is the model's",
    "data.image_key": "only text is embedded",
    "data.video_key": "only text is embedded",
    "data.custom_cls": "the dataset is fixed; write its parquet columns instead",
    "data.return_raw_chat": "rows always carry their text",
    "data.return_full_prompt": "rows always carry their text",
    "data.return_raw_input_ids": "rows always carry their ids",
    "data.filter_overlong_prompts_workers": "lengths are measured in batches by the fast tokenizer",
    "data.gen_batch_size": "generation uses data.train_batch_size",
    "data.validation_shuffle": "validation keeps the file's order, so that runs compare",
    "data.use_shm": "files are memory-mapped",
    "data.trust_remote_code": "set actor_rollout_ref.model.trust_remote_code",
    "actor_rollout_ref.model.lora_rank": "full weights are trained",
    "actor_rollout_ref.model.lora_alpha": "full weights are trained",
    "actor_rollout_ref.model.target_modules": "full weights are trained",
    "actor_rollout_ref.model.use_liger": "the packed forward has its own chunked log-probs",
    "actor_rollout_ref.model.use_fused_kernels": "the packed forward has its own chunked log-probs",
    "actor_rollout_ref.model.fused_kernel_options": "the packed forward has its own chunked log-probs",
    "actor_rollout_ref.model.enable_activation_offload": "use enable_gradient_checkpointing",
    "actor_rollout_ref.model.external_lib": "install the package and use trust_remote_code",
    "actor_rollout_ref.model.custom_chat_template": "edit chat_template.jinja in the model's folder",
    "actor_rollout_ref.model.use_shm": "weights are memory-mapped",
    "actor_rollout_ref.actor.ppo_micro_batch_size": "use ppo_micro_batch_size_per_gpu",
    "actor_rollout_ref.actor.policy_loss": "the loss is the dual-clip PPO loss",
    "actor_rollout_ref.actor.ulysses_sequence_parallel_size": "sequences are not split over GPUs",
    "actor_rollout_ref.actor.use_torch_compile": "the actor runs eagerly",
    "actor_rollout_ref.actor.entropy_from_logits_with_chunking": "entropy is always computed in chunks",
    "actor_rollout_ref.actor.entropy_checkpointing": "entropy is always computed in chunks",
    "actor_rollout_ref.actor.checkpoint": "a checkpoint always holds everything, the loadable folder included",
    "actor_rollout_ref.actor.fsdp_config.wrap_policy": "every decoder layer is one FSDP unit",
    "actor_rollout_ref.actor.fsdp_config.forward_prefetch": "FSDP2 prefetches by itself",
    "actor_rollout_ref.actor.fsdp_config.mixed_precision": "float32 masters; bfloat16 compute on CUDA",
    "actor_rollout_ref.actor.fsdp_config.model_dtype": "float32 masters; bfloat16 compute on CUDA",
    "actor_rollout_ref.actor.profiler": "use torch.profiler or nsys around main_ppo",
    "actor_rollout_ref.rollout.multi_turn": "a rationale is one turn",
    "actor_rollout_ref.rollout.agent": "a rationale is one turn",
    "actor_rollout_ref.rollout.prompt_length": "set data.max_prompt_length",
    "actor_rollout_ref.rollout.response_length": "set data.max_response_length",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size": "use log_prob_micro_batch_size_per_gpu",
    "actor_rollout_ref.ref.log_prob_micro_batch_size": "use log_prob_micro_batch_size_per_gpu",
    "reward_model.model": "rewards come from embeddings or rules, not from a reward model",
    "reward_model.sandbox_fusion": "no code is executed for rewards",
    "algorithm.lam": "GAE needs a critic",
    "algorithm.use_pf_ppo": "not part of GRACE",
    "algorithm.pf_ppo": "not part of GRACE",
    "trainer.profile_steps": "use torch.profiler or nsys around main_ppo",
    "trainer.controller_nsight_options": "use nsys around main_ppo",
    "trainer.worker_nsight_options": "use nsys around main_ppo",
    "trainer.log_val_generations": "samples/step_N.jsonl is always written",
    "trainer.rollout_data_dir": "samples/step_N.jsonl is always written",
    "trainer.validation_data_dir": "samples/step_N.jsonl is always written",
    "trainer.val_only": "use eval_mteb.py on the model folder",
    "trainer.default_hdfs_dir": "checkpoints go to a mounted path; copy them from there",
    "trainer.del_local_ckpt_after_load": "checkpoints are only removed by max_actor_ckpt_to_keep",
    "trainer.max_critic_ckpt_to_keep": "GRPO has no critic",
    "trainer.esi_redundant_time": "not part of GRACE",
    "trainer.ray_wait_register_center_timeout": "workers get their address directly",
    "ray_init.timeline_json_file": "use ray timeline",
}


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
        raise UserError("\n".join(_explain(e) for e in error.errors())) from None
    _check_required(config)
    _check_fixed(config)
    _check_sizes(config)
    _check_engine(config)
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


def walk_fields(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
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
        reward = HiddenRewardConfig.model_validate(dict(kwargs))
    except ValidationError as error:
        raise UserError("\n".join(_explain(e, "reward_model.reward_kwargs.") for e in error.errors())) from None
    if reward.temperature <= 0:
        raise UserError(f"reward_model.reward_kwargs.temperature={reward.temperature} must be above 0.")
    return reward


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


def _explain(error: Any, prefix: str = "") -> str:
    key = prefix + ".".join(str(part) for part in error["loc"] if part in _FIELD_NAMES)
    return f"{key}={error['input']!r}: {error['msg']}."


def _field_names() -> set[str]:
    names = {part for key, _ in walk_fields(RunConfig) for part in key.split(".")}
    return names | set(HiddenRewardConfig.model_fields)


_FIELD_NAMES = _field_names()


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


def _check_fixed(config: RunConfig) -> None:
    rollout, model = config.actor_rollout_ref.rollout, config.actor_rollout_ref.model
    full = "training sampling must keep the full distribution, or the importance ratio is biased; use temperature"
    fixed: list[tuple[str, Any, Any, str]] = [
        (
            "actor_rollout_ref.hybrid_engine",
            config.actor_rollout_ref.hybrid_engine,
            True,
            "devices are shared",
        ),
        (
            "actor_rollout_ref.model.use_remove_padding",
            model.use_remove_padding,
            True,
            "every forward is packed",
        ),
        ("actor_rollout_ref.rollout.top_p", rollout.top_p, 1.0, full),
        ("actor_rollout_ref.rollout.top_k", rollout.top_k, -1, full),
        (
            "actor_rollout_ref.rollout.do_sample",
            rollout.do_sample,
            True,
            "a greedy group has no spread to learn from",
        ),
        ("reward_model.enable", config.reward_model.enable, False, "rewards come from embeddings or rules"),
        (
            "reward_model.launch_reward_fn_async",
            config.reward_model.launch_reward_fn_async,
            False,
            "rewards are computed in the step",
        ),
        ("trainer.critic_warmup", config.trainer.critic_warmup, 0, "there is no critic"),
        (
            "trainer.balance_batch",
            config.trainer.balance_batch,
            True,
            "rows are spread over ranks by their tokens",
        ),
    ]
    for key, value, only, why in fixed:
        if value != only:
            raise UserError(f"{key}={value} is not supported: {why}. Set it to {only} or leave it out.")


def _check_sizes(config: RunConfig) -> None:
    data, actor, rollout = config.data, config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    positive = {
        "data.train_batch_size": data.train_batch_size,
        "data.max_prompt_length": data.max_prompt_length,
        "data.max_response_length": data.max_response_length,
        "data.val_max_samples": data.val_max_samples,
        "actor_rollout_ref.actor.ppo_mini_batch_size": actor.ppo_mini_batch_size,
        "actor_rollout_ref.actor.ppo_epochs": actor.ppo_epochs,
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": actor.ppo_max_token_len_per_gpu,
        "actor_rollout_ref.actor.grad_clip": actor.grad_clip,
        "actor_rollout_ref.actor.optim.lr": actor.optim.lr,
        "actor_rollout_ref.rollout.n": rollout.n,
        "actor_rollout_ref.rollout.temperature": rollout.temperature,
        "actor_rollout_ref.rollout.anchor_temperature": rollout.anchor_temperature,
        "actor_rollout_ref.rollout.max_num_seqs": rollout.max_num_seqs,
        "actor_rollout_ref.rollout.max_num_batched_tokens": rollout.max_num_batched_tokens,
        "actor_rollout_ref.rollout.tensor_model_parallel_size": rollout.tensor_model_parallel_size,
        "trainer.nnodes": config.trainer.nnodes,
        "trainer.total_epochs": config.trainer.total_epochs,
    }
    for key, value in positive.items():
        if value <= 0:
            raise UserError(f"{key}={value} must be above 0.")
    for key, optional in {
        "trainer.n_gpus_per_node": config.trainer.n_gpus_per_node,
        "trainer.total_training_steps": config.trainer.total_training_steps,
        "trainer.max_actor_ckpt_to_keep": config.trainer.max_actor_ckpt_to_keep,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": actor.ppo_micro_batch_size_per_gpu,
    }.items():
        if optional is not None and optional <= 0:
            raise UserError(f"{key}={optional} must be above 0, or null.")
    if config.trainer.phase_timeout_s < 0:
        raise UserError(
            f"trainer.phase_timeout_s={config.trainer.phase_timeout_s} must be 0 or more; 0 waits for ever."
        )
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
    if not 0 < rollout.gpu_memory_utilization <= 1:
        raise UserError(f"{prefix}gpu_memory_utilization={rollout.gpu_memory_utilization} must be above 0, at most 1.")
    if unknown := set(rollout.engine_kwargs) - {"vllm"}:
        raise UserError(f"{prefix}engine_kwargs.{min(unknown)} belongs to no engine; put arguments under .vllm.")


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
    if config.actor_rollout_ref.actor.clip_ratio_c <= 1:
        raise UserError(
            f"actor_rollout_ref.actor.clip_ratio_c={config.actor_rollout_ref.actor.clip_ratio_c} must be above 1."
        )
    if config.custom_reward_function.path and config.reward_model.reward_manager != "naive":
        raise UserError(
            f"custom_reward_function.path={config.custom_reward_function.path} is read by reward_model.reward_manager="
            f"naive only, and that is {config.reward_model.reward_manager}; set one of them."
        )
    if config.reward_model.reward_manager == "hidden":
        build_reward_kwargs(config.reward_model.reward_kwargs)

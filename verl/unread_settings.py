"""Settings that nothing reads in the combination at hand.

One that would change results is an error (`unread_settings`). One that only changes memory or time, which people keep
in a command line for several machines, is a line at the start of the run (`start_notes`).
"""

from collections.abc import Callable, Collection, Iterator
from functools import reduce
from typing import Any, NamedTuple

from pydantic import BaseModel

from verl.config import HiddenRewardConfig, MicroBatchLimit, RunConfig
from verl.config_fields import walk_fields


class Reader(NamedTuple):
    """What reads some keys."""

    keys: tuple[str, ...]
    needs: str
    """The condition in words."""
    holds: Callable[[Any], bool]
    no_op: tuple[Any, ...] = ()
    """Values that say the same as not reading the key."""


_ACTOR, _ROLLOUT, _REF = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.ref"
_MODEL = "actor_rollout_ref.model"
_BY_HAND = ("param_offload", "optimizer_offload")
_FLAGS = (*_BY_HAND, "offload_policy")
_OFFLOAD = tuple(f"{section}.fsdp_config.{flag}" for section in (_ACTOR, _REF) for flag in _FLAGS)
_OF_REFERENCE = tuple(key for key, _ in walk_fields(RunConfig) if key.startswith(f"{_REF}."))
_VLLM_ONLY = tuple(
    f"{_ROLLOUT}.{name}"
    for name in (
        "gpu_memory_utilization", "enforce_eager", "enable_chunked_prefill", "free_cache_engine", "load_format",
        "max_num_batched_tokens", "max_model_len", "engine_kwargs",
    )
)  # fmt: skip


_WRITING_ONLY = (
    *_VLLM_ONLY,
    *(
        f"{_ROLLOUT}.{name}"
        for name in (
            "name", "n", "anchor_temperature", "ignore_eos", "max_num_seqs", "dtype", "check_weight_sync",
            "tensor_model_parallel_size", "val_kwargs.do_sample", "val_kwargs.temperature",
        )
    ),
)  # fmt: skip


def _actor(config: RunConfig) -> Any:
    return config.actor_rollout_ref.actor


def _limits(config: RunConfig) -> list[MicroBatchLimit]:
    """The limits of micro-batches: of the update, of scoring, and of the reference."""
    section = config.actor_rollout_ref
    actor = section.actor
    return [actor.update_limit, actor.score_limit(section.rollout), actor.score_limit(section.ref)]


def _has_the_actors_budget(config: RunConfig, section: Any) -> bool:
    """verl's YAML refers to the actor's value, which asks for nothing."""
    return bool(section.log_prob_max_token_len_per_gpu == _actor(config).ppo_max_token_len_per_gpu)


# A recipe may bring these, and embedding_grad_share=1 is how to be rid of the policy gradient.
_POLICY_ONLY = (
    f"{_ACTOR}.embedding_grad_every", f"{_ACTOR}.tis_imp_ratio_cap",
    *(f"{_ACTOR}.clip_ratio{part}" for part in ("", "_low", "_high", "_c")),
    *(f"algorithm.{name}" for name in ("adv_estimator", "norm_adv_by_std_in_grpo", "gamma")),
)  # fmt: skip


_VALIDATION_ONLY = (
    "data.val_batch_size", "data.val_max_samples", "data.val_sts_file", f"{_ROLLOUT}.val_kwargs.do_sample",
)  # fmt: skip


def _may_train_embeddings(config: RunConfig) -> bool:
    """Whether the reward manager can give a gradient on the embeddings; one of the user's own may."""
    return config.reward_model.reward_manager not in ("hidden", "naive") or config.reward_model.contrastive


READERS = (
    Reader(
        ("trainer.resume_from_path",), "trainer.resume_mode=resume_path",
        lambda c: c.trainer.resume_mode == "resume_path",
    ),
    Reader(
        ("trainer.resume_force",), "trainer.resume_mode=auto or resume_path",
        lambda c: c.trainer.resume_mode != "disable",
    ),
    Reader(
        ("trainer.max_actor_ckpt_to_keep", "trainer.report"), "trainer.save_freq other than 0, or trainer.save_best",
        lambda c: c.saves,
    ),
    Reader(
        ("custom_reward_function.name", "custom_reward_function.reward_kwargs"), "custom_reward_function.path",
        lambda c: c.custom_reward_function.path is not None,
    ),
    Reader(
        (f"{_ACTOR}.optim.min_lr_ratio", f"{_ACTOR}.optim.num_cycles"), f"{_ACTOR}.optim.warmup_style=cosine",
        lambda c: _actor(c).optim.warmup_style == "cosine",
    ),
    Reader(
        (f"{_ACTOR}.optim.lr_warmup_steps_ratio",), f"{_ACTOR}.optim.lr_warmup_steps=-1",
        lambda c: _actor(c).optim.lr_warmup_steps < 0,
    ),
    Reader(
        (f"{_ACTOR}.clip_ratio",), f"{_ACTOR}.clip_ratio_low or clip_ratio_high left out",
        lambda c: _actor(c).clip_ratio_low is None or _actor(c).clip_ratio_high is None,
    ),
    Reader(
        (f"{_ACTOR}.ppo_max_token_len_per_gpu",), f"{_ACTOR}.use_dynamic_bsz=True",
        lambda c: any(limit.max_tokens for limit in _limits(c)),
    ),
    Reader(
        (f"{_ACTOR}.ppo_micro_batch_size_per_gpu",), f"{_ACTOR}.use_dynamic_bsz=False",
        lambda c: any(limit.max_rows for limit in _limits(c)),
    ),
    Reader(
        (f"{_ROLLOUT}.log_prob_max_token_len_per_gpu",), f"{_ROLLOUT}.log_prob_use_dynamic_bsz=True",
        lambda c: _limits(c)[1].max_tokens is not None or _has_the_actors_budget(c, c.actor_rollout_ref.rollout),
    ),
    Reader(
        (f"{_ROLLOUT}.log_prob_micro_batch_size_per_gpu",), f"{_ROLLOUT}.log_prob_use_dynamic_bsz=False",
        lambda c: _limits(c)[1].max_rows is not None,
    ),
    Reader(
        (f"{_REF}.log_prob_max_token_len_per_gpu",), f"{_REF}.log_prob_use_dynamic_bsz=True",
        lambda c: _limits(c)[2].max_tokens is not None or _has_the_actors_budget(c, c.actor_rollout_ref.ref),
    ),
    Reader(
        (f"{_REF}.log_prob_micro_batch_size_per_gpu",), f"{_REF}.log_prob_use_dynamic_bsz=False",
        lambda c: _limits(c)[2].max_rows is not None,
    ),
    Reader(
        (f"{_ACTOR}.kl_loss_coef", f"{_ACTOR}.kl_loss_type"), f"{_ACTOR}.use_kl_loss=True",
        lambda c: _actor(c).use_kl_loss, no_op=(0,),
    ),
    Reader(
        ("algorithm.kl_penalty", "algorithm.kl_ctrl.kl_coef", "algorithm.kl_ctrl.type"),
        "algorithm.use_kl_in_reward=True", lambda c: c.algorithm.use_kl_in_reward, no_op=(0,),
    ),
    Reader(
        ("algorithm.kl_ctrl.type",), "algorithm.kl_ctrl.kl_coef above 0",
        lambda c: not c.algorithm.use_kl_in_reward or c.algorithm.kl_ctrl.kl_coef > 0,
    ),
    Reader(
        ("algorithm.kl_ctrl.horizon", "algorithm.kl_ctrl.target_kl"), "algorithm.kl_ctrl.type=adaptive",
        lambda c: c.algorithm.kl_ctrl.type == "adaptive",
    ),
    Reader(
        ("algorithm.gamma",), "algorithm.adv_estimator=reinforce_plus_plus, or an estimator of your own",
        lambda c: c.algorithm.estimator.reads_gamma,
    ),
    Reader(
        (f"{_ROLLOUT}.val_kwargs.temperature",), f"{_ROLLOUT}.val_kwargs.do_sample=True",
        lambda c: c.actor_rollout_ref.rollout.val_kwargs.do_sample, no_op=(0,),
    ),
    Reader(
        ("data.seed",), f"data.shuffle=True or {_ACTOR}.shuffle=True", lambda c: c.data.shuffle or _actor(c).shuffle
    ),
    Reader(
        (f"{_MODEL}.lora_alpha", f"{_MODEL}.target_modules"), f"{_MODEL}.lora_rank above 0",
        lambda c: c.actor_rollout_ref.model.lora_rank > 0,
    ),
    Reader(
        ("trainer.merge_lora",), f"{_MODEL}.lora_rank above 0, or lora_adapter_path",
        lambda c: c.actor_rollout_ref.model.trains_adapter,
    ),
    Reader(
        ("data.negatives_per_query",), "data.train_mode=supervised and a reward_model.reward_manager other than naive",
        lambda c: c.train_mode == "supervised" and c.reward_model.reward_manager != "naive",
    ),
    Reader(
        (f"{_ROLLOUT}.anchor_temperature",), "a reward_model.reward_manager other than naive",
        lambda c: c.reward_model.reward_manager != "naive",
    ),
    Reader(
        (
            f"{_ACTOR}.embedding_grad_share", f"{_ACTOR}.embedding_grad_every", "trainer.contrastive_warmup_steps",
            "trainer.contrastive_steps_between",
        ),
        "reward_model.reward_kwargs.contrastive_weight above 0, or a reward manager of your own", _may_train_embeddings,
    ),
    Reader(
        ("trainer.contrastive_warmup_steps", "trainer.contrastive_steps_between"), "data.think=True",
        lambda c: c.data.think,
    ),
    Reader(
        ("data.contrastive_batch_size",),
        "data.think=True and trainer.contrastive_warmup_steps or contrastive_steps_between above 0",
        lambda c: c.data.think and c.step_without_rationales() is not None,
    ),
    Reader(
        ("algorithm.use_kl_in_reward",), f"{_ACTOR}.embedding_grad_share below 1",
        lambda c: _actor(c).trains_policy or not c.algorithm.has_kl_in_reward,
    ),
    Reader(
        (f"{_ACTOR}.entropy_coeff",), f"{_ACTOR}.embedding_grad_share below 1", lambda c: _actor(c).trains_policy
    ),
    Reader(
        ("trainer.diag_texts", "trainer.diag_log_likelihood"), "trainer.diag_freq above 0", lambda c: c.diagnoses
    ),
    Reader(_VLLM_ONLY, f"{_ROLLOUT}.name=vllm", lambda c: c.actor_rollout_ref.rollout.name != "hf"),
)  # fmt: skip

REWARD_READERS = (
    Reader(("with_scale",), "objective=grace", lambda c: c.objective == "grace"),
    Reader(("clustering_weight",), "enable_clustering=True", lambda c: c.enable_clustering, no_op=(0,)),
    Reader(
        ("cross_group_weight",), "objective=grace and enable_clustering=True",
        lambda c: c.objective == "grace" and c.enable_clustering, no_op=(0,),
    ),
    Reader(
        ("length_penalty",), "objective=infonce and enable_length_penalty=True",
        lambda c: c.objective == "infonce" and c.enable_length_penalty,
    ),
    Reader(("contrastive_temperature", "contrastive_anchors"), "contrastive_weight above 0", lambda c: c.contrastive),
    Reader(
        ("contrastive_first_weight",), "contrastive_first_steps above 0", lambda c: c.contrastive_first_steps > 0
    ),
    Reader(
        ("contrastive_first_steps",), "contrastive_first_weight", lambda c: c.contrastive_first_weight is not None
    ),
)  # fmt: skip


def unread_settings(config: RunConfig) -> Iterator[str]:
    """An error for each setting that was given and that nothing reads."""
    yield from _unread(config, READERS, "")


def unread_reward_kwargs(config: HiddenRewardConfig) -> Iterator[str]:
    """As `unread_settings`, of the reward manager `hidden`."""
    yield from _unread(config, REWARD_READERS, "reward_model.reward_kwargs.")


def _unread(config: BaseModel, readers: tuple[Reader, ...], prefix: str) -> Iterator[str]:
    for key, value in _changed(config).items():
        for reader in readers:
            if key in reader.keys and value not in reader.no_op and not reader.holds(config):
                yield (
                    f"{prefix}{key}={value} has no effect: it is read with {reader.needs} only. Set that, or leave "
                    f"{key.rpartition('.')[2]} out."
                )


def _changed(config: BaseModel) -> dict[str, Any]:
    """The settings that differ from their defaults, by key."""
    values = {
        key: (reduce(getattr, key.split("."), config), field.get_default(call_default_factory=True))
        for key, field in walk_fields(type(config))
    }
    return {key: value for key, (value, default) in values.items() if value != default}


def start_notes(config: RunConfig, device: str) -> Iterator[tuple[str, str]]:
    """What a person should know of settings that are accepted, as (setting, note) lines.

    Args:
        config: with the engine's name resolved.
        device: cuda or cpu.
    """
    rollout = config.actor_rollout_ref.rollout
    has_vllm = config.data.think and rollout.name == "vllm"
    if has_vllm and device == "cuda" and not rollout.free_cache_engine:
        yield (
            "free_cache_engine=False",
            f"vllm keeps {rollout.gpu_memory_utilization:.0%} of each GPU while training; to train with that memory "
            "leave it out",
        )
    if has_vllm and device == "cpu":
        yield "", "on a CPU vllm neither sleeps (free_cache_engine) nor splits prompts"
        yield "", "(enable_chunked_prefill); these settings have no effect"
    # Keys have dots and names of reward arguments have none, so both can stand in one list.
    given = [*_changed(config), *config.reward_model.reward_kwargs]
    for keys, why in _unread_here(config, device):
        if told := [key for key in given if key in keys]:
            yield f"no effect {why}", ", ".join(told)


def _unread_here(config: RunConfig, device: str) -> Iterator[tuple[Collection[str], str]]:
    """Keys that this machine, or what the run found on it, leaves without effect; and in which case."""
    section = config.actor_rollout_ref
    if device == "cpu":
        yield (*_OFFLOAD, f"{_ROLLOUT}.dtype"), "on a CPU"
    elif section.actor.strategy == "fsdp":
        yield [key for key in _OFFLOAD if key.endswith("offload_policy")], "with actor.strategy=fsdp"
    else:
        yield list(_left_to_torch(config)), "with fsdp_config.offload_policy=True"
    if section.rollout.name == "hf":
        yield _VLLM_ONLY, "with the engine hf"
    if not config.scores_by_untrained:
        yield _OF_REFERENCE, "without a reference model"
    rewards = config.reward_model.reward_kwargs
    if rewards.get("with_scale") is False and rewards.get("objective", "grace") == "grace":
        # A recipe may bring a temperature, and with_scale=False is how to be rid of it.
        yield ["temperature"], "with with_scale=False"
    if not section.actor.trains_policy:
        # A KL term weighs its tokens too.
        without = _POLICY_ONLY if section.actor.has_kl_loss else (*_POLICY_ONLY, f"{_ACTOR}.loss_agg_mode")
        yield without, "without a policy gradient"
    elif not config.algorithm.estimator.reads_std:
        yield ["algorithm.norm_adv_by_std_in_grpo"], f"with adv_estimator={config.algorithm.adv_estimator}"
    if not config.data.think:
        yield _WRITING_ONLY, "without rationales"
    if not config.validates:
        yield _VALIDATION_ONLY, "without validation"
    if not config.trainer.use_ray:
        yield ["trainer.phase_timeout_s", "ray_init.num_cpus"], "without Ray"
    if config.num_mini_batches == 1:
        yield [f"{_ACTOR}.shuffle"], "with one mini-batch a step"


def _left_to_torch(config: RunConfig) -> Iterator[str]:
    """The flags of what torch's offload policy keeps in host memory anyway."""
    sections = {_ACTOR: _actor(config).fsdp_config, _REF: config.actor_rollout_ref.ref.fsdp_config}
    for name, fsdp in sections.items():
        if _actor(config).offload(fsdp).by_torch:
            yield from (f"{name}.fsdp_config.{flag}" for flag in _BY_HAND)

"""Keys of verl 0.4 that set nothing here: the reason, and the one value that some of them can have.

All keys of verl 0.4.0 and 0.4.1 with their defaults are in `verl_defaults.yaml`. docs/from-verl.md is made of both.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

_DEFAULTS = Path(__file__).parent / "verl_defaults.yaml"


@dataclass(frozen=True)
class Absent:
    """A key or section of verl that does not exist here.

    null, False and verl's own default pass: with them verl does what happens here anyway. Of a key with `only`, that
    value alone passes.
    """

    why: str
    """The reason, or what to use instead."""
    passes: bool = False
    """Every value passes, because none would change a result: the work is done in another way."""
    switch: str | None = None
    """verl ignores this key unless that one is on: while it is off, any value passes."""
    only: Any = None
    """The one value that passes; None = several do."""

    def refusal(self, key: str, value: Any) -> str:
        """What is wrong with a value that does not pass."""
        if self.only is not None:
            return f"{key}={value} is not supported: {self.why}. Set it to {self.only} or leave it out."
        return f"{key}={value} is a key of verl that has no counterpart here: {self.why}."


_TEXT_ONLY = Absent("only text is embedded", passes=True)
_SAMPLES = Absent("samples/step_N.jsonl is always written")
_PROFILE = Absent("use torch.profiler or nsys around main_ppo")
_KERNELS = Absent("the packed forward has its own chunked log-probs", passes=True)
_CHUNKED = Absent("entropy is always computed in chunks", passes=True)
_EAGER = Absent("the models run eagerly", passes=True)
_NOT_SPLIT = Absent("sequences are not split over GPUs")
_PRECISION = Absent("float32 masters; bfloat16 compute on CUDA")
_NO_REWARD_MODEL = Absent("rewards come from embeddings or rules, not from a reward model")
_ONE_TURN = Absent("a rationale is one turn", switch="actor_rollout_ref.rollout.multi_turn.enable")
_NOT_GRACE = Absent("not part of GRACE")
_OVERLONG = "use reward_model.reward_kwargs.enable_length_penalty"
_VALIDATION = Absent("validation writes one rationale per text, greedily or at val_kwargs.temperature")
_FULL_DISTRIBUTION = (
    "training sampling must keep the full distribution, or the importance ratio is biased; use temperature"
)

# The longest entry that a key begins with counts.
ABSENT: dict[str, Absent] = {
    "critic": Absent("GRPO has no critic"),
    "data.tokenizer": Absent("the tokenizer is the model's"),
    "data.image_key": _TEXT_ONLY,
    "data.video_key": _TEXT_ONLY,
    "data.custom_cls": Absent("the dataset is fixed; write its parquet columns instead"),
    "data.return_raw_chat": Absent("rows always carry their text", passes=True),
    "data.return_full_prompt": Absent("rows always carry their text", passes=True),
    "data.return_raw_input_ids": Absent("rows always carry their ids", passes=True),
    "data.filter_overlong_prompts_workers": Absent(
        "lengths are measured in batches by the fast tokenizer", passes=True
    ),
    "data.gen_batch_size": Absent("generation uses data.train_batch_size"),
    "data.validation_shuffle": Absent("validation keeps the file's order, so that runs compare"),
    "data.use_shm": Absent("files are memory-mapped", passes=True),
    "data.cache_dir": Absent("files are read where they are", passes=True),
    "data.need_tools_kwargs": Absent("a rationale is one turn"),
    "data.filter_prompts": Absent("use data.filter_overlong_prompts"),
    "data.chat_template_func": Absent("edit chat_template.jinja in the model's folder"),
    "data.trust_remote_code": Absent("set actor_rollout_ref.model.trust_remote_code"),
    "actor_rollout_ref.hybrid_engine": Absent("generation and training share the devices", only=True),
    "actor_rollout_ref.model.use_remove_padding": Absent("every forward is packed", only=True),
    "actor_rollout_ref.model.use_liger": _KERNELS,
    "actor_rollout_ref.model.use_fused_kernels": _KERNELS,
    "actor_rollout_ref.model.fused_kernel_options": _KERNELS,
    "actor_rollout_ref.model.enable_activation_offload": Absent("use enable_gradient_checkpointing"),
    "actor_rollout_ref.model.external_lib": Absent("install the package and use trust_remote_code"),
    "actor_rollout_ref.model.custom_chat_template": Absent("edit chat_template.jinja in the model's folder"),
    "actor_rollout_ref.model.use_shm": Absent("weights are memory-mapped", passes=True),
    "actor_rollout_ref.model.use_efficient_resharding": Absent("weights go to the engine one by one", passes=True),
    "actor_rollout_ref.actor.ppo_micro_batch_size": Absent("use ppo_micro_batch_size_per_gpu"),
    "actor_rollout_ref.actor.policy_loss": Absent("the loss is the dual-clip PPO loss"),
    "actor_rollout_ref.actor.ulysses_sequence_parallel_size": _NOT_SPLIT,
    "actor_rollout_ref.actor.use_torch_compile": _EAGER,
    "actor_rollout_ref.actor.use_token_level_loss": Absent("use actor_rollout_ref.actor.loss_agg_mode"),
    "actor_rollout_ref.actor.entropy_from_logits_with_chunking": _CHUNKED,
    "actor_rollout_ref.actor.entropy_checkpointing": _CHUNKED,
    "actor_rollout_ref.actor.checkpoint": Absent("a checkpoint always holds everything, the loadable folder included"),
    "actor_rollout_ref.actor.optim.total_training_steps": Absent("set trainer.total_training_steps"),
    "actor_rollout_ref.actor.fsdp_config.grad_offload": Absent("there is no separate switch for gradients"),
    "actor_rollout_ref.actor.fsdp_config.wrap_policy": Absent("every decoder layer is one FSDP unit", passes=True),
    "actor_rollout_ref.actor.fsdp_config.forward_prefetch": Absent("FSDP2 prefetches by itself", passes=True),
    "actor_rollout_ref.actor.fsdp_config.mixed_precision": _PRECISION,
    "actor_rollout_ref.actor.fsdp_config.model_dtype": _PRECISION,
    "actor_rollout_ref.actor.fsdp_config.use_orig_params": Absent("FSDP2 always keeps the parameters", passes=True),
    "actor_rollout_ref.actor.profiler": _PROFILE,
    "actor_rollout_ref.ref.strategy": Absent("the reference is sharded as the actor: set actor.strategy"),
    "actor_rollout_ref.ref.fsdp_config.wrap_policy": Absent("every decoder layer is one FSDP unit", passes=True),
    "actor_rollout_ref.ref.fsdp_config.forward_prefetch": Absent("FSDP2 prefetches by itself", passes=True),
    "actor_rollout_ref.ref.use_torch_compile": _EAGER,
    "actor_rollout_ref.ref.ulysses_sequence_parallel_size": _NOT_SPLIT,
    "actor_rollout_ref.ref.entropy_from_logits_with_chunking": _CHUNKED,
    "actor_rollout_ref.ref.entropy_checkpointing": _CHUNKED,
    "actor_rollout_ref.ref.profiler": _PROFILE,
    "actor_rollout_ref.ref.log_prob_micro_batch_size": Absent("use log_prob_micro_batch_size_per_gpu"),
    "actor_rollout_ref.rollout.multi_turn": _ONE_TURN,
    "actor_rollout_ref.rollout.mode": Absent("generation and training take turns", only="sync"),
    "actor_rollout_ref.rollout.top_p": Absent(_FULL_DISTRIBUTION, only=1.0),
    "actor_rollout_ref.rollout.top_k": Absent(_FULL_DISTRIBUTION, only=-1),
    "actor_rollout_ref.rollout.do_sample": Absent("a greedy group has no spread to learn from", only=True),
    "actor_rollout_ref.rollout.calculate_log_probs": Absent("engine and trainer are compared in every step", only=True),
    "actor_rollout_ref.rollout.agent": Absent("a rationale is one turn", passes=True),
    "actor_rollout_ref.rollout.chat_scheduler": Absent("a rationale is one turn"),
    "actor_rollout_ref.rollout.use_fire_sampling": Absent("the first token is drawn at rollout.temperature too"),
    "actor_rollout_ref.rollout.prompt_length": Absent("set data.max_prompt_length"),
    "actor_rollout_ref.rollout.response_length": Absent("set data.max_response_length"),
    "actor_rollout_ref.rollout.log_prob_micro_batch_size": Absent("use log_prob_micro_batch_size_per_gpu"),
    "actor_rollout_ref.rollout.limit_images": _TEXT_ONLY,
    "actor_rollout_ref.rollout.layered_summon": Absent("weights are always gathered one by one", passes=True),
    "actor_rollout_ref.rollout.disable_log_stats": Absent("the engine's own statistics are off", passes=True),
    "actor_rollout_ref.rollout.multi_stage_wake_up": Absent(
        "the engine always wakes in two stages: weights, then its cache", passes=True
    ),
    "actor_rollout_ref.rollout.engine_kwargs.sglang": Absent("the engine is vllm or hf"),
    "actor_rollout_ref.rollout.engine_kwargs.vllm.disable_mm_preprocessor_cache": _TEXT_ONLY,
    "actor_rollout_ref.rollout.val_kwargs.top_k": _VALIDATION,
    "actor_rollout_ref.rollout.val_kwargs.top_p": _VALIDATION,
    "actor_rollout_ref.rollout.val_kwargs.n": _VALIDATION,
    "actor_rollout_ref.rollout.profiler": _PROFILE,
    "reward_model.strategy": _NO_REWARD_MODEL,
    "reward_model.enable": Absent("rewards come from embeddings or rules", only=False),
    "reward_model.launch_reward_fn_async": Absent("rewards are computed in the step", only=False),
    "reward_model.model": _NO_REWARD_MODEL,
    "reward_model.micro_batch_size": _NO_REWARD_MODEL,
    "reward_model.micro_batch_size_per_gpu": _NO_REWARD_MODEL,
    "reward_model.max_length": _NO_REWARD_MODEL,
    "reward_model.ulysses_sequence_parallel_size": _NO_REWARD_MODEL,
    "reward_model.use_dynamic_bsz": _NO_REWARD_MODEL,
    "reward_model.forward_max_token_len_per_gpu": _NO_REWARD_MODEL,
    "reward_model.profiler": _PROFILE,
    "reward_model.sandbox_fusion": Absent("no code is executed for rewards", switch="reward_model.sandbox_fusion.url"),
    "reward_model.overlong_buffer": Absent(_OVERLONG, switch="reward_model.overlong_buffer.enable"),
    "custom_reward_function.overlong_buffer": Absent(_OVERLONG, switch="custom_reward_function.overlong_buffer.enable"),
    "algorithm.lam": Absent("GAE needs a critic"),
    "algorithm.use_pf_ppo": _NOT_GRACE,
    "algorithm.pf_ppo": Absent("not part of GRACE", switch="algorithm.use_pf_ppo"),
    "algorithm.filter_groups": Absent(
        "groups without spread are trained too, with advantage 0 (group/flat_share counts them)",
        switch="algorithm.filter_groups.enable",
    ),
    "trainer.profile_steps": _PROFILE,
    "trainer.critic_warmup": Absent("there is no critic", only=0),
    "trainer.balance_batch": Absent("rows are spread over ranks by their tokens", only=True),
    "trainer.controller_nsight_options": Absent("use nsys around main_ppo", switch="trainer.profile_steps"),
    "trainer.worker_nsight_options": Absent("use nsys around main_ppo", switch="trainer.profile_steps"),
    "trainer.log_val_generations": _SAMPLES,
    "trainer.rollout_data_dir": _SAMPLES,
    "trainer.validation_data_dir": _SAMPLES,
    "trainer.val_only": Absent("use eval_mteb.py on the model folder"),
    "trainer.default_hdfs_dir": Absent("checkpoints go to a mounted path; copy them from there"),
    "trainer.del_local_ckpt_after_load": Absent("checkpoints are only removed by max_actor_ckpt_to_keep"),
    "trainer.remove_previous_ckpt_in_save": Absent("checkpoints are only removed by max_actor_ckpt_to_keep"),
    "trainer.max_critic_ckpt_to_keep": Absent("GRPO has no critic"),
    "trainer.wandb_proxy": Absent("export HTTPS_PROXY"),
    "trainer.esi_redundant_time": _NOT_GRACE,
    "trainer.ray_wait_register_center_timeout": Absent("workers get their address directly", passes=True),
    "ray_init.timeline_json_file": Absent("use ray timeline"),
}

ONLY_VALUES = {key: absent.only for key, absent in ABSENT.items() if absent.only is not None}
"""The keys that pass at one value alone, which is that of every run."""

_MEGATRON = "models are sharded by torch FSDP2; use fsdp or fsdp2"
_VERL_REWARDS = "use naive with custom_reward_function.path, or hidden"
# Key: {value of verl: why it does not exist here}.
ABSENT_VALUES: dict[str, dict[str, str]] = {
    "actor_rollout_ref.actor.strategy": {"megatron": _MEGATRON},
    "actor_rollout_ref.model.attn_implementation": {
        "flash_attention_2": "use varlen, by which torch has the same kernel"
    },
    "actor_rollout_ref.rollout.name": {"sglang": "use vllm or hf", "naive": "use hf"},
    "algorithm.adv_estimator": {
        "gae": "it needs a critic (value model)",
        "remax": "it needs a greedy rollout of each prompt",
    },
    "reward_model.reward_manager": {"dapo": _VERL_REWARDS, "batch": _VERL_REWARDS, "prime": _VERL_REWARDS},
    "trainer.device": {"npu": "use cuda or cpu"},
}

# Arguments of verl's and of the GRACE authors' reward managers that `hidden` does not take: what to use.
ABSENT_REWARD_KWARGS = {
    "custom_prompt": "the instruction is the system turn of the data; write another with process_data.py "
    "--system_prompt. For where pooling starts use exclude_system_prompt",
    "overlong_buffer_cfg": "use enable_length_penalty",
    "max_resp_len": "data.max_response_length is the limit",
    "num_examine": "trainer.samples_per_step rationales are written to samples/",
}

# What differs in a key that exists here under the same name, beyond its default.
DIFFERENCES = {
    "actor_rollout_ref.actor.clip_ratio": "in verl the defaults of clip_ratio_low and _high win over it",
    "actor_rollout_ref.actor.use_dynamic_bsz": "null = off where ppo_micro_batch_size_per_gpu is set",
    "actor_rollout_ref.model.lora_rank": "the engine gets merged weights, so vllm needs no load_format of its own",
    "actor_rollout_ref.rollout.free_cache_engine": "in verl 0.4 vllm frees its memory whatever this says; here False "
    "keeps it allocated while training",
    "actor_rollout_ref.rollout.val_kwargs.temperature": "read with do_sample=True only",
    "algorithm.adv_estimator": "gae and remax do not exist here",
    "trainer.total_epochs": "in verl the run ends with whichever comes first; here total_training_steps wins",
    "trainer.logger": "console, wandb, tensorboard, mlflow, swanlab, trackio; metrics.jsonl is always written",
}


@cache
def verl_defaults() -> dict[str, Any]:
    """Every key of verl 0.4 (dotted) with its default; `${a.b}` = the value of that key."""
    return dict(leaves(yaml.safe_load(_DEFAULTS.read_text())))


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys with their values; an empty mapping is a value."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def find_absent(key: str) -> Absent | None:
    """The entry of `ABSENT` for a key, or None: verl has no such key, or it exists here."""
    parts = key.split(".")
    entries = (ABSENT.get(".".join(parts[:end])) for end in range(len(parts), 0, -1))
    return next((entry for entry in entries if entry is not None), None)


def changes_nothing(key: str, value: Any, given: Mapping[str, Any]) -> bool:
    """Whether verl with an absent key at this value does what happens here anyway.

    Args:
        given: all keys of the configuration, dotted.
    """
    absent, default = find_absent(key), verl_defaults().get(key)
    assert absent is not None
    if absent.only is not None:
        return bool(value == absent.only)
    if absent.passes or value in (None, {}) or value is False or value == default:
        return True
    if isinstance(default, str) and default.startswith("${"):
        source = default[2:-1]
        same = value == given.get(source, verl_defaults().get(source))
        return bool(same and (find_absent(source) is None or changes_nothing(source, value, given)))
    switch = absent.switch
    return switch is not None and switch != key and not given.get(switch, verl_defaults().get(switch))

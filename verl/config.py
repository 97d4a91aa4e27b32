"""The whole configuration: every key, its default, its meaning and its checks.

The composed hydra config is merged into the frozen models below once, at start; nothing else in the
project has defaults of its own. `trainer/config/ppo_trainer.yaml` is generated from here
(`python3 scripts/write_config.py`), so a key's documentation is its docstring.

Key names follow verl 0.4. Imports neither torch, ray nor transformers.
"""

import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError


class ConfigError(ValueError):
    """A setting that cannot work; the message names the key, its value and a way out."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class DataConfig(_Section):
    train_files: str | list[str] | None = None
    """Parquet file or files made by process_data.py (required)."""
    val_files: str | list[str] | None = None
    """Held-out parquet; needed only when validation is on (trainer.test_freq > 0 or val_before_train)."""
    train_mode: Literal["supervised", "unsupervised"] | None = None
    """supervised (triplets, the meaning of null) or unsupervised (plain texts)."""
    prompt_key: str = "prompt"
    """Column that holds the chat messages of the trained text."""
    reward_fn_key: str = "data_source"
    """Column that tells the naive reward manager which rule scores a row."""
    train_batch_size: int = 64
    """Samples (prompts) per training step."""
    val_batch_size: int | None = None
    """Samples per validation step; null = data.train_batch_size."""
    val_max_samples: int = 200
    """Most held-out samples a validation uses, taken from the front."""
    max_prompt_length: int = 1024
    """Most tokens of a rendered prompt; over-long user text is cut by data.truncation."""
    max_response_length: int = 2048
    """Most tokens of a rationale."""
    truncation: Literal["left", "right", "middle", "error"] = "right"
    """Part of an over-long user text that is cut: right keeps its beginning; error stops."""
    filter_overlong_prompts: bool = False
    """Drop samples with an over-long text at start instead of cutting the text."""
    shuffle: bool = True
    """Shuffle the training samples each epoch."""
    seed: int = 1
    """Seed of the shuffling."""
    dataloader_num_workers: int = 0
    """Processes that render prompts; 0 = in the driver."""


class ModelConfig(_Section):
    path: str | None = None
    """Folder or hub name of an instruction-tuned causal language model (required)."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    override_config: dict[str, Any] = {}
    """Values that replace those of the model's config.json."""
    use_remove_padding: bool = True
    """Always true here: every forward is packed."""
    enable_gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, about a third more compute."""


class OptimConfig(_Section):
    lr: float = 1e-6
    """Peak learning rate of AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas."""
    weight_decay: float = 0.01
    """AdamW weight decay."""
    lr_warmup_steps: int = -1
    """Training steps of linear warm-up; negative = lr_warmup_steps_ratio of all steps."""
    lr_warmup_steps_ratio: float = 0.0
    """Share of all training steps spent in warm-up."""
    warmup_style: Literal["constant", "cosine"] = "constant"
    """Schedule after warm-up."""
    min_lr_ratio: float = 0.0
    """Cosine: final learning rate as a share of lr."""
    num_cycles: float = 0.5
    """Cosine: number of waves; 0.5 falls once to the minimum."""


class FsdpConfig(_Section):
    param_offload: bool = False
    """Keep the weights in host memory between phases (CUDA)."""
    optimizer_offload: bool = False
    """Keep the optimizer state in host memory outside the update (CUDA)."""
    offload_policy: bool = False
    """strategy=fsdp2 only: torch's CPUOffloadPolicy, which makes the two flags above void."""
    reshard_after_forward: bool = True
    """Free the gathered weights of a layer after its forward."""
    fsdp_size: int = -1
    """GPUs in one sharding group; -1 = all. Smaller groups hold replicas (HSDP)."""


class ActorConfig(_Section):
    strategy: Literal["fsdp", "fsdp2"] = "fsdp"
    """Both run torch FSDP2; they differ in fsdp_config.offload_policy alone."""
    ppo_mini_batch_size: int = 16
    """Samples (prompts) per optimizer step."""
    ppo_epochs: int = 1
    """Passes over a step's rows."""
    shuffle: bool = False
    """Draw the mini-batches of an epoch in a random order of samples."""
    use_dynamic_bsz: bool = True
    """Micro-batches by token budget; false = by ppo_micro_batch_size_per_gpu rows."""
    ppo_max_token_len_per_gpu: int = 16384
    """Token budget of a micro-batch in the update."""
    ppo_micro_batch_size_per_gpu: int | None = None
    """Rows of a micro-batch when use_dynamic_bsz is false."""
    grad_clip: float = 1.0
    """Largest norm of the gradient."""
    clip_ratio: float = 0.2
    """PPO clip range of the probability ratio."""
    clip_ratio_low: float | None = None
    """Lower clip range; null = clip_ratio."""
    clip_ratio_high: float | None = None
    """Upper clip range; null = clip_ratio."""
    clip_ratio_c: float = 3.0
    """Dual-clip bound for negative advantages, above 1."""
    loss_agg_mode: Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"] = (
        "token-mean"
    )
    """How token losses become one number, with one denominator for the whole mini-batch."""
    entropy_coeff: float = 0.0
    """Weight of the entropy bonus."""
    use_kl_loss: bool = False
    """Add kl_loss_coef x KL(policy, reference) to the loss."""
    kl_loss_coef: float = 0.001
    """Weight of the KL loss; at 0 no reference model is built."""
    kl_loss_type: Literal["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"] = "low_var_kl"
    """KL estimator of the loss."""
    optim: OptimConfig = OptimConfig()
    fsdp_config: FsdpConfig = FsdpConfig()


class RefConfig(_Section):
    fsdp_config: FsdpConfig = FsdpConfig()
    log_prob_use_dynamic_bsz: bool | None = None
    """Null = actor.use_dynamic_bsz."""
    log_prob_max_token_len_per_gpu: int | None = None
    """Null = actor.ppo_max_token_len_per_gpu."""
    log_prob_micro_batch_size_per_gpu: int | None = None
    """Null = actor.ppo_micro_batch_size_per_gpu."""


class ValKwargs(_Section):
    do_sample: bool = False
    """False = greedy rationales in validation."""
    temperature: float = 1.0
    """Temperature when do_sample is true."""


class RolloutConfig(_Section):
    name: Literal["auto", "vllm", "hf"] = "auto"
    """Engine that writes the rationales: hf = transformers, vllm; auto = the fastest one installed."""
    mode: Literal["sync"] = "sync"
    """Generation and training take turns."""
    n: int = 8
    """Rationales per trained text (group size); GRPO needs 2 or more."""
    temperature: float = 1.0
    """Sampling temperature of the trained rationales."""
    anchor_temperature: float = 0.5
    """Sampling temperature of the query's and the negative's single rationale."""
    top_p: float = 1.0
    """Must be 1: training needs the full distribution."""
    top_k: int = -1
    """Must be -1: training needs the full distribution."""
    do_sample: bool = True
    """Must be true: a greedy group has no spread to learn from."""
    ignore_eos: bool = False
    """Go on after an end token, to max_response_length (for measurements)."""
    seed: int = 0
    """Base seed; each step and rank draws from a seed of its own."""
    calculate_log_probs: bool = True
    """The engine's log-probs are always compared with the trainer's (rollout/probs_diff_*)."""
    max_num_seqs: int = 1024
    """Most sequences decoded at once."""
    log_prob_use_dynamic_bsz: bool | None = None
    """Scoring pass; null = actor.use_dynamic_bsz."""
    log_prob_max_token_len_per_gpu: int | None = None
    """Scoring pass; null = actor.ppo_max_token_len_per_gpu."""
    log_prob_micro_batch_size_per_gpu: int | None = None
    """Scoring pass; null = actor.ppo_micro_batch_size_per_gpu."""
    tensor_model_parallel_size: int = 1
    """vllm: GPUs that share one engine."""
    dtype: str = "bfloat16"
    """vllm: dtype of the engine on CUDA."""
    gpu_memory_utilization: float = 0.5
    """vllm: share of GPU memory the engine may use."""
    enforce_eager: bool = True
    """vllm: no CUDA graphs."""
    enable_chunked_prefill: bool = True
    """vllm: split long prompts over steps."""
    free_cache_engine: bool = True
    """vllm: give the KV cache back between generations."""
    load_format: str = "dummy_dtensor"
    """vllm: dummy* = weights come from the trainer."""
    max_num_batched_tokens: int = 8192
    """vllm: tokens of one engine step."""
    max_model_len: int | None = None
    """vllm: null = max_prompt_length + max_response_length."""
    engine_kwargs: dict[str, Any] = {}
    """vllm: further arguments, under the key `vllm`."""
    val_kwargs: ValKwargs = ValKwargs()


class ActorRolloutRefConfig(_Section):
    hybrid_engine: bool = True
    """Must be true: generation and training share the devices."""
    model: ModelConfig = ModelConfig()
    actor: ActorConfig = ActorConfig()
    ref: RefConfig = RefConfig()
    rollout: RolloutConfig = RolloutConfig()


class RewardModelConfig(_Section):
    enable: bool = False
    """Must be false: rewards come from embeddings or rules, not from a reward model."""
    reward_manager: str = "hidden"
    """hidden, naive, or path/to/file.py:ClassName."""
    reward_kwargs: dict[str, Any] = {}
    """Arguments of the reward manager; those of `hidden` are in HiddenRewardConfig."""
    launch_reward_fn_async: bool = False
    """Must be false: rewards are computed in the step."""


class HiddenRewardConfig(_Section):
    """reward_model.reward_kwargs of the reward manager `hidden`."""

    objective: Literal["grace", "infonce"] = "grace"
    """grace = the paper's sum of similarities; infonce = a softmax over in-batch candidates."""
    temperature: float = 0.7
    """T: similarities are divided by it (grace: when with_scale)."""
    with_scale: bool = True
    """grace: divide every term by T."""
    enable_clustering: bool = True
    """grace: false also removes the cross-group term, as in the original."""
    clustering_weight: float = 0.2
    """Weight of the mean similarity to the group's other rationales."""
    cross_group_weight: float = 0.2
    """grace: weight of the similarity to other groups."""
    enable_length_penalty: bool = True
    """Penalise rationales that hit data.max_response_length."""
    length_penalty: float = 1.0
    """infonce: how far below its group's lowest reward a cut-off rationale is put. (grace gives -1.)"""
    exclude_system_prompt: bool = True
    """Pool from the first token of the user's text; false = from the first token of the prompt."""


class CustomRewardFunctionConfig(_Section):
    path: str | None = None
    """Python file with a function (data_source, solution_str, ground_truth, extra_info) for naive."""
    name: str = "compute_score"
    """Name of that function."""
    reward_kwargs: dict[str, Any] = {}
    """Further arguments of that function."""


class KlCtrlConfig(_Section):
    type: Literal["fixed", "adaptive"] = "fixed"
    """Whether kl_coef follows target_kl."""
    kl_coef: float = 0.001
    """Weight of the KL in the reward (at start, when adaptive)."""
    horizon: int = 10000
    """adaptive: samples over which the coefficient moves."""
    target_kl: float = 0.1
    """adaptive: KL to hold."""


class AlgorithmConfig(_Section):
    adv_estimator: str = "grpo"
    """grpo, rloo, reinforce_plus_plus, reinforce_plus_plus_baseline, opo or grpo_passk."""
    norm_adv_by_std_in_grpo: bool = True
    """Divide the advantages of a group by its standard deviation."""
    gamma: float = 1.0
    """Discount of reinforce_plus_plus."""
    use_kl_in_reward: bool = False
    """Subtract kl_coef x KL(policy, reference) from the rewards, token by token."""
    kl_penalty: Literal["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"] = "kl"
    """KL estimator in the reward."""
    kl_ctrl: KlCtrlConfig = KlCtrlConfig()


class TrainerConfig(_Section):
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto = cuda where there is one."""
    nnodes: int = 1
    """Machines; join them with ray start and set RAY_ADDRESS."""
    n_gpus_per_node: int | None = None
    """Worker processes per machine; null = the visible GPUs, or 1 on a CPU."""
    total_epochs: int = 2
    """Passes over the training file."""
    total_training_steps: int | None = None
    """Stop after this many steps; null = total_epochs."""
    project_name: str = "GRACE"
    """Name of the project in trackers and paths."""
    experiment_name: str = "test_exp"
    """Name of the run in trackers and paths."""
    default_local_dir: str | None = None
    """Run folder; null = checkpoints/<project_name>/<experiment_name>."""
    logger: list[Literal["console", "wandb", "tensorboard"]] = ["console"]
    """Where metrics go besides metrics.jsonl, which is always written."""
    samples_per_step: int = 8
    """Samples of each step whose rationales and rewards go to samples/step_N.jsonl."""
    save_freq: int = -1
    """Steps between checkpoints; the last step is saved too. -1 = the last step only, 0 = never."""
    max_actor_ckpt_to_keep: int | None = None
    """Keep this many newest checkpoints; null = all."""
    test_freq: int = -1
    """Steps between validations; -1 = none."""
    val_before_train: bool = False
    """Validate the untrained model first."""
    resume_mode: Literal["auto", "disable", "resume_path"] = "auto"
    """auto = go on from the run folder's newest checkpoint if there is one."""
    resume_from_path: str | None = None
    """A global_step_N folder, for resume_mode=resume_path."""
    critic_warmup: int = 0
    """Must be 0: there is no critic."""
    balance_batch: bool = True
    """Must be true: rows are spread over ranks by their tokens."""


class RayInitConfig(_Section):
    num_cpus: int | None = None
    """CPUs Ray may use when it is started here; null = all."""


class RunConfig(_Section):
    """One training run."""

    data: DataConfig = DataConfig()
    actor_rollout_ref: ActorRolloutRefConfig = ActorRolloutRefConfig()
    reward_model: RewardModelConfig = RewardModelConfig()
    custom_reward_function: CustomRewardFunctionConfig = CustomRewardFunctionConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    trainer: TrainerConfig = TrainerConfig()
    ray_init: RayInitConfig = RayInitConfig()

    @property
    def train_mode(self) -> str:
        return self.data.train_mode or "supervised"

    @property
    def run_dir(self) -> Path:
        trainer = self.trainer
        return Path(trainer.default_local_dir or f"checkpoints/{trainer.project_name}/{trainer.experiment_name}")

    @property
    def needs_reference(self) -> bool:
        """Whether any KL term has weight: only then is a reference model built."""
        actor = self.actor_rollout_ref.actor
        in_loss = actor.use_kl_loss and actor.kl_loss_coef != 0
        return in_loss or (self.algorithm.use_kl_in_reward and self.algorithm.kl_ctrl.kl_coef != 0)

    @property
    def validates(self) -> bool:
        return self.trainer.test_freq > 0 or self.trainer.val_before_train


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
    "trainer.val_only": "use scripts/evaluate_local.py on the model folder",
    "trainer.default_hdfs_dir": "checkpoints go to a mounted path; copy them from there",
    "trainer.del_local_ckpt_after_load": "checkpoints are only removed by max_actor_ckpt_to_keep",
    "trainer.max_critic_ckpt_to_keep": "GRPO has no critic",
    "trainer.esi_redundant_time": "not part of GRACE",
    "trainer.ray_wait_register_center_timeout": "workers get their address directly",
    "ray_init.timeline_json_file": "use ray timeline",
}


def build_config(values: Mapping[str, Any]) -> RunConfig:
    """Merge a plain nested mapping into a checked `RunConfig`.

    Raises:
        ConfigError: unknown key, wrong type, or a combination that cannot work.
    """
    for key in _leaf_keys(values, RunConfig):
        check_key(key)
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e) for e in error.errors())) from None
    _check_required(config)
    _check_fixed(config)
    _check_sizes(config)
    _check_algorithm(config)
    return config


def check_key(key: str) -> None:
    """Raise `ConfigError` unless `key` (dotted) exists; say why, or name the closest one."""
    known = set(all_keys())
    if key in known or any(key.startswith(k + ".") for k in known if _is_open(k)):
        return
    for prefix in sorted(NO_COUNTERPART, key=len, reverse=True):
        if key == prefix or key.startswith(prefix + "."):
            raise ConfigError(f"{key} is a key of verl that has no counterpart here: {NO_COUNTERPART[prefix]}.")
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    same_leaf = [k for k in sorted(known) if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    hint = f" Did you mean {(same_leaf or close)[0]}?" if same_leaf or close else ""
    raise ConfigError(f"unknown key {key}.{hint} (all keys: verl/trainer/config/ppo_trainer.yaml)")


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
        ConfigError: unknown name (the valid ones are listed) or wrong type.
    """
    valid = list(HiddenRewardConfig.model_fields)
    for name in kwargs:
        if name not in valid:
            close = difflib.get_close_matches(name, valid, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ConfigError(
                f"reward_model.reward_kwargs.{name} is not known to the reward manager hidden.{hint} "
                f"Valid: {', '.join(valid)}."
            )
    try:
        reward = HiddenRewardConfig.model_validate(dict(kwargs))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e, "reward_model.reward_kwargs.") for e in error.errors())) from None
    if reward.temperature <= 0:
        raise ConfigError(f"reward_model.reward_kwargs.temperature={reward.temperature} must be above 0.")
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
        raise ConfigError("actor_rollout_ref.model.path is not set; give a model folder or hub name.")
    if not config.data.train_files:
        raise ConfigError("data.train_files is not set; give the train.parquet that process_data.py wrote.")
    _check_files("data.train_files", config.data.train_files)
    if config.validates:
        if not config.data.val_files:
            raise ConfigError(
                "validation is on (trainer.test_freq or trainer.val_before_train) but data.val_files is not set; "
                "give a parquet file, or set trainer.test_freq=-1 trainer.val_before_train=False."
            )
        _check_files("data.val_files", config.data.val_files)
    if config.trainer.resume_mode == "resume_path" and not config.trainer.resume_from_path:
        raise ConfigError("trainer.resume_mode=resume_path needs trainer.resume_from_path=.../global_step_N.")


def file_list(files: str | list[str] | None) -> list[str]:
    return [] if files is None else [files] if isinstance(files, str) else list(files)


def _check_files(key: str, files: str | list[str]) -> None:
    for name in file_list(files):
        if not Path(name).expanduser().is_file():
            raise ConfigError(f"{key}: the file {name!r} does not exist; make it with process_data.py.")


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
            raise ConfigError(f"{key}={value} is not supported: {why}. Set it to {only} or leave it out.")


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
        "trainer.nnodes": config.trainer.nnodes,
        "trainer.total_epochs": config.trainer.total_epochs,
    }
    for key, value in positive.items():
        if value <= 0:
            raise ConfigError(f"{key}={value} must be above 0.")
    for key, optional in {
        "trainer.n_gpus_per_node": config.trainer.n_gpus_per_node,
        "trainer.total_training_steps": config.trainer.total_training_steps,
        "trainer.max_actor_ckpt_to_keep": config.trainer.max_actor_ckpt_to_keep,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": actor.ppo_micro_batch_size_per_gpu,
    }.items():
        if optional is not None and optional <= 0:
            raise ConfigError(f"{key}={optional} must be above 0, or null.")
    if data.train_batch_size % actor.ppo_mini_batch_size:
        size, mini = data.train_batch_size, actor.ppo_mini_batch_size
        divisors = [d for d in range(1, size + 1) if size % d == 0]
        near = sorted(divisors, key=lambda d: abs(d - mini))[:3]
        raise ConfigError(
            f"data.train_batch_size={size} is not a multiple of actor_rollout_ref.actor.ppo_mini_batch_size={mini} "
            f"(both count prompts). Nearest: train_batch_size {multiples_near(size, mini)}, "
            f"or ppo_mini_batch_size {', '.join(map(str, sorted(near)))}."
        )
    for key, dynamic, rows in _micro_batch_rules(config):
        if not dynamic and rows is None:
            raise ConfigError(
                f"{key}: micro-batches need a size when dynamic batching is off; set it, or use_dynamic_bsz=True."
            )


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


_CRITIC_ESTIMATORS = {
    "gae": "it needs a critic (value model)",
    "remax": "it needs a greedy rollout of each prompt",
}
_GROUP_ESTIMATORS = {"grpo", "rloo", "reinforce_plus_plus_baseline", "opo", "grpo_passk"}


def _check_algorithm(config: RunConfig) -> None:
    estimator, n = config.algorithm.adv_estimator, config.actor_rollout_ref.rollout.n
    if estimator in _CRITIC_ESTIMATORS:
        raise ConfigError(
            f"algorithm.adv_estimator={estimator} is not supported: {_CRITIC_ESTIMATORS[estimator]}. "
            f"Use one of {', '.join(sorted(_GROUP_ESTIMATORS | {'reinforce_plus_plus'}))}."
        )
    if estimator in _GROUP_ESTIMATORS and n < 2:
        raise ConfigError(
            f"actor_rollout_ref.rollout.n={n} with algorithm.adv_estimator={estimator}: a group of one has no "
            "advantage. Set actor_rollout_ref.rollout.n to 2 or more (the paper uses 8)."
        )
    if config.actor_rollout_ref.actor.clip_ratio_c <= 1:
        raise ConfigError(
            f"actor_rollout_ref.actor.clip_ratio_c={config.actor_rollout_ref.actor.clip_ratio_c} must be above 1."
        )
    if config.custom_reward_function.path and config.reward_model.reward_manager != "naive":
        raise ConfigError(
            f"custom_reward_function.path={config.custom_reward_function.path} is read by "
            f"reward_model.reward_manager=naive only, and that is {config.reward_model.reward_manager}; set one of them."
        )
    if config.reward_model.reward_manager == "hidden":
        build_reward_kwargs(config.reward_model.reward_kwargs)


def type_name(annotation: Any) -> str:
    """A field's type as a reader writes it."""
    if typing.get_origin(annotation) is Literal:
        return "|".join(map(str, typing.get_args(annotation)))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " | ".join(type_name(a) for a in typing.get_args(annotation))
    return "null" if annotation is type(None) else str(getattr(annotation, "__name__", annotation))

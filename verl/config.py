"""The configuration: every key, its default and its meaning.

The composed hydra config is validated by the frozen models below once, at start (`config_checks.build_config`).
`trainer/config/ppo_trainer.yaml` is generated from here (`make config`): a key's documentation is its docstring, and
its range is the constraint of its type. Combinations of keys are checked in `config_checks`; keys of verl that set
nothing here are in `verl_keys`.

Key names follow verl 0.4. Imports neither torch, ray nor transformers.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

from verl.prompt_options import Day, GivenSystemPrompt, SystemPromptPlace, Truncation
from verl.step_schedule import ALL_STEPS, StepSchedule
from verl.text_roles import TEXT, RoleSettings, Template

PROJECT = Path(__file__).parents[1]
"""The folder of the checkout."""

Share = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Bound = Annotated[float, Field(gt=0, allow_inf_nan=True)]
"""Infinity = no bound; NaN is not above 0 and therefore rejected."""
OrOff = Annotated[int, Field(ge=-1)]
"""A number, or -1 for what the key says of it."""
Seed = Annotated[int, Field(ge=0, lt=2**32)]
FilePath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A leading ~ is the home folder; expanded here and nowhere else."""


def _different(values: list[int]) -> list[int]:
    if len(set(values)) < len(values):
        raise ValueError("a number is there twice")
    return values


Dimensions = Annotated[list[PositiveInt], Field(min_length=1), AfterValidator(_different)]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False,
        # A YAML file's `experiment_name: 20251128` is a name.
        coerce_numbers_to_str=True,
    )  # fmt: skip


class DataConfig(_Section):
    train_files: FilePath | list[FilePath] | None = None
    """Parquet file or files made by process_data.py (required)."""
    val_files: FilePath | list[FilePath] | None = None
    """Held-out parquet; needed only when validation is on (trainer.test_freq > 0 or val_before_train)."""
    train_mode: Literal["supervised", "unsupervised"] | None = None
    """supervised (triplets, the meaning of null) or unsupervised (plain texts)."""
    prompt_key: str = "prompt"
    """Column that holds the chat messages of the trained text."""
    system_prompt: GivenSystemPrompt | None = None
    """System prompt of all prompts, as text or a file that holds it; '' = no system turn, null = each row's own."""
    system_prompt_in: SystemPromptPlace = "system"
    """Turn that the system prompt stands in; user = the beginning of the first user turn, for chat templates without
    a system turn (Gemma, Mistral v0.1)."""
    template_date: Day | None = None
    """Day that a chat template shows where it asks for today's (Llama 3); null = 2024-07-26."""
    trained_text: Literal["positive", "query"] = "positive"
    """Supervised: the text of a triplet whose rationales are trained. query, with document.think=False: queries that
    think beside plain documents, which are cheap to embed."""
    template: Template = TEXT
    """The user's turn of a prompt: {text} is the text, {instruction} one of data.instructions."""
    instructions: dict[str, str] = {}
    """What {instruction} stands for, by the `source` of a sample; `default` for all other samples."""
    think: bool = True
    """Whether rationales are written. False = nowhere: every step trains by a loss on the embeddings alone, validation
    embeds without rationales, no engine is started, and the model's folder says so to whoever embeds with it."""
    query: RoleSettings = RoleSettings()
    document: RoleSettings = RoleSettings()
    reward_fn_key: str = "data_source"
    """Column that names the rule by which the naive reward manager rewards a row."""
    train_batch_size: PositiveInt = 64
    """Samples (prompts) per training step."""
    contrastive_batch_size: PositiveInt | None = None
    """Samples of a step without rationales (trainer.contrastive_warmup_steps, contrastive_steps_between); null =
    train_batch_size. The step has as many mini-batches as others."""
    val_batch_size: PositiveInt | None = None
    """Samples per validation step; null = data.train_batch_size."""
    val_max_samples: PositiveInt = 200
    """Most held-out samples a validation uses, taken from the front."""
    val_sts_file: FilePath | None = "examples/eval/ExampleSTS.sts.jsonl"
    """Scored pairs that validation embeds too, one {"sentence1", "sentence2", "score"} a line; null = none.
    A relative path is looked up in the working directory, then in the project's folder."""
    max_prompt_length: PositiveInt = 1024
    """Most tokens of a rendered prompt; over-long user text is cut by data.truncation."""
    max_response_length: PositiveInt = 2048
    """Most tokens of a rationale."""
    truncation: Truncation = "right"
    """Part of an over-long user text that is cut: right keeps its beginning; error ends the run."""
    filter_overlong_prompts: bool = False
    """Drop samples with an over-long text at start instead of cutting the text; of several positives or negatives only
    the over-long ones are dropped, unless it is the first."""
    negatives_per_query: PositiveInt = 1
    """Negatives of a sample in a step, of all that the file has of it; a sample with fewer gives all. Each pass over
    the data takes the next ones, and the next one of its positives."""
    shuffle: bool = True
    """Shuffle the training samples each epoch."""
    seed: Seed = 1
    """Seed of the shuffling."""
    dataloader_num_workers: NonNegativeInt = 0
    """Processes that render prompts; 0 = in the driver."""

    @property
    def mode(self) -> str:
        return self.train_mode or "supervised"

    @property
    def contrastive_size(self) -> int:
        return self.contrastive_batch_size or self.train_batch_size

    @property
    def val_size(self) -> int:
        return self.val_batch_size or self.train_batch_size

    @property
    def sts_path(self) -> Path | None:
        """The file of `val_sts_file`; a relative path that the working directory does not have is the project's."""
        if self.val_sts_file is None:
            return None
        given = Path(self.val_sts_file)
        shipped = PROJECT / given
        return given if given.exists() or not shipped.exists() else shipped


Kernel = Literal["auto", "varlen", "sdpa"]
"""Which of torch's functions computes attention on CUDA: varlen_attn for all rows of a line at once,
scaled_dot_product_attention row by row, or the first where it works."""


class ModelConfig(_Section):
    path: FilePath | None = None
    """Folder or hub name of an instruction-tuned causal language model (required)."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    override_config: dict[str, Any] = {}
    """Values that replace those in the model's config.json."""
    attn_implementation: Kernel = "auto"
    """Which of torch's functions computes the trainer's attention on CUDA: varlen = varlen_attn, an error where it does
    not work; sdpa = scaled_dot_product_attention; auto = varlen_attn where a trial call works."""
    enable_gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    lora_rank: NonNegativeInt = 0
    """Above 0: LoRA. Low-rank adapters of this rank are trained, and the model itself is frozen."""
    lora_alpha: PositiveInt = 16
    """LoRA: the adapters' product is multiplied by lora_alpha / lora_rank."""
    target_modules: str | list[str] = "all-linear"
    """LoRA: the layers with an adapter, by the ends of their names or one regular expression; all-linear = every linear
    layer but the LM head, which cannot have one."""
    lora_adapter_path: FilePath | None = None
    """LoRA: folder or hub name of a peft adapter to go on training, whose rank, alpha and layers count."""

    @property
    def trains_adapter(self) -> bool:
        """Whether low-rank adapters are trained, and the weights of `path` are not."""
        return self.lora_rank > 0 or self.lora_adapter_path is not None


class OptimConfig(_Section):
    lr: PositiveFloat = 1e-6
    """Peak learning rate of AdamW."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW betas."""
    weight_decay: NonNegativeFloat = 0.01
    """AdamW weight decay."""
    lr_warmup_steps: OrOff = -1
    """Training steps of linear warm-up, from min_lr_ratio x lr with cosine, else from 0; -1 = lr_warmup_steps_ratio
    of all steps."""
    lr_warmup_steps_ratio: Share = 0.0
    """Share of all training steps spent in warm-up."""
    warmup_style: Literal["constant", "cosine"] = "constant"
    """Schedule after warm-up."""
    min_lr_ratio: Share = 0.0
    """Cosine: final learning rate as a share of lr."""
    num_cycles: NonNegativeFloat = 0.5
    """Cosine: number of waves; 0.5 falls once to the minimum."""


class FsdpConfig(_Section):
    param_offload: bool = False
    """Keep the weights in host memory between phases (CUDA)."""
    optimizer_offload: bool = False
    """Keep the optimizer state in host memory outside the update (CUDA)."""
    offload_policy: bool = False
    """strategy=fsdp2 only: torch's CPUOffloadPolicy; the two flags above then have no effect."""
    reshard_after_forward: bool = True
    """Free the gathered weights of a layer after its forward."""
    fsdp_size: OrOff = -1
    """GPUs in one sharding group; -1 or 0 = all. Smaller groups hold replicas (HSDP)."""


KlKind = Literal["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"]


class Offload(NamedTuple):
    """What of a model waits in host memory, where there is a GPU."""

    by_torch: bool
    """All of it, by torch's CPUOffloadPolicy; then nothing is moved by hand."""
    weights: bool
    """Moved there between phases."""
    optimizer: bool
    """Its state, moved there outside the update."""


class MicroBatchLimit(NamedTuple):
    """How many rows one forward takes: by tokens, or by rows; the other one is None."""

    max_tokens: int | None
    max_rows: int | None


class ActorConfig(_Section):
    strategy: Literal["fsdp", "fsdp2"] = "fsdp"
    """Both run torch FSDP2; they differ in fsdp_config.offload_policy alone."""
    ppo_mini_batch_size: PositiveInt = 16
    """Samples (prompts) per optimizer step."""
    ppo_epochs: PositiveInt = 1
    """Passes over the rows of a step."""
    shuffle: bool = False
    """Draw the mini-batches of an epoch in a random order of samples."""
    use_dynamic_bsz: bool | None = None
    """Micro-batches by token budget, or (false) of ppo_micro_batch_size_per_gpu rows; null = by rows where that
    number is set, else by tokens."""
    ppo_max_token_len_per_gpu: PositiveInt = 16384
    """Token budget of a micro-batch in the update."""
    ppo_micro_batch_size_per_gpu: PositiveInt | None = None
    """Rows of a micro-batch in the update."""
    grad_clip: Bound = 1.0
    """Largest norm of the gradient; inf = no clipping."""
    embedding_grad_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Fraction s: the reward manager's gradient on the embeddings is scaled so that its norm is s of the sum of its own
    and the policy gradient's; null = no scaling, 1 = no policy gradient is computed, while rationales are still written
    and embedded."""
    embedding_grad_every: PositiveInt = 10
    """Measure both norms at most every this many updates, in steps with rationales; a measurement costs a second
    forward and backward (without the LM head)."""
    clip_ratio: Bound = 0.2
    """PPO clip range of the probability ratio."""
    clip_ratio_low: Bound | None = None
    """Lower clip range; null = clip_ratio."""
    clip_ratio_high: Bound | None = None
    """Upper clip range; null = clip_ratio."""
    clip_ratio_c: Annotated[float, Field(gt=1)] = 3.0
    """Dual-clip bound for negative advantages, above 1."""
    tis_imp_ratio_cap: Annotated[float, Field(ge=-1, allow_inf_nan=True)] | None = None
    """Cap of each token's importance weight p_trainer / p_engine; null = 2.0 with vllm and no weighting with hf,
    0 or less = no weighting."""
    loss_agg_mode: Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"] = (
        "token-mean"
    )
    """How token losses become one number, with one denominator for the whole mini-batch."""
    entropy_coeff: Annotated[float, Field(ge=-1, le=1)] = 0.0
    """Weight of the entropy bonus; below 0 it is a penalty."""
    use_kl_loss: bool = False
    """Add kl_loss_coef x KL(policy, reference) to the loss: on rationales, in steps without them on the texts."""
    kl_loss_coef: NonNegativeFloat = 0.001
    """Weight of the KL loss; at 0 no reference model is built."""
    kl_loss_type: KlKind = "low_var_kl"
    """KL estimator of the loss."""
    optim: OptimConfig = OptimConfig()
    fsdp_config: FsdpConfig = FsdpConfig()

    @property
    def trains_policy(self) -> bool:
        """Whether updates follow the policy gradient, where rationales are written."""
        return self.embedding_grad_share != 1

    @property
    def has_kl_loss(self) -> bool:
        """Whether the loss has a KL term."""
        return self.use_kl_loss and self.kl_loss_coef != 0

    def offload(self, fsdp: FsdpConfig) -> Offload:
        """Of a model with these settings."""
        by_torch = self.strategy == "fsdp2" and fsdp.offload_policy
        return Offload(by_torch, fsdp.param_offload and not by_torch, fsdp.optimizer_offload and not by_torch)

    @property
    def update_limit(self) -> MicroBatchLimit:
        """Of a forward in the update."""
        rows = self.ppo_micro_batch_size_per_gpu
        by_tokens = rows is None if self.use_dynamic_bsz is None else self.use_dynamic_bsz
        return MicroBatchLimit(self.ppo_max_token_len_per_gpu, None) if by_tokens else MicroBatchLimit(None, rows)

    def score_limit(self, section: "RefConfig | RolloutConfig") -> MicroBatchLimit:
        """As `update_limit`, of a forward that only scores; what the section leaves open is the update's."""
        rows, by_tokens = section.log_prob_micro_batch_size_per_gpu, section.log_prob_use_dynamic_bsz
        if by_tokens is None:
            by_tokens = rows is None and self.update_limit.max_tokens is not None
        if by_tokens:
            return MicroBatchLimit(section.log_prob_max_token_len_per_gpu or self.ppo_max_token_len_per_gpu, None)
        return MicroBatchLimit(None, rows or self.ppo_micro_batch_size_per_gpu)


class RefConfig(_Section):
    fsdp_config: FsdpConfig = FsdpConfig()
    log_prob_use_dynamic_bsz: bool | None = None
    """Null = by rows where log_prob_micro_batch_size_per_gpu is set, else as the actor."""
    log_prob_max_token_len_per_gpu: PositiveInt | None = None
    """Null = actor.ppo_max_token_len_per_gpu."""
    log_prob_micro_batch_size_per_gpu: PositiveInt | None = None
    """Null = actor.ppo_micro_batch_size_per_gpu."""


class ValKwargs(_Section):
    do_sample: bool = False
    """False = greedy rationales in validation."""
    temperature: NonNegativeFloat = 1.0
    """Temperature when do_sample is true."""


CheckMode = Literal["full", "sample", "off"]


class RolloutConfig(_Section):
    name: Literal["auto", "vllm", "hf"] = "auto"
    """Engine that writes the rationales: hf = transformers, vllm; auto = vllm where it imports, else hf."""
    n: PositiveInt = 8
    """Rationales per trained text (group size); GRPO needs 2 or more."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature of the trained rationales."""
    anchor_temperature: PositiveFloat = 0.5
    """Sampling temperature of the query's and the negative's single rationale."""
    ignore_eos: bool = False
    """Continue after an end token, up to max_response_length (for measurements)."""
    seed: Seed = 0
    """Base seed; each row of a step draws from a seed of its own."""
    max_num_seqs: PositiveInt = 1024
    """Most sequences decoded at once."""
    log_prob_use_dynamic_bsz: bool | None = None
    """Forward after generation (embeddings and old log-probs); null = by rows where log_prob_micro_batch_size_per_gpu
    is set, else as the actor."""
    log_prob_max_token_len_per_gpu: PositiveInt | None = None
    """Of that forward; null = actor.ppo_max_token_len_per_gpu."""
    log_prob_micro_batch_size_per_gpu: PositiveInt | None = None
    """Of that forward; null = actor.ppo_micro_batch_size_per_gpu."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """dtype of the engine on CUDA; on a CPU it is float32, as the trainer's."""
    check_weight_sync: CheckMode = "sample"
    """Proof after every weight sync: sample = read a few weights back, others each time, and compare log-probs
    of fixed sentences; full = the same with every weight; off = none."""
    tensor_model_parallel_size: PositiveInt = 1
    """vllm: neighbouring workers that share one engine."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.5
    """vllm: share of GPU memory the engine may use; on a CPU, of the free host memory for the KV cache."""
    enforce_eager: bool = True
    """vllm: no CUDA graphs and no compilation."""
    enable_chunked_prefill: bool = True
    """vllm on CUDA: split long prompts over engine steps."""
    free_cache_engine: bool = True
    """vllm on CUDA: free the memory of weights and KV cache between generations (sleep mode)."""
    load_format: str = "dummy_dtensor"
    """vllm: dummy* = start with random weights, which the trainer's replace anyway; or one of vLLM's load formats."""
    max_num_batched_tokens: PositiveInt = 8192
    """vllm: most tokens of one engine step."""
    max_model_len: PositiveInt | None = None
    """vllm: longest prompt and response together; null = max_prompt_length + max_response_length."""
    engine_kwargs: dict[str, Any] = {}
    """vllm: further arguments of vllm.LLM, under the key `vllm`."""
    val_kwargs: ValKwargs = ValKwargs()

    @property
    def vllm_arguments(self) -> dict[str, Any]:
        """Those of `engine_kwargs.vllm` that are set."""
        return {name: value for name, value in (self.engine_kwargs.get("vllm") or {}).items() if value is not None}

    @property
    def ranks_per_engine(self) -> int:
        """Workers that share one engine, when the engine's name is resolved."""
        return self.tensor_model_parallel_size if self.name == "vllm" else 1


class ActorRolloutRefConfig(_Section):
    model: ModelConfig = ModelConfig()
    actor: ActorConfig = ActorConfig()
    ref: RefConfig = RefConfig()
    rollout: RolloutConfig = RolloutConfig()


class RewardModelConfig(_Section):
    reward_manager: str = "hidden"
    """hidden, naive, or path/to/file.py:ClassName."""
    reward_kwargs: dict[str, Any] = {}
    """Arguments of the reward manager; those of `hidden` are in HiddenRewardConfig."""

    @property
    def contrastive(self) -> bool:
        """Whether `hidden` is asked for its contrastive loss, by arguments that need not be valid."""
        names = HiddenRewardConfig.model_fields
        given = {name: value for name, value in self.reward_kwargs.items() if name in names}
        return self.reward_manager == "hidden" and HiddenRewardConfig.model_construct(**given).contrastive


class HiddenRewardConfig(_Section):
    """reward_model.reward_kwargs of the reward manager `hidden`."""

    objective: Literal["grace", "infonce"] = "grace"
    """grace = the paper's sum of similarities; infonce = a softmax over in-batch candidates."""
    temperature: PositiveFloat = 0.7
    """T: similarities are divided by it (grace: when with_scale)."""
    with_scale: bool = True
    """grace: divide every term by T."""
    enable_clustering: bool = True
    """grace: false also removes the cross-group term, as in the original."""
    clustering_weight: NonNegativeFloat = 0.2
    """Weight of the mean similarity to the group's other rationales."""
    cross_group_weight: NonNegativeFloat = 0.2
    """grace: weight of the similarity to other groups."""
    enable_length_penalty: bool = True
    """Penalise rationales that hit data.max_response_length."""
    length_penalty: NonNegativeFloat = 1.0
    """infonce: how far below its group's lowest reward a cut-off rationale is put. (grace gives -1.)"""
    exclude_system_prompt: bool = True
    """Pool from the first token of the user's text; false = from the first token of the prompt."""
    text_share: Share | None = None
    """Share of the text in the mean over text and rationale; null = every token counts the same. It goes into the
    checkpoint's embedder_config.json."""
    no_rationale_weight: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Weight of the text's own vector in the average of each vector with that of its text without the rationale. It
    goes into the checkpoint's embedder_config.json."""
    centre: bool = False
    """Take the direction of the mean of the step's embeddings out of every embedding before they are compared."""
    matryoshka_dims: Dimensions | None = None
    """Numbers of first dimensions at which embeddings are compared: rewards and the contrastive loss are the means over
    them (arXiv 2205.13147); null = all dimensions, as one. They go into the checkpoint's embedder_config.json."""
    contrastive_weight: NonNegativeFloat = 0.0
    """Weight of a contrastive loss (InfoNCE) on the embeddings beside the policy gradient; 0 = the paper's GRACE."""
    contrastive_first_weight: NonNegativeFloat | None = None
    """Its weight in the first contrastive_first_steps steps; null = contrastive_weight from the first step on."""
    contrastive_first_steps: NonNegativeInt = 0
    """Steps of contrastive_first_weight."""
    contrastive_temperature: PositiveFloat = 0.05
    """Of that loss; similarities are divided by it."""
    contrastive_anchors: bool = False
    """Whether that loss trains queries and negatives too; false = only the rationales' rows move."""

    @property
    def contrastive(self) -> bool:
        """Whether the contrastive loss has weight in any step."""
        return bool(self.contrastive_weight or self.contrastive_first_weight)

    def contrastive_weight_in(self, step: int) -> tuple[float, str]:
        """The weight of the contrastive loss in a step, and the setting that it is."""
        if self.contrastive_first_weight is not None and step <= self.contrastive_first_steps:
            return self.contrastive_first_weight, "contrastive_first_weight"
        return self.contrastive_weight, "contrastive_weight"


class CustomRewardFunctionConfig(_Section):
    path: FilePath | None = None
    """Python file with a function (data_source, solution_str, ground_truth, extra_info) for naive."""
    name: str = "compute_score"
    """Name of that function."""
    reward_kwargs: dict[str, Any] = {}
    """Further arguments of that function."""


class KlCtrlConfig(_Section):
    type: Literal["fixed", "adaptive"] = "fixed"
    """Whether kl_coef follows target_kl."""
    kl_coef: NonNegativeFloat = 0.001
    """Weight of the KL in the reward (at start, when adaptive)."""
    horizon: PositiveInt = 10000
    """adaptive: samples over which the coefficient moves."""
    target_kl: PositiveFloat = 0.1
    """adaptive: KL to hold."""


class Estimator(NamedTuple):
    """What an advantage estimator looks at."""

    compares_group: bool
    """The rows of a group, so that one alone has no advantage."""
    reads_std: bool
    """norm_adv_by_std_in_grpo."""
    reads_gamma: bool


ESTIMATORS = {
    "grpo": Estimator(compares_group=True, reads_std=True, reads_gamma=False),
    "grpo_passk": Estimator(compares_group=True, reads_std=True, reads_gamma=False),
    "opo": Estimator(compares_group=True, reads_std=False, reads_gamma=False),
    "reinforce_plus_plus": Estimator(compares_group=False, reads_std=False, reads_gamma=True),
    "reinforce_plus_plus_baseline": Estimator(compares_group=True, reads_std=False, reads_gamma=False),
    "rloo": Estimator(compares_group=True, reads_std=False, reads_gamma=False),
}
"""Those of algorithm/advantage.py."""
UNKNOWN_ESTIMATOR = Estimator(compares_group=False, reads_std=True, reads_gamma=True)
"""One that a user registers may look at everything, and has to see to its own groups."""


class AlgorithmConfig(_Section):
    adv_estimator: str = "grpo"
    """grpo, rloo, reinforce_plus_plus, reinforce_plus_plus_baseline, opo or grpo_passk; or one that a file of yours
    registers, see docs/from-verl.md."""
    norm_adv_by_std_in_grpo: bool = True
    """Divide the advantages of a group by its standard deviation."""
    gamma: Share = 1.0
    """Discount of reinforce_plus_plus."""
    use_kl_in_reward: bool = False
    """Subtract kl_coef x KL(policy, reference) from the rewards, token by token."""
    kl_penalty: KlKind = "kl"
    """KL estimator in the reward."""
    kl_ctrl: KlCtrlConfig = KlCtrlConfig()

    @property
    def estimator(self) -> Estimator:
        return ESTIMATORS.get(self.adv_estimator, UNKNOWN_ESTIMATOR)

    @property
    def has_kl_in_reward(self) -> bool:
        """Whether the rewards have a KL term."""
        return self.use_kl_in_reward and self.kl_ctrl.kl_coef != 0


class TrainerConfig(_Section):
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto = cuda where there is one."""
    use_ray: bool = True
    """False = one worker inside the driver's own process, without Ray: for debugging (breakpoints work) and tests."""
    nnodes: PositiveInt = 1
    """Machines; join them with ray start and set RAY_ADDRESS."""
    n_gpus_per_node: PositiveInt | None = None
    """Worker processes per machine; null = the number of visible GPUs, or 1 on a CPU or without Ray."""
    total_epochs: PositiveInt = 2
    """Passes over the training file; has no effect where total_training_steps is set."""
    total_training_steps: PositiveInt | None = None
    """Steps of the run, over as many passes as they take; null = total_epochs passes."""
    project_name: str = "GRACE"
    """Name of the project in trackers and paths."""
    experiment_name: str = "test_exp"
    """Name of the run in trackers and paths."""
    default_local_dir: FilePath | None = None
    """Run folder; null = checkpoints/<project_name>/<experiment_name>."""
    logger: Annotated[
        list[Literal["console", "wandb", "tensorboard", "mlflow", "swanlab", "trackio"]], BeforeValidator(_as_list)
    ] = ["console"]
    """Where metrics go besides metrics.jsonl, which is always written: one name, or a list."""
    samples_per_step: NonNegativeInt = 8
    """Samples of each step whose rationales and rewards go to samples/step_N.jsonl."""
    save_freq: OrOff = -1
    """Steps between checkpoints; the last step is saved too. -1 = the last step only, 0 = only the step
    that the run is stopped at."""
    max_actor_ckpt_to_keep: PositiveInt | None = None
    """Keep this many newest checkpoints, and the best one; null = all."""
    save_best: str | None = None
    """A metric of the validation, such as val/triplet_accuracy: a step with the best value so far is saved, named in
    best_checkpointed_iteration.txt, and not removed until a better one is."""
    merge_lora: bool = False
    """LoRA: a checkpoint's model folder holds the whole model with the adapter merged into it, as without LoRA;
    false = the adapter alone, which needs the folder of the model that it belongs to."""
    report: bool = False
    """Write report.html, the run as a page, into the run folder at each save."""
    test_freq: OrOff = -1
    """Steps between validations; -1 or 0 = none."""
    contrastive_warmup_steps: NonNegativeInt = 0
    """First steps that generate nothing: texts are embedded without rationales, and only the reward manager's gradient
    on the embeddings trains. They count as steps of the run."""
    contrastive_steps_between: NonNegativeInt = 0
    """Such steps after every step that writes rationales."""
    val_before_train: bool = False
    """Validate the untrained model first."""
    diag_freq: OrOff = 50
    """Steps between diagnoses of the probe texts, which say whether embeddings collapse and rationales are used (see
    docs/diagnostics.md); the first one is before training, the last one after the last step. -1 or 0 = none."""
    diag_texts: PositiveInt | None = None
    """Probe texts, rounded down to whole samples (at least two); null = as many as write 3 % of the run's rationales,
    from 3 samples to 512 texts. A resumed run keeps those that it has."""
    diag_log_likelihood: bool = True
    """Score the probe's rationales by the untrained model, which is loaded for that where there is no reference."""
    stop_on_alert: bool = False
    """End the run, with a checkpoint, when an alert begins after the first step."""
    resume_mode: Literal["auto", "disable", "resume_path"] = "auto"
    """auto = resume from the run folder's newest complete checkpoint if there is one."""
    resume_from_path: FilePath | None = None
    """A global_step_N folder, for resume_mode=resume_path."""
    resume_force: bool = False
    """Resume even if the model, data, batch size or n differ from the checkpoint's."""
    phase_timeout_s: NonNegativeInt = 3600
    """Seconds without a result or progress, from any worker or in the driver's own phases, after which the run ends
    with the stacks; 0 = no limit."""


class RayInitConfig(_Section):
    num_cpus: PositiveInt | None = None
    """CPUs Ray may use when the run starts it; null = all."""


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
        return self.data.mode

    @property
    def run_dir(self) -> Path:
        trainer = self.trainer
        return Path(trainer.default_local_dir or f"checkpoints/{trainer.project_name}/{trainer.experiment_name}")

    @property
    def num_mini_batches(self) -> int:
        """Of every step."""
        return self.data.train_batch_size // self.actor_rollout_ref.actor.ppo_mini_batch_size

    def schedule(self, num_samples: int) -> StepSchedule:
        """Which steps write rationales, and which samples a step takes.

        Args:
            num_samples: in the training file.
        """
        data, trainer = self.data, self.trainer
        return StepSchedule(
            num_samples, data.train_batch_size, data.contrastive_size,
            trainer.contrastive_warmup_steps if data.think else ALL_STEPS, trainer.contrastive_steps_between,
        )  # fmt: skip

    def step_without_rationales(self, begin: int = 1) -> tuple[int, str] | None:
        """The first step from `begin` on that writes none, and the setting that makes it one."""
        # Which steps do does not depend on the number of samples; no two in a row do, unless all later ones do.
        schedule = self.schedule(num_samples=0)
        step = next((step for step in (begin, begin + 1) if not schedule.writes_rationales(step)), None)
        if step is None:
            return None
        if not self.data.think:
            return step, "data.think=False"
        first = step <= self.trainer.contrastive_warmup_steps
        name = "contrastive_warmup_steps" if first else "contrastive_steps_between"
        return step, f"trainer.{name}={getattr(self.trainer, name)}"

    @property
    def rows_per_text(self) -> int:
        """Rows of a trained text in a step: one for each of its rationales, or one without."""
        return self.actor_rollout_ref.rollout.n if self.data.think else 1

    @property
    def longest_rationale(self) -> int:
        """Tokens."""
        return self.data.max_response_length if self.data.think else 0

    @property
    def longest_row(self) -> int:
        """Tokens of a prompt and its rationale."""
        return self.data.max_prompt_length + self.longest_rationale

    def with_engine(self, name: str) -> "RunConfig":
        """This config with `rollout.name` resolved."""
        section = self.actor_rollout_ref
        rollout = section.rollout.model_copy(update={"name": name})
        return self.model_copy(update={"actor_rollout_ref": section.model_copy(update={"rollout": rollout})})

    @property
    def importance_cap(self) -> float | None:
        """Cap of the importance weights, or None for no correction."""
        if not self.actor_rollout_ref.actor.trains_policy:
            return None
        cap = self.actor_rollout_ref.actor.tis_imp_ratio_cap
        if cap is None:
            return 2.0 if self.actor_rollout_ref.rollout.name == "vllm" else None
        return cap if cap > 0 else None

    @property
    def needs_reference(self) -> bool:
        """Whether any KL term has weight: only then is a reference model built."""
        return self.actor_rollout_ref.actor.has_kl_loss or self.algorithm.has_kl_in_reward

    @property
    def saves(self) -> bool:
        """Whether any step is saved."""
        return self.trainer.save_freq != 0 or self.trainer.save_best is not None

    @property
    def validates(self) -> bool:
        return self.trainer.test_freq > 0 or self.trainer.val_before_train

    @property
    def saves_whole_model(self) -> bool:
        """Whether the model folder of a checkpoint has all weights; else an adapter alone, in float32."""
        return self.trainer.merge_lora or not self.actor_rollout_ref.model.trains_adapter

    @property
    def diagnoses(self) -> bool:
        return self.trainer.diag_freq > 0

    @property
    def scores_by_untrained(self) -> bool:
        """Whether the untrained model scores rows, as the reference of a KL term or for the diagnoses."""
        return self.needs_reference or (self.diagnoses and self.trainer.diag_log_likelihood)


def file_list(files: str | list[str] | None) -> list[str]:
    """`data.train_files` or `data.val_files` as a list."""
    return [] if files is None else [files] if isinstance(files, str) else list(files)

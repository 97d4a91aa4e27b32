"""The overrides of public scripts that train with GRPO on verl, as their shells pass them on, and what has to change.

Variables are replaced by their values. `DATA` and `MODEL` stand for paths that every user replaces.
"""

from typing import NamedTuple


class Script(NamedTuple):
    overrides: list[str]
    refused: set[str]
    """The keys, besides the files, that have to be changed here."""


def script(overrides: str, *refused: str) -> Script:
    return Script(overrides.split(), set(refused))


_ACTOR, _REF, _ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.ref", "actor_rollout_ref.rollout"
_OLD_MICRO_BATCHES = (
    f"{_ACTOR}.ppo_micro_batch_size", f"{_ROLLOUT}.log_prob_micro_batch_size", f"{_REF}.log_prob_micro_batch_size",
)  # fmt: skip
_ULYSSES = (f"{_ACTOR}.ulysses_sequence_parallel_size", f"{_REF}.ulysses_sequence_parallel_size")
_FILTER_GROUPS = tuple(f"algorithm.filter_groups.{name}" for name in ("enable", "metric", "max_num_gen_batches"))
_BUFFER = tuple(f"custom_reward_function.overlong_buffer.{name}" for name in ("enable", "len", "penalty_factor"))

SCRIPTS = {
    "verl qwen2-7b, the first version": script(
        """
        data.train_files=DATA/train.parquet data.val_files=DATA/test.parquet data.train_batch_size=1024
        data.val_batch_size=1312 data.max_prompt_length=512 data.max_response_length=512
        actor_rollout_ref.model.path=Qwen/Qwen2-7B-Instruct actor_rollout_ref.actor.optim.lr=1e-6
        actor_rollout_ref.actor.ppo_mini_batch_size=256 actor_rollout_ref.actor.ppo_micro_batch_size=128
        actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.model.enable_gradient_checkpointing=True
        actor_rollout_ref.actor.fsdp_config.param_offload=False
        actor_rollout_ref.actor.fsdp_config.grad_offload=False
        actor_rollout_ref.actor.fsdp_config.optimizer_offload=False
        actor_rollout_ref.rollout.log_prob_micro_batch_size=128
        actor_rollout_ref.rollout.tensor_model_parallel_size=2 actor_rollout_ref.rollout.name=vllm
        actor_rollout_ref.rollout.gpu_memory_utilization=0.6 actor_rollout_ref.rollout.n=5
        actor_rollout_ref.ref.log_prob_micro_batch_size=128 actor_rollout_ref.ref.fsdp_config.param_offload=True
        algorithm.kl_ctrl.kl_coef=0.001 trainer.critic_warmup=0 trainer.logger=[console,wandb]
        trainer.project_name=verl_grpo_example_gsm8k trainer.experiment_name=deepseek_llm_7b_function_rm
        trainer.n_gpus_per_node=8 trainer.nnodes=1 trainer.save_freq=-1 trainer.total_epochs=15
        """,
        *_OLD_MICRO_BATCHES,
    ),
    "verl deepseek7b_llm_math": script(
        """
        algorithm.adv_estimator=grpo data.train_files=['DATA/train.parquet','DATA/test.parquet']
        data.val_files=['DATA/train.parquet','DATA/test.parquet'] data.train_batch_size=1024
        data.max_prompt_length=1024 data.max_response_length=1024 data.filter_overlong_prompts=True
        data.truncation=error actor_rollout_ref.model.path=deepseek-ai/deepseek-llm-7b-chat
        actor_rollout_ref.actor.optim.lr=1e-6 actor_rollout_ref.model.use_remove_padding=True
        actor_rollout_ref.actor.ppo_mini_batch_size=256 actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=40
        actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_coef=0.001
        actor_rollout_ref.actor.kl_loss_type=low_var_kl actor_rollout_ref.actor.entropy_coeff=0
        actor_rollout_ref.model.enable_gradient_checkpointing=True
        actor_rollout_ref.actor.fsdp_config.param_offload=False
        actor_rollout_ref.actor.fsdp_config.optimizer_offload=False
        actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=40
        actor_rollout_ref.rollout.tensor_model_parallel_size=2 actor_rollout_ref.rollout.name=vllm
        actor_rollout_ref.rollout.gpu_memory_utilization=0.6 actor_rollout_ref.rollout.n=5
        actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=40
        actor_rollout_ref.ref.fsdp_config.param_offload=True algorithm.use_kl_in_reward=False trainer.critic_warmup=0
        trainer.logger=[console,wandb] trainer.project_name=verl_grpo_example_gsm8k_math
        trainer.experiment_name=deepseek_llm_7b_function_rm_math trainer.n_gpus_per_node=8 trainer.nnodes=1
        trainer.save_freq=20 trainer.test_freq=5 trainer.total_epochs=15
        """
    ),
    "verl qwen2-7b_seq_balance": script(
        """
        algorithm.adv_estimator=grpo data.train_files=DATA/train.parquet data.val_files=DATA/test.parquet
        data.return_raw_chat=True data.train_batch_size=1024 data.max_prompt_length=512 data.max_response_length=1024
        data.filter_overlong_prompts=True data.truncation=error actor_rollout_ref.model.path=Qwen/Qwen2-7B-Instruct
        actor_rollout_ref.actor.optim.lr=1e-6 actor_rollout_ref.model.use_remove_padding=True
        actor_rollout_ref.actor.ppo_mini_batch_size=256 actor_rollout_ref.actor.use_dynamic_bsz=True
        actor_rollout_ref.actor.ppo_max_token_len_per_gpu=24000 actor_rollout_ref.actor.use_kl_loss=True
        actor_rollout_ref.actor.kl_loss_coef=0.001 actor_rollout_ref.actor.kl_loss_type=low_var_kl
        actor_rollout_ref.actor.entropy_coeff=0 actor_rollout_ref.model.enable_gradient_checkpointing=True
        actor_rollout_ref.actor.fsdp_config.param_offload=False
        actor_rollout_ref.actor.fsdp_config.optimizer_offload=False
        actor_rollout_ref.rollout.tensor_model_parallel_size=2 actor_rollout_ref.rollout.name=sglang
        actor_rollout_ref.rollout.mode=async actor_rollout_ref.rollout.multi_turn.format=hermes
        actor_rollout_ref.rollout.gpu_memory_utilization=0.6 actor_rollout_ref.rollout.n=5
        actor_rollout_ref.ref.fsdp_config.param_offload=True algorithm.use_kl_in_reward=False trainer.critic_warmup=0
        trainer.logger=[console,wandb] trainer.project_name=verl_grpo_example_gsm8k
        trainer.experiment_name=qwen2_7b_function_rm_kl1e-3 trainer.val_before_train=False trainer.n_gpus_per_node=8
        trainer.nnodes=1 trainer.save_freq=20 trainer.test_freq=5 trainer.total_epochs=15
        """,
        f"{_ROLLOUT}.name", f"{_ROLLOUT}.mode",
    ),
    "verl qwen2_5-3b_gsm8k_grpo_lora": script(
        """
        algorithm.adv_estimator=grpo data.train_files=DATA/train.parquet data.val_files=DATA/test.parquet
        data.train_batch_size=1024 data.max_prompt_length=512 data.max_response_length=1024
        data.filter_overlong_prompts=True data.truncation=error data.prompt_key=messages data.shuffle=False
        actor_rollout_ref.model.path=Qwen/Qwen2.5-3B-Instruct actor_rollout_ref.model.use_shm=True
        actor_rollout_ref.model.lora_rank=64 actor_rollout_ref.model.lora_alpha=32
        actor_rollout_ref.actor.optim.lr=3e-6 actor_rollout_ref.model.use_remove_padding=True
        actor_rollout_ref.actor.ppo_mini_batch_size=256 actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=40
        actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_coef=0.001
        actor_rollout_ref.actor.kl_loss_type=low_var_kl actor_rollout_ref.actor.entropy_coeff=0
        actor_rollout_ref.model.enable_gradient_checkpointing=True
        actor_rollout_ref.actor.fsdp_config.param_offload=False
        actor_rollout_ref.actor.fsdp_config.optimizer_offload=False
        actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=40
        actor_rollout_ref.rollout.tensor_model_parallel_size=2 actor_rollout_ref.rollout.name=vllm
        actor_rollout_ref.rollout.gpu_memory_utilization=0.6 actor_rollout_ref.rollout.n=5
        actor_rollout_ref.rollout.load_format=safetensors actor_rollout_ref.rollout.layered_summon=True
        actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=40
        actor_rollout_ref.ref.fsdp_config.param_offload=True algorithm.use_kl_in_reward=False trainer.critic_warmup=0
        trainer.logger=[console,wandb] trainer.project_name=verl_grpo_example_gsm8k
        trainer.experiment_name=qwen2_7b_function_rm trainer.n_gpus_per_node=8 trainer.nnodes=1 trainer.save_freq=20
        trainer.test_freq=5 trainer.total_epochs=15
        """,
    ),
    "verl qwen2_5_vl-7b": script(
        """
        algorithm.adv_estimator=grpo data.train_files=DATA/train.parquet data.val_files=DATA/test.parquet
        data.train_batch_size=512 data.max_prompt_length=1024 data.max_response_length=2048
        data.filter_overlong_prompts=True data.truncation=error data.image_key=images
        actor_rollout_ref.model.path=Qwen/Qwen2.5-VL-7B-Instruct actor_rollout_ref.actor.optim.lr=1e-6
        actor_rollout_ref.model.use_remove_padding=True actor_rollout_ref.actor.ppo_mini_batch_size=128
        actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=10 actor_rollout_ref.actor.use_kl_loss=True
        actor_rollout_ref.actor.kl_loss_coef=0.01 actor_rollout_ref.actor.kl_loss_type=low_var_kl
        actor_rollout_ref.actor.entropy_coeff=0 actor_rollout_ref.model.enable_gradient_checkpointing=True
        actor_rollout_ref.actor.fsdp_config.param_offload=False
        actor_rollout_ref.actor.fsdp_config.optimizer_offload=False
        actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=20
        actor_rollout_ref.rollout.tensor_model_parallel_size=2 actor_rollout_ref.rollout.name=vllm
        +actor_rollout_ref.rollout.engine_kwargs.vllm.disable_mm_preprocessor_cache=True
        actor_rollout_ref.rollout.gpu_memory_utilization=0.6 actor_rollout_ref.rollout.enable_chunked_prefill=False
        actor_rollout_ref.rollout.enforce_eager=False actor_rollout_ref.rollout.free_cache_engine=False
        actor_rollout_ref.rollout.n=5 actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=20
        actor_rollout_ref.ref.fsdp_config.param_offload=True algorithm.use_kl_in_reward=False trainer.critic_warmup=0
        trainer.logger=[console,wandb] trainer.project_name=verl_grpo_example_geo3k
        trainer.experiment_name=qwen2_5_vl_7b_function_rm trainer.n_gpus_per_node=8 trainer.nnodes=1
        trainer.save_freq=20 trainer.test_freq=5 trainer.total_epochs=15
        """
    ),
    "verl qwen3-4b_npu": script(
        """
        algorithm.adv_estimator=grpo data.train_files=DATA/train.parquet data.val_files=DATA/test.parquet
        data.train_batch_size=512 data.max_prompt_length=1024 data.max_response_length=1024
        data.filter_overlong_prompts=True data.truncation=error actor_rollout_ref.model.path=~/verl/models/Qwen3-4B
        actor_rollout_ref.actor.optim.lr=5e-7 actor_rollout_ref.model.use_remove_padding=True
        actor_rollout_ref.actor.entropy_coeff=0.001 actor_rollout_ref.actor.ppo_mini_batch_size=256
        actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_coef=0.001
        actor_rollout_ref.actor.kl_loss_type=low_var_kl actor_rollout_ref.actor.use_torch_compile=False
        actor_rollout_ref.actor.use_dynamic_bsz=True actor_rollout_ref.actor.ppo_max_token_len_per_gpu=3000
        actor_rollout_ref.model.enable_gradient_checkpointing=True
        actor_rollout_ref.actor.fsdp_config.param_offload=True
        actor_rollout_ref.actor.fsdp_config.optimizer_offload=True actor_rollout_ref.rollout.enforce_eager=True
        actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True
        actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=4096
        actor_rollout_ref.rollout.enable_chunked_prefill=False actor_rollout_ref.rollout.tensor_model_parallel_size=2
        actor_rollout_ref.rollout.name=vllm actor_rollout_ref.rollout.gpu_memory_utilization=0.9
        actor_rollout_ref.rollout.n=5 actor_rollout_ref.ref.log_prob_use_dynamic_bsz=True
        actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=8192 actor_rollout_ref.ref.fsdp_config.param_offload=True
        actor_rollout_ref.ref.use_torch_compile=True algorithm.kl_ctrl.kl_coef=0.001 trainer.critic_warmup=0
        trainer.project_name=verl_grpo_example_gsm8k trainer.experiment_name=qwen3_4b_grpo_8ka_1
        trainer.logger=[console,tensorboard]
        trainer.default_local_dir=~/verl/ckpts/verl_grpo_example_gsm8k/qwen3_4b_grpo_8ka_1
        trainer.n_gpus_per_node=16 trainer.nnodes=1 trainer.save_freq=-1 trainer.test_freq=5 trainer.total_epochs=15
        trainer.val_before_train=False trainer.device=npu
        """,
        "trainer.device",
    ),
    "verl moonlight_math": script(
        """
        data.train_files=DATA/train.parquet data.val_files=DATA/test.parquet data.prompt_key=prompt
        data.truncation=left data.max_prompt_length=2048 data.max_response_length=4096 data.train_batch_size=64
        actor_rollout_ref.rollout.n=16 algorithm.adv_estimator=grpo algorithm.use_kl_in_reward=False
        algorithm.kl_ctrl.kl_coef=0.0 actor_rollout_ref.actor.use_kl_loss=False
        actor_rollout_ref.actor.kl_loss_coef=0.0 actor_rollout_ref.actor.clip_ratio_low=0.2
        actor_rollout_ref.actor.clip_ratio_high=0.28 actor_rollout_ref.actor.clip_ratio_c=10.0
        actor_rollout_ref.model.use_remove_padding=True actor_rollout_ref.actor.use_dynamic_bsz=True
        actor_rollout_ref.ref.log_prob_use_dynamic_bsz=True actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True
        actor_rollout_ref.actor.ppo_max_token_len_per_gpu=6144
        actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=18432
        actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=18432 actor_rollout_ref.model.path=MODEL
        actor_rollout_ref.model.enable_gradient_checkpointing=True actor_rollout_ref.actor.optim.lr=1e-6
        actor_rollout_ref.actor.optim.lr_warmup_steps=10 actor_rollout_ref.actor.optim.weight_decay=0.1
        actor_rollout_ref.actor.ppo_mini_batch_size=16 actor_rollout_ref.actor.fsdp_config.param_offload=True
        actor_rollout_ref.actor.fsdp_config.optimizer_offload=True actor_rollout_ref.actor.entropy_coeff=0
        actor_rollout_ref.actor.grad_clip=1.0 actor_rollout_ref.actor.loss_agg_mode=token-mean
        actor_rollout_ref.actor.ulysses_sequence_parallel_size=4 actor_rollout_ref.rollout.gpu_memory_utilization=0.9
        actor_rollout_ref.rollout.tensor_model_parallel_size=4 actor_rollout_ref.rollout.enable_chunked_prefill=True
        actor_rollout_ref.rollout.max_num_batched_tokens=6144 actor_rollout_ref.rollout.temperature=1.0
        actor_rollout_ref.rollout.top_p=1.0 actor_rollout_ref.rollout.top_k=-1
        actor_rollout_ref.rollout.val_kwargs.temperature=1.0 actor_rollout_ref.rollout.val_kwargs.top_p=0.7
        actor_rollout_ref.rollout.val_kwargs.top_k=-1 actor_rollout_ref.rollout.val_kwargs.do_sample=True
        actor_rollout_ref.rollout.val_kwargs.n=1 actor_rollout_ref.ref.fsdp_config.param_offload=True
        actor_rollout_ref.ref.ulysses_sequence_parallel_size=4 actor_rollout_ref.actor.fsdp_config.fsdp_size=32
        reward_model.reward_manager=dapo +reward_model.reward_kwargs.overlong_buffer_cfg.enable=False
        +reward_model.reward_kwargs.overlong_buffer_cfg.len=4096
        +reward_model.reward_kwargs.overlong_buffer_cfg.penalty_factor=0.1
        +reward_model.reward_kwargs.overlong_buffer_cfg.log=False +reward_model.reward_kwargs.max_resp_len=4096
        trainer.logger=["console","wandb"] trainer.project_name=DAPO
        trainer.experiment_name=DAPO-Qwen3-30B-A3B-Base-MATH-0719a1 trainer.n_gpus_per_node=8 trainer.nnodes=1
        trainer.val_before_train=True trainer.test_freq=10 trainer.save_freq=-1 trainer.total_epochs=10
        trainer.total_training_steps=300
        trainer.default_local_dir=~/verl/ckpts/DAPO/DAPO-Qwen3-30B-A3B-Base-MATH-0719a1 trainer.resume_mode=auto
        trainer.log_val_generations=10
        """,
        *_ULYSSES, f"{_ROLLOUT}.val_kwargs.top_p", "reward_model.reward_manager",
        "trainer.log_val_generations",
    ),
    "verl dapo_qwen2.5_32b": script(
        """
        data.train_files=DATA/train.parquet data.val_files=DATA/test.parquet data.prompt_key=prompt
        data.truncation=left data.max_prompt_length=2048 data.max_response_length=20480 data.gen_batch_size=1536
        data.train_batch_size=512 actor_rollout_ref.rollout.n=16 algorithm.adv_estimator=grpo
        algorithm.kl_ctrl.kl_coef=0.0 actor_rollout_ref.actor.kl_loss_coef=0.0
        actor_rollout_ref.actor.clip_ratio_low=0.2 actor_rollout_ref.actor.clip_ratio_high=0.28
        algorithm.filter_groups.enable=True algorithm.filter_groups.max_num_gen_batches=10
        algorithm.filter_groups.metric=acc actor_rollout_ref.model.use_remove_padding=True
        actor_rollout_ref.actor.use_dynamic_bsz=True actor_rollout_ref.ref.log_prob_use_dynamic_bsz=True
        actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True
        actor_rollout_ref.actor.ppo_max_token_len_per_gpu=22528
        actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=22528
        actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=22528 actor_rollout_ref.model.path=MODEL
        +actor_rollout_ref.model.override_config.attention_dropout=0.
        +actor_rollout_ref.model.override_config.embd_pdrop=0.
        +actor_rollout_ref.model.override_config.resid_pdrop=0.
        actor_rollout_ref.model.enable_gradient_checkpointing=True actor_rollout_ref.actor.optim.lr=1e-6
        actor_rollout_ref.actor.optim.lr_warmup_steps=10 actor_rollout_ref.actor.optim.weight_decay=0.1
        actor_rollout_ref.actor.ppo_mini_batch_size=32 actor_rollout_ref.actor.fsdp_config.param_offload=True
        actor_rollout_ref.actor.fsdp_config.optimizer_offload=True actor_rollout_ref.actor.entropy_coeff=0
        actor_rollout_ref.actor.grad_clip=1.0 actor_rollout_ref.actor.use_token_level_loss=True
        actor_rollout_ref.actor.ulysses_sequence_parallel_size=8
        actor_rollout_ref.rollout.gpu_memory_utilization=0.80
        actor_rollout_ref.rollout.tensor_model_parallel_size=4 actor_rollout_ref.rollout.enable_chunked_prefill=True
        actor_rollout_ref.rollout.max_num_batched_tokens=22528 actor_rollout_ref.rollout.temperature=1.0
        actor_rollout_ref.rollout.top_p=1.0 actor_rollout_ref.rollout.top_k=-1
        actor_rollout_ref.rollout.val_kwargs.temperature=1.0 actor_rollout_ref.rollout.val_kwargs.top_p=1.0
        actor_rollout_ref.rollout.val_kwargs.top_k=-1 actor_rollout_ref.rollout.val_kwargs.do_sample=True
        actor_rollout_ref.rollout.val_kwargs.n=1 actor_rollout_ref.ref.fsdp_config.param_offload=True
        actor_rollout_ref.ref.ulysses_sequence_parallel_size=8 actor_rollout_ref.actor.fsdp_config.fsdp_size=-1
        reward_model.reward_manager=dapo custom_reward_function.overlong_buffer.enable=True
        custom_reward_function.overlong_buffer.len=4096 custom_reward_function.overlong_buffer.penalty_factor=1.0
        trainer.logger=[console,wandb] trainer.project_name=DAPO trainer.experiment_name=DAPO-Qwen2.5-32B
        trainer.n_gpus_per_node=8 trainer.nnodes=16 +trainer.val_before_train=True trainer.test_freq=5
        trainer.save_freq=5 trainer.total_epochs=1 trainer.default_local_dir=~/verl/ckpts/DAPO/DAPO-Qwen2.5-32B
        trainer.resume_mode=auto
        """,
        "data.gen_batch_size", *_FILTER_GROUPS, *_BUFFER, *_ULYSSES, f"{_ACTOR}.use_token_level_loss",
        "reward_model.reward_manager",
    ),
    "Search-R1 nq": script(
        """
        data.train_files=DATA/train.parquet data.val_files=DATA/test.parquet data.train_data_num=null
        data.val_data_num=null data.train_batch_size=512 data.val_batch_size=256 data.max_prompt_length=4096
        data.max_response_length=500 data.max_start_length=2048 data.max_obs_length=500
        data.shuffle_train_dataloader=True algorithm.adv_estimator=grpo actor_rollout_ref.model.path=Qwen/Qwen2.5-3B
        actor_rollout_ref.model.enable_gradient_checkpointing=true actor_rollout_ref.model.use_remove_padding=True
        actor_rollout_ref.actor.optim.lr=1e-6 actor_rollout_ref.actor.optim.lr_warmup_steps_ratio=0.285
        actor_rollout_ref.actor.use_kl_loss=true actor_rollout_ref.actor.ppo_mini_batch_size=256
        actor_rollout_ref.actor.ppo_micro_batch_size=64 actor_rollout_ref.actor.fsdp_config.param_offload=true
        actor_rollout_ref.actor.fsdp_config.grad_offload=true
        actor_rollout_ref.actor.fsdp_config.optimizer_offload=true
        actor_rollout_ref.rollout.log_prob_micro_batch_size=128
        actor_rollout_ref.rollout.tensor_model_parallel_size=1 actor_rollout_ref.rollout.name=vllm
        actor_rollout_ref.rollout.gpu_memory_utilization=0.6 actor_rollout_ref.ref.log_prob_micro_batch_size=128
        actor_rollout_ref.ref.fsdp_config.param_offload=True actor_rollout_ref.actor.kl_loss_coef=0.001
        actor_rollout_ref.actor.kl_loss_type=low_var_kl algorithm.no_think_rl=false
        actor_rollout_ref.rollout.n_agent=5 actor_rollout_ref.rollout.temperature=1
        actor_rollout_ref.actor.state_masking=true trainer.logger=[wandb] +trainer.val_only=false
        +trainer.val_before_train=true trainer.default_hdfs_dir=null trainer.n_gpus_per_node=8 trainer.nnodes=1
        trainer.save_freq=100 trainer.test_freq=50 trainer.project_name=Search-R1
        trainer.experiment_name=nq-search-r1-grpo-qwen2.5-3b-em trainer.total_epochs=15
        trainer.total_training_steps=1005 trainer.default_hdfs_dir=null
        trainer.default_local_dir=verl_checkpoints/nq-search-r1-grpo-qwen2.5-3b-em max_turns=2
        retriever.url=http://127.0.0.1:8000/retrieve retriever.topk=3
        """,
        *_OLD_MICRO_BATCHES, f"{_ACTOR}.fsdp_config.grad_offload",
        # Of its own fork of verl, which no page lists.
        "data.train_data_num", "data.val_data_num", "data.max_start_length", "data.max_obs_length",
        "data.shuffle_train_dataloader", "algorithm.no_think_rl", f"{_ROLLOUT}.n_agent", f"{_ACTOR}.state_masking",
        "max_turns", "retriever.url", "retriever.topk",
    ),
    "One-Shot-RLVR dsr_sub": script(
        """
        algorithm.adv_estimator=grpo data.train_files=DATA/train.parquet data.val_files=DATA/test.parquet
        data.train_batch_size=128 data.val_batch_size=530 data.max_prompt_length=1024 data.max_response_length=3072
        reward_model.reward_manager=naive actor_rollout_ref.model.path=Qwen/Qwen2.5-Math-1.5B
        actor_rollout_ref.actor.optim.lr=1e-6 actor_rollout_ref.model.use_remove_padding=True
        actor_rollout_ref.actor.ppo_mini_batch_size=128 actor_rollout_ref.actor.use_dynamic_bsz=True
        actor_rollout_ref.actor.ppo_max_token_len_per_gpu=24000 actor_rollout_ref.actor.use_kl_loss=True
        actor_rollout_ref.actor.kl_loss_coef=0.001 actor_rollout_ref.actor.kl_loss_type=low_var_kl
        actor_rollout_ref.model.enable_gradient_checkpointing=True
        actor_rollout_ref.actor.fsdp_config.param_offload=False
        +actor_rollout_ref.actor.fsdp_config.grad_offload=False
        actor_rollout_ref.actor.fsdp_config.optimizer_offload=False
        actor_rollout_ref.rollout.tensor_model_parallel_size=2 actor_rollout_ref.rollout.name=vllm
        actor_rollout_ref.rollout.temperature=0.6 +actor_rollout_ref.rollout.val_temperature=0.6
        actor_rollout_ref.rollout.gpu_memory_utilization=0.7 actor_rollout_ref.rollout.n=8
        +actor_rollout_ref.rollout.n_val=1 actor_rollout_ref.ref.fsdp_config.param_offload=True
        algorithm.kl_ctrl.kl_coef=0.001 trainer.critic_warmup=0 trainer.logger=[console,wandb]
        trainer.project_name=verl_few_shot trainer.experiment_name=Qwen2.5-Math-1.5B-dsr_sub
        trainer.checkpoints_dir=outputs +trainer.val_before_train=True trainer.n_gpus_per_node=8 trainer.nnodes=1
        trainer.save_freq=250 trainer.test_freq=250 trainer.default_hdfs_dir=null trainer.total_epochs=400
        """,
        # Of its own fork.
        f"{_ROLLOUT}.val_temperature", f"{_ROLLOUT}.n_val", "trainer.checkpoints_dir",
    ),
    "Logic-RL main_grpo": script(
        """
        algorithm.adv_estimator=grpo data.train_files=DATA/train.parquet data.val_files=DATA/test.parquet
        data.train_batch_size=2 data.val_batch_size=2 data.max_prompt_length=400 data.max_response_length=2048
        actor_rollout_ref.model.path=MODEL actor_rollout_ref.actor.optim.lr=3e-7
        actor_rollout_ref.actor.use_dynamic_bsz=True actor_rollout_ref.actor.ppo_max_token_len_per_gpu=8192
        actor_rollout_ref.model.use_remove_padding=True actor_rollout_ref.actor.ppo_mini_batch_size=256
        actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8 actor_rollout_ref.actor.use_kl_loss=False
        actor_rollout_ref.actor.kl_loss_coef=0.001 actor_rollout_ref.actor.kl_loss_type=low_var_kl
        actor_rollout_ref.actor.ulysses_sequence_parallel_size=2
        actor_rollout_ref.model.enable_gradient_checkpointing=True
        actor_rollout_ref.actor.fsdp_config.param_offload=True
        actor_rollout_ref.actor.fsdp_config.optimizer_offload=True
        actor_rollout_ref.rollout.log_prob_micro_batch_size=80
        actor_rollout_ref.rollout.tensor_model_parallel_size=1 actor_rollout_ref.rollout.name=vllm
        actor_rollout_ref.rollout.gpu_memory_utilization=0.7 actor_rollout_ref.rollout.n=8
        actor_rollout_ref.ref.log_prob_micro_batch_size=80 actor_rollout_ref.ref.fsdp_config.param_offload=True
        algorithm.kl_ctrl.kl_coef=0.001 trainer.resume_mode=disable trainer.critic_warmup=0 trainer.logger=[wandb]
        trainer.project_name=GRPO_logic_KK trainer.experiment_name=Qwen-3B trainer.n_gpus_per_node=2 trainer.nnodes=1
        trainer.default_local_dir=../ckpts/Qwen2.5-3B trainer.default_hdfs_dir=null trainer.save_freq=10
        trainer.test_freq=10 trainer.total_epochs=3
        """,
        # A mini-batch of 256 cannot be made of the 2 samples of a step, there neither.
        "data.train_batch_size", f"{_ACTOR}.ppo_micro_batch_size_per_gpu", f"{_ACTOR}.ulysses_sequence_parallel_size",
        f"{_ROLLOUT}.log_prob_micro_batch_size", f"{_REF}.log_prob_micro_batch_size",
    ),
}  # fmt: skip

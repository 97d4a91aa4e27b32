"""The configuration: the original's command lines, every shipped recipe, and errors that help."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from verl.batch_plan import BatchPlan
from verl.config import DataConfig, HiddenRewardConfig, RunConfig
from verl.config_checks import build_config
from verl.config_fields import limits_of, types_of, walk_fields
from verl.errors import UserError
from verl.trainer.compose import CONFIG_DIR, compose_config
from verl.trainer.machine_checks import check_ray
from verl.trainer.main_ppo import main
from verl.trainer.ppo.validation import read_pairs
from verl.trainer.prepare import build_renderer, check_engine_groups, check_shard_groups, find_devices, start_ray

ORIGINAL = """
algorithm.adv_estimator=grpo algorithm.norm_adv_by_std_in_grpo=False algorithm.use_kl_in_reward=False
data.train_batch_size=64 data.val_batch_size=16 data.max_prompt_length=1024 data.max_response_length=2048
data.filter_overlong_prompts=False data.truncation=right
actor_rollout_ref.model.path=Qwen/Qwen2.5-1.5B-Instruct actor_rollout_ref.model.use_remove_padding=True
actor_rollout_ref.model.enable_gradient_checkpointing=True actor_rollout_ref.actor.optim.lr=1e-6
actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_coef=0
actor_rollout_ref.actor.kl_loss_type=low_var_kl actor_rollout_ref.actor.entropy_coeff=0
actor_rollout_ref.actor.fsdp_config.param_offload=True actor_rollout_ref.actor.fsdp_config.optimizer_offload=True
actor_rollout_ref.actor.fsdp_config.offload_policy=True actor_rollout_ref.actor.use_dynamic_bsz=True
actor_rollout_ref.actor.ppo_mini_batch_size=16 actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384
actor_rollout_ref.rollout.tensor_model_parallel_size=2 actor_rollout_ref.rollout.gpu_memory_utilization=0.5
actor_rollout_ref.rollout.enable_chunked_prefill=False actor_rollout_ref.rollout.enforce_eager=True
actor_rollout_ref.rollout.name=vllm actor_rollout_ref.rollout.free_cache_engine=False
actor_rollout_ref.rollout.n=8 actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True
actor_rollout_ref.ref.fsdp_config.param_offload=True actor_rollout_ref.ref.log_prob_use_dynamic_bsz=True
reward_model.enable=False reward_model.reward_manager=hidden
+reward_model.reward_kwargs.temperature=0.1 +reward_model.reward_kwargs.with_scale=True
+reward_model.reward_kwargs.clustering_weight=0.2 +reward_model.reward_kwargs.cross_group_weight=0.2
trainer.critic_warmup=0 trainer.logger=["wandb"] trainer.project_name=GRACE trainer.experiment_name=test_exp
trainer.n_gpus_per_node=4 trainer.nnodes=1 trainer.save_freq=50 trainer.test_freq=-1
trainer.val_before_train=False trainer.total_epochs=2
""".split()


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    for name in ("train.parquet", "test.parquet"):
        (tmp_path / name).touch()
    return [f"data.train_files={tmp_path}/train.parquet", f"data.val_files={tmp_path}/test.parquet"]


@pytest.mark.parametrize("mode", ["supervised", "unsupervised"])
def test_the_originals_command_line_is_accepted_with_its_meaning(files, mode):
    config = compose_config([*ORIGINAL, *files, f"+data.train_mode={mode}"])
    assert config.train_mode == mode
    actor = config.actor_rollout_ref.actor
    assert (config.data.train_batch_size, actor.ppo_mini_batch_size, config.actor_rollout_ref.rollout.n) == (
        64,
        16,
        8,
    )
    assert config.reward_model.reward_kwargs == {
        "temperature": 0.1, "with_scale": True, "clustering_weight": 0.2, "cross_group_weight": 0.2,
    }  # fmt: skip
    assert actor.use_kl_loss and not config.needs_reference, "a KL of weight 0 needs no reference model"
    assert config.trainer.logger == ["wandb"] and config.trainer.save_freq == 50
    assert actor.optim.lr == 1e-6 and actor.fsdp_config.offload_policy
    plan = BatchPlan.from_config(config, num_samples=640, num_anchors=2 if mode == "supervised" else 1, world_size=4)
    assert plan.trained_rows_per_step == 512
    assert plan.anchor_rows_per_step == (128 if mode == "supervised" else 64)
    assert (plan.updates_per_step, plan.trained_rows_per_update, plan.total_steps) == (4, 128, 20)


@pytest.mark.parametrize(
    ("first", "between", "expected"),
    [(0, 0, "RRRRRRR"), (3, 0, "---RRRR"), (0, 2, "R--R--R"), (2, 1, "--R-R-R"), (9, 1, "-------")],
)
def test_which_steps_write_rationales(first, between, expected):
    trainer = {"contrastive_warmup_steps": first, "contrastive_steps_between": between, "total_training_steps": 7}
    config = RunConfig.model_validate({"trainer": trainer})
    plan = BatchPlan.from_config(config, num_samples=64, num_anchors=2, world_size=1)
    assert "".join("-R"[plan.schedule.writes_rationales(step)] for step in range(1, 8)) == expected
    told = dict(plan.lines()).get("without rationales", "0")
    assert told.split()[0] == str(expected.count("-"))


def test_the_plan_of_steps_of_two_sizes():
    config = RunConfig.model_validate(
        {
            "data": {"train_batch_size": 2, "contrastive_batch_size": 6},
            "actor_rollout_ref": {"actor": {"ppo_mini_batch_size": 2}, "rollout": {"n": 3}},
            "trainer": {"contrastive_warmup_steps": 1, "contrastive_steps_between": 1, "total_epochs": 2},
        }
    )
    plan = BatchPlan.from_config(config, num_samples=20, num_anchors=2, world_size=1)
    # 6 2 6 2, and the 4 samples that are left are too few for the next 6.
    assert (plan.total_steps, plan.trained_rows_per_step, plan.updates_per_step) == (8, 6, 1)
    lines = dict(plan.lines())
    assert lines["steps"] == "8 by trainer.total_epochs=2 (4 in the first epoch)"
    assert lines["without rationales"] == "4 of them: the first 1, 1 after each one with them, with 6 samples each"


def _scripts_python(tmp_path, gpus):
    """The environment of a script: its python counts so many GPUs, none if all are hidden, and notes what it runs."""
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/sh
if [ "$1" = -c ]; then
    if [ "${{CUDA_VISIBLE_DEVICES-shown}}" ]; then echo {gpus}; else echo 0; fi
else
    printf '%s\\0' "$@" >> {tmp_path}/commands; echo >> {tmp_path}/commands; env -0 > {tmp_path}/environment
fi
"""
    )
    python.chmod(0o755)
    return {**{k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}, "PYTHON": str(python)}


def _arguments(tmp_path, program):
    """Of the module `program` that a script has started."""
    commands = [line.split("\0")[1:-1] for line in (tmp_path / "commands").read_text().splitlines()]
    return next(arguments for module, *arguments in commands if module == program)


@pytest.mark.parametrize("mode", ["supervised", "unsupervised"])
@pytest.mark.parametrize(("gpus", "recipe"), [(0, ""), (0, "paper"), (0, "joint"), (1, ""), (4, "paper"), (4, "joint")])
def test_every_recipe_of_train_sh_is_accepted_with_any_path(tmp_path, repo, mode, gpus, recipe, monkeypatch, capsys):
    # What a shell can name and hydra's grammar cannot read.
    data = tmp_path / "Übung (1) #&=~,{a}'\"\\ $x ${y} [z]"
    data.mkdir()
    for name in ("train.parquet", "test.parquet"):
        (data / name).touch()
    env = {**_scripts_python(tmp_path, gpus), "MODE": mode, "RECIPE": recipe, "MODEL": f"{data}/model"}
    env |= {"TRAIN_FILE": f"{data}/train.parquet", "VAL_FILE": f"{data}/test.parquet"}
    command = ["bash", str(repo / "train.sh"), "actor_rollout_ref.rollout.seed=77", "--print-config"]
    # On the command line ${ begins a reference.
    written = str(data).replace("${", r"\${")
    command += [f"trainer.default_local_dir={written}", "trainer.experiment_name=20251128"]
    out = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    note = out.stdout
    for variable in (tmp_path / "environment").read_text().split("\0")[:-1]:
        monkeypatch.setenv(*variable.split("=", 1))
    # In this process, as importing it takes longest.
    assert main(_arguments(tmp_path, "verl.trainer.main_ppo")) == 0
    printed = capsys.readouterr().out
    assert ("no GPU" in note) if gpus == 0 else (f"{gpus} visible GPU" in note)
    config = yaml.safe_load(printed)
    assert config["data"]["train_mode"] == mode
    assert config["data"]["train_files"] == f"{data}/train.parquet"
    assert config["data"]["val_files"] == f"{data}/test.parquet"
    assert config["actor_rollout_ref"]["model"]["path"] == f"{data}/model"
    assert config["trainer"]["default_local_dir"] == str(data)
    assert config["trainer"]["experiment_name"] == "20251128"
    assert config["actor_rollout_ref"]["rollout"]["seed"] == 77
    assert config["actor_rollout_ref"]["rollout"]["tensor_model_parallel_size"] == (2 if gpus == 4 else 1)
    rewards, actor = config["reward_model"]["reward_kwargs"], config["actor_rollout_ref"]["actor"]
    found = (rewards.get("contrastive_weight", 0), actor["embedding_grad_share"])
    usual = "joint" if gpus == 0 and mode == "supervised" else "paper"
    is_joint = (recipe or usual) == "joint"
    assert found == ((1, 0.5) if is_joint else (0, None))
    # Whatever trains the embeddings was measured with these two.
    assert rewards.get("contrastive_anchors", False) == is_joint
    assert config["trainer"]["contrastive_steps_between"] == (8 if is_joint and mode == "supervised" else 0)


def test_the_contrastive_recipe_is_of_triplets(repo):
    env = {**os.environ, "GPUS": "0", "RECIPE": "contrastive", "MODE": "unsupervised"}
    out = subprocess.run(["bash", str(repo / "train.sh")], env=env, capture_output=True, text=True, check=False)
    assert out.returncode == 2 and not out.stdout
    assert out.stderr.startswith("train.sh: RECIPE=contrastive with MODE=unsupervised; it learns from triplets")


@pytest.mark.parametrize("gpus", [0, 4])
def test_the_contrastive_recipe_of_train_sh_writes_no_rationales(tmp_path, repo, gpus):
    env = _scripts_python(tmp_path, gpus) | {"RECIPE": "contrastive", "TRAIN_FILE": "mine.parquet"}
    subprocess.run(["bash", str(repo / "train.sh")], env=env, capture_output=True, check=True)
    arguments = [given for given in _arguments(tmp_path, "verl.trainer.main_ppo") if "oc.env" not in given]
    (tmp_path / "mine.parquet").touch()
    named = [f"data.train_files={tmp_path}/mine.parquet", "actor_rollout_ref.model.path=model"]
    config = compose_config([*arguments, *named], "ppo_trainer", CONFIG_DIR)
    assert not config.data.think and config.trainer.experiment_name == f"{'' if gpus else 'cpu_'}supervised_contrastive"
    plan = BatchPlan.from_config(config, num_samples=640, num_anchors=2, world_size=4)
    assert not any(map(plan.schedule.writes_rationales, range(1, 1000)))
    size = 64 if gpus else 12
    assert (plan.trained_rows_per_step, plan.anchor_rows_per_step) == (size, 2 * size)
    lines = dict(plan.lines())
    assert lines["texts per step"] == f"{size} trained + {2 * size} anchors" and "rationales per step" not in lines
    assert lines["without rationales"] == "all of them (data.think=False)"


def test_the_quickstart_trains_the_small_model_on_a_machine_with_gpus_too(tmp_path, repo):
    env = _scripts_python(tmp_path, gpus=8) | {"OUT": str(tmp_path / "run")}
    subprocess.run(["bash", str(repo / "quickstart.sh")], env=env, capture_output=True, check=False)
    arguments = _arguments(tmp_path, "verl.trainer.main_ppo")
    assert "trainer.experiment_name=cpu_supervised_joint" in arguments
    assert "actor_rollout_ref.rollout.name=hf" in arguments


@pytest.mark.parametrize(("given", "expected"), [({"GPUS": "8"}, "vllm"), ({"GPUS": "0"}, "hf"), ({}, "hf")])
def test_the_gpus_of_other_machines_are_told_by_gpus(tmp_path, repo, given, expected):
    env = _scripts_python(tmp_path, gpus=0) | given | {"TRAIN_FILE": "mine.parquet"}
    subprocess.run(["bash", str(repo / "train.sh")], env=env, capture_output=True, check=True)
    assert f"actor_rollout_ref.rollout.name={expected}" in _arguments(tmp_path, "verl.trainer.main_ppo")


@pytest.mark.parametrize("gpus", [0, 8])
def test_a_file_of_ones_own_is_not_scored_on_the_papers(tmp_path, repo, gpus):
    env = _scripts_python(tmp_path, gpus) | {"TRAIN_FILE": "mine.parquet"}
    subprocess.run(["bash", str(repo / "train.sh")], env=env, capture_output=True, check=True)
    assert "data.val_files=null" in _arguments(tmp_path, "verl.trainer.main_ppo")


@pytest.mark.parametrize("wrong", [{"MODE": "triplets"}, {"RECIPE": "best"}, {"GPUS": "two"}])
def test_train_sh_refuses_a_mode_and_a_recipe_that_there_are_not(repo, wrong):
    command = ["bash", str(repo / "train.sh")]
    out = subprocess.run(command, env={**os.environ, **wrong}, capture_output=True, text=True, check=False)
    ((name, value),) = wrong.items()
    assert out.returncode == 2 and out.stderr.startswith(f"train.sh: {name}={value}; use ")


def test_the_yaml_is_that_of_the_classes(repo):
    command = [sys.executable, str(repo / "scripts/write_config.py"), "--check"]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.trian_files=x", r"unknown key data\.trian_files\. Did you mean data\.train_files\?"),
        ("data.n=4", r"Did you mean actor_rollout_ref\.rollout\.n\?"),
        ("critic.optim.lr=1", "no counterpart here: GRPO has no critic"),
        ("actor_rollout_ref.model.lora_rank=-1", r"model\.lora_rank=-1 must be 0 or more"),
        (
            "actor_rollout_ref.model.lora_alpha=64",
            r"model\.lora_alpha=64.* is read with actor_rollout_ref\.model\.lora_rank",
        ),
        ("trainer.merge_lora=True", r"merge_lora=True has no effect: it is read with .*lora_rank above 0, or lora_ada"),
        ("data.train_batch_size=50", "Nearest: train_batch_size 48 or 64, or ppo_mini_batch_size 5, 10, 25"),
        (
            "data.contrastive_batch_size=30",
            "contrastive_batch_size=30 is not a multiple of the 4 mini-batches of a step .*Nearest: 28 or 32",
        ),
        ("data.train_batch_size=many", r"data\.train_batch_size='many'"),
        ("data.max_prompt_length=0", r"data\.max_prompt_length=0 must be above 0"),
        ("actor_rollout_ref.rollout.n=1", r"rollout\.n=1 with algorithm\.adv_estimator=grpo.*2 or more"),
        ("algorithm.adv_estimator=gae", "gae is not supported: it needs a critic"),
        (
            "+actor_rollout_ref.model.override_config.attn_implementation=eager",
            r"no effect; set actor_rollout_ref\.model\.attn_implementation",
        ),
        ("actor_rollout_ref.rollout.top_p=0.9", "must keep the full distribution"),
        ("trainer.critic_warmup=5", "there is no critic"),
        ("reward_model.enable=True", "rewards come from embeddings"),
        (
            "+reward_model.reward_kwargs.temprature=1",
            r"Did you mean temperature\? Valid: objective, temperature",
        ),
        ("+reward_model.reward_kwargs.objective=triplet", r"reward_kwargs\.objective='triplet'"),
        ("+reward_model.reward_kwargs.matryoshka_dims=[64,64]", r"matryoshka_dims=\[64, 64\]: a number is there twice"),
        ("+reward_model.reward_kwargs.matryoshka_dims=[64,0]", r"matryoshka_dims"),
        ("data.train_files=/nowhere/train.parquet", "'/nowhere/train.parquet' does not exist"),
        ("trainer.resume_mode=resume_path", "needs trainer.resume_from_path"),
        ("trainer.resume_from_path=/gone/global_step_3", r"resume_from_path=.* has no effect.*resume_mode=resume_path"),
        ("actor_rollout_ref.actor.entropy_coeff=-2", r"entropy_coeff=-2(\.0)? must be -1 or more, at most 1"),
        ("actor_rollout_ref.actor.kl_loss_coef=-1", r"kl_loss_coef=-1(\.0)? must be 0 or more"),
        ("actor_rollout_ref.actor.tis_imp_ratio_cap=nan", r"tis_imp_ratio_cap=nan must be -1 or more, or null"),
        ("actor_rollout_ref.actor.optim.lr_warmup_steps=-5", r"lr_warmup_steps=-5 must be -1 or more"),
        ("data.seed=-1", r"data\.seed=-1 must be 0 or more"),
        ("trainer.save_freq=-2", r"save_freq=-2 must be -1 or more"),
        ("actor_rollout_ref.actor.embedding_grad_share=2", r"embedding_grad_share=2(\.0)? must be above 0, at most 1"),
        ("actor_rollout_ref.actor.embedding_grad_every=0", r"embedding_grad_every=0 must be above 0"),
        ("+reward_model.reward_kwargs.contrastive_temperature=0", r"contrastive_temperature=0(\.0)? must be above 0"),
        ("algorithm.gamma=1.5", r"gamma=1\.5 must be 0 or more, at most 1"),
        ("+reward_model.reward_kwargs.clustering_weight=-1", r"clustering_weight=-1(\.0)? must be 0 or more"),
        (
            "actor_rollout_ref.actor.strategy=megatron",
            r"strategy=megatron is not supported: models are sharded by torch",
        ),
        (
            "actor_rollout_ref.model.attn_implementation=flash_attention_2",
            r"attn_implementation=flash_attention_2 is not supported: use varlen",
        ),
        ("reward_model.reward_manager=dapo", r"reward_manager=dapo is not supported: use naive"),
        ("actor_rollout_ref.actor.use_dynamic_bsz=False", "micro-batches need a size"),
        ("custom_reward_function.path=mine.py", "is read by reward_model.reward_manager=naive only"),
        ("actor_rollout_ref.actor.clip_ratio_c=0.5", "clip_ratio_c=0.5 must be above 1"),
        (
            "actor_rollout_ref.rollout.max_model_len=100",
            r"max_model_len=100 is less than .*=1024 \+ .*=2048 = 3072; leave it out",
        ),
        (
            "actor_rollout_ref.rollout.max_num_batched_tokens=1000",
            "max_num_batched_tokens=1000 cannot take a sequence of 3072 tokens.*enable_chunked_prefill=True",
        ),
        (
            "actor_rollout_ref.rollout.gpu_memory_utilization=1.5",
            r"gpu_memory_utilization=1\.5 must be above 0, at most 1",
        ),
        (
            "+actor_rollout_ref.rollout.engine_kwargs.other.x=1",
            r"engine_kwargs\.other: only engine_kwargs\.vllm is read; put arguments under it",
        ),
        (
            "actor_rollout_ref.rollout.check_weight_sync=maybe",
            r"rollout\.check_weight_sync='maybe'.*'full', 'sample' or 'off'",
        ),
        ("actor_rollout_ref.rollout.calculate_log_probs=False", "engine and trainer are compared in every step"),
        ("actor_rollout_ref.actor.clip_ratio=-1", r"actor\.clip_ratio=-1(\.0)? must be above 0\."),
        ("algorithm.kl_ctrl.target_kl=0", r"target_kl=0(\.0)? must be above 0"),
        ("actor_rollout_ref.actor.optim.betas=[0.9,1.5]", r"optim\.betas=1\.5 must be 0 or more, below 1"),
        ("actor_rollout_ref.actor.optim.weight_decay=-1", r"weight_decay=-1(\.0)? must be 0 or more"),
        ("actor_rollout_ref.actor.optim.lr=nan", r"optim\.lr=nan: Input should be a finite number"),
        ("data.dataloader_num_workers=-1", r"dataloader_num_workers=-1 must be 0 or more"),
        ("data.val_batch_size=0", r"data\.val_batch_size=0 must be above 0, or null"),
        ("actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=0", r"log_prob_max_token_len_per_gpu=0 must be above 0"),
        ("ray_init.num_cpus=0", r"ray_init\.num_cpus=0 must be above 0, or null"),
        ("reward_model.reward_kwargs.temperature=0", r"reward_kwargs\.temperature=0 must be above 0"),
        (
            "actor_rollout_ref.rollout.mode=async",
            r"rollout\.mode=async is not supported: generation and training take turns",
        ),
        ("actor_rollout_ref.actor.grad_clip=nan", r"actor\.grad_clip=nan must be above 0"),
        ("trainer.use_ray=False", r"trainer\.n_gpus_per_node=4 needs Ray, and trainer\.use_ray=False runs one worker"),
        ("actor_rollout_ref.rollout.dtype=int8", r"rollout\.dtype='int8'.*'bfloat16', 'float16' or 'float32'"),
    ],
)
def test_errors_name_the_key_the_value_and_the_way_out(files, override, message):
    with pytest.raises(UserError, match=message):
        compose_config([*ORIGINAL, *files, "+data.train_mode=supervised", override])


def test_a_validation_file_is_needed_only_when_validation_is_on(files):
    base = [*ORIGINAL, files[0]]
    compose_config(base)
    for switch in ("trainer.test_freq=5", "trainer.val_before_train=True"):
        with pytest.raises(UserError, match=r"data\.val_files is not set"):
            compose_config([*base, switch])
    with pytest.raises(UserError, match=r"data\.val_files: the file 'gone.parquet' does not exist"):
        compose_config([*base, "trainer.test_freq=5", "data.val_files=gone.parquet"])


def tiny_run(tiny_folder: Path, files: list[str], *overrides: str):
    base = [f"actor_rollout_ref.model.path={tiny_folder}", "data.train_batch_size=4"]
    return compose_config([*base, "actor_rollout_ref.actor.ppo_mini_batch_size=4", files[0], *overrides])


def test_a_length_beyond_the_models_context_is_an_error(tiny_folder, files):
    config = tiny_run(tiny_folder, files, "data.max_prompt_length=2100")
    with pytest.raises(UserError, match="4148 tokens, beyond the model's context of 4096; lower one of them by 52"):
        build_renderer(config)
    bare = ["data.think=False", "actor_rollout_ref.actor.embedding_grad_share=1", "trainer.diag_freq=-1"]
    bare += ["+reward_model.reward_kwargs.contrastive_weight=1"]
    build_renderer(tiny_run(tiny_folder, files, "data.max_prompt_length=2100", *bare))
    with pytest.raises(UserError, match="data.max_prompt_length=5000 tokens, .* context of 4096; lower it by 904"):
        build_renderer(tiny_run(tiny_folder, files, "data.max_prompt_length=5000", *bare))


def test_more_workers_than_cpus_is_an_error(tiny_folder, files):
    config = tiny_run(tiny_folder, files, "trainer.n_gpus_per_node=4096", "trainer.device=cpu")
    with pytest.raises(UserError, match=r"trainer\.n_gpus_per_node=4096, but this machine has \d+ CPUs"):
        find_devices(config)


def test_the_cpus_given_to_ray_bound_the_workers(tiny_folder, files):
    # Neither number is likely to be this machine's own.
    for cpus in (3, 5000):
        given = ["trainer.device=cpu", f"ray_init.num_cpus={cpus}"]
        assert find_devices(tiny_run(tiny_folder, files, *given, f"trainer.n_gpus_per_node={cpus}")) == ("cpu", cpus)
        with pytest.raises(UserError, match=f"this machine has {cpus} CPUs .*; set it to {cpus} or less"):
            find_devices(tiny_run(tiny_folder, files, *given, f"trainer.n_gpus_per_node={cpus + 1}"))


def test_each_worker_on_a_gpu_takes_a_cpu_of_ray(tiny_folder, files, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    with pytest.raises(UserError, match=r"ray_init.num_cpus=3 is less than the 4 workers, .*; leave it out, or"):
        find_devices(tiny_run(tiny_folder, files, "ray_init.num_cpus=3"))
    assert find_devices(tiny_run(tiny_folder, files, "ray_init.num_cpus=4")) == ("cuda", 4)


def test_groups_of_shards_that_do_not_fit_the_workers_are_told_before_these_start(tiny_folder, files):
    for section, value, also in (("actor", 3, ()), ("ref", 3, ("trainer.diag_freq=5",))):
        key = f"actor_rollout_ref.{section}.fsdp_config.fsdp_size"
        config = tiny_run(tiny_folder, files, f"{key}={value}", *also)
        with pytest.raises(UserError, match=f"{key}=3 does not divide the 4 workers"):
            check_shard_groups(config, 4)
        check_shard_groups(config, 6)
    # Nobody loads a second model here.
    check_shard_groups(tiny_run(tiny_folder, files, f"{key}=3", "trainer.diag_freq=-1"), 4)


def test_without_ray_there_is_one_worker_however_many_gpus_are_visible(tiny_folder, files, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert find_devices(tiny_run(tiny_folder, files)) == ("cuda", 4)
    alone = tiny_run(tiny_folder, files, "trainer.use_ray=False")
    assert find_devices(alone) == ("cuda", 1)
    assert check_ray(alone) == "not used: trainer.use_ray=False"


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_folder_too_long_for_rays_sockets_is_named(tiny_folder, files, tmp_path, monkeypatch, variable):
    folder = tmp_path / ("x" * 90)
    folder.mkdir()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(variable, str(folder))
    with pytest.raises(UserError, match=rf"^{variable}={folder} is too long .*export RAY_TMPDIR=/tmp"):
        start_ray(tiny_run(tiny_folder, files), world_size=1)


def test_ray_starts_where_the_home_folder_cannot_be_written_to(tiny_folder, files, tmp_path):
    # In a process of its own: the token is read once.
    code = (
        "import ray; from verl.config import RunConfig; from verl.trainer.prepare import start_ray; "
        "reaper = start_ray(RunConfig(), 1); print(ray.available_resources()['CPU'] > 0); ray.shutdown()"
    )
    env = {**os.environ, "HOME": str(tmp_path / "gone"), "RAY_TMPDIR": "/tmp"}
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        env.pop(name, None)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stderr


def test_infinity_switches_clipping_off(tiny_folder, files):
    keys = ("grad_clip", "clip_ratio_low", "clip_ratio_high", "tis_imp_ratio_cap")
    config = tiny_run(tiny_folder, files, *(f"actor_rollout_ref.actor.{key}=inf" for key in keys))
    assert [getattr(config.actor_rollout_ref.actor, key) for key in keys] == [math.inf] * len(keys)
    assert config.importance_cap == math.inf
    both_sides = tiny_run(tiny_folder, files, "actor_rollout_ref.actor.clip_ratio=inf")
    assert both_sides.actor_rollout_ref.actor.clip_ratio == math.inf


def test_the_workers_of_a_machine_must_divide_into_engines(files):
    config = compose_config([*ORIGINAL, *files]).with_engine("vllm")
    check_engine_groups(config, workers_per_node=4)
    with pytest.raises(UserError, match="size=2 does not divide the 3 workers of a machine; use one of 1, 3"):
        check_engine_groups(config, workers_per_node=3)


def test_workers_share_an_engine_of_vllm_only(files):
    shared = compose_config([*ORIGINAL, *files]).with_engine("hf")
    with pytest.raises(UserError, match="size=2 needs the engine vllm, and this run generates with hf; set it to 1"):
        check_engine_groups(shared, workers_per_node=4)
    alone = compose_config([*ORIGINAL, *files, "actor_rollout_ref.rollout.tensor_model_parallel_size=1"])
    check_engine_groups(alone.with_engine("hf"), workers_per_node=3)


def test_resolving_the_engine_changes_its_name_and_nothing_else(files):
    config = compose_config([*ORIGINAL, *files])
    resolved = config.with_engine("hf")
    assert config.actor_rollout_ref.rollout.name == "vllm" and config.actor_rollout_ref.rollout.ranks_per_engine == 2
    assert resolved.actor_rollout_ref.rollout.name == "hf" and resolved.actor_rollout_ref.rollout.ranks_per_engine == 1
    assert resolved.with_engine("vllm") == config


@pytest.mark.parametrize(
    ("cap", "with_vllm", "with_hf"),
    [(None, 2.0, None), (5, 5.0, 5.0), (0, None, None), (-1, None, None)],
)
def test_importance_weights_are_capped_at_two_with_vllm_and_there_are_none_with_hf(cap, with_vllm, with_hf):
    config = RunConfig.model_validate({"actor_rollout_ref": {"actor": {"tis_imp_ratio_cap": cap}}})
    assert config.with_engine("vllm").importance_cap == with_vllm
    assert config.with_engine("hf").importance_cap == with_hf


def test_the_plan_rejects_too_few_samples_and_rows(tiny_folder, files):
    config = tiny_run(tiny_folder, files)
    with pytest.raises(UserError, match="set data.train_batch_size to 3 or less"):
        BatchPlan.from_config(config, num_samples=3, num_anchors=2, world_size=1)
    config = RunConfig.model_validate({"data": {"train_batch_size": 2, "contrastive_batch_size": 9}})
    with pytest.raises(UserError, match="data.contrastive_batch_size=9 .* set data.contrastive_batch_size to 8 or"):
        BatchPlan.from_config(config, num_samples=8, num_anchors=2, world_size=1)
    config = tiny_run(
        tiny_folder, files, "actor_rollout_ref.rollout.n=2", "actor_rollout_ref.actor.ppo_mini_batch_size=1"
    )
    with pytest.raises(UserError, match="2 rows per update, fewer than the 4 workers; set ppo_mini_batch_size to 2"):
        BatchPlan.from_config(config, num_samples=30, num_anchors=2, world_size=4)


def test_nothing_changes_after_building(files):
    config = compose_config([*ORIGINAL, *files])
    with pytest.raises(ValueError, match="frozen"):
        config.data.train_batch_size = 3


def test_a_plain_mapping_builds_the_same_config(files):
    train = files[0].split("=", 1)[1]
    built = build_config({"data": {"train_files": train}, "actor_rollout_ref": {"model": {"path": "m"}}})
    assert built == compose_config([files[0], "actor_rollout_ref.model.path=m"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["trainer.save_best=val/accuracy", "trainer.test_freq=5"],
            "val/accuracy is not a metric.*val/triplet_accuracy",
        ),
        (["trainer.save_best=val/mrr", "trainer.test_freq=-1"], "needs validation; set trainer.test_freq"),
        (["trainer.save_best=val/mrr", "trainer.test_freq=5", "+data.train_mode=unsupervised"], "not a metric"),
        (["trainer.save_best=val/sts_spearman", "trainer.test_freq=5", "data.val_sts_file=null"], "not a metric"),
        (["trainer.save_best=val/reward", "trainer.test_freq=5"], "val/reward is not a metric"),
        (
            [
                "trainer.save_best=val/mrr",
                "trainer.test_freq=5",
                "reward_model.reward_manager=naive",
                "~reward_model.reward_kwargs",
            ],
            "not a metric of this run's validation; use one of val/reward",
        ),
        (["trainer.phase_timeout_s=-1"], "trainer.phase_timeout_s=-1 must be 0 or more"),
    ],
)
def test_settings_of_saving_and_waiting_that_cannot_work_are_rejected(files, overrides, message):
    with pytest.raises(UserError, match=message):
        compose_config([*ORIGINAL, *files, *overrides])


def test_everything_wrong_is_told_at_once_and_nothing_that_follows_from_it(files):
    wrong = ["data.train_batch_size=0", "critic.optim.lr=1", "trainer.nope=1", "trainer.resume_from_path=x"]
    wrong += [
        "+reward_model.reward_kwargs.custom_prompt=x",
        "algorithm.adv_estimator=gae",
        "data.train_files=gone.parquet",
    ]
    with pytest.raises(UserError) as caught:
        compose_config([*ORIGINAL, *files, *wrong])
    starts = (
        "data.train_batch_size=0 must be above 0.", "critic.optim.lr=1 is a key of verl", "unknown key trainer.nope.",
        "trainer.resume_from_path=x has no effect", "reward_model.reward_kwargs.custom_prompt is not known",
        "algorithm.adv_estimator=gae is not supported", "data.train_files: the file 'gone.parquet' does not exist",
    )  # fmt: skip
    lines = str(caught.value).splitlines()
    assert len(lines) == len(starts)
    for start in starts:
        assert sum(line.startswith(start) for line in lines) == 1, start


def test_every_wrong_value_is_reported_at_once(files):
    with pytest.raises(UserError) as caught:
        compose_config([*ORIGINAL, *files, "data.train_batch_size=0", "trainer.nnodes=-1"])
    assert str(caught.value) == "data.train_batch_size=0 must be above 0.\ntrainer.nnodes=-1 must be above 0."


def test_every_number_has_a_range():
    for section in (RunConfig, HiddenRewardConfig):
        for key, field in walk_fields(section):
            if types_of(field.annotation) & {int, float}:
                assert limits_of(field), key
    assert limits_of(dict(walk_fields(RunConfig))["actor_rollout_ref.actor.optim.betas"])


def test_a_range_in_words_and_every_default_is_within_its_range():
    fields = dict(walk_fields(RunConfig))
    assert limits_of(fields["actor_rollout_ref.rollout.gpu_memory_utilization"]) == "above 0, at most 1"
    assert limits_of(fields["actor_rollout_ref.actor.optim.betas"]) == "0 or more, below 1"
    assert limits_of(fields["trainer.experiment_name"]) == ""
    RunConfig.model_validate(RunConfig().model_dump())


def test_the_scored_pairs_of_the_default_are_read_from_any_working_directory(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = compose_config([*ORIGINAL, *files]).data
    assert len(read_pairs(config.sts_path)) == 120
    assert not Path(config.val_sts_file).is_absolute(), "a machine's path must not get into the YAML and checkpoints"
    (tmp_path / "mine.jsonl").touch()
    assert DataConfig(val_sts_file="mine.jsonl").sts_path == Path("mine.jsonl")
    assert DataConfig(val_sts_file="gone.jsonl").sts_path == Path("gone.jsonl")
    assert DataConfig(val_sts_file=None).sts_path is None

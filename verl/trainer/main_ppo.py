"""The training program: python3 -m verl.trainer.main_ppo key=value ...

    --config-name NAME   a YAML of verl/trainer/config, or with --config-path of another folder
    --print-config       show the resolved configuration and stop

The configuration is composed, checked against the data, the model and the machine, and only then are Ray
and the devices started. Exit code 2: something given is wrong, and the message says what.
"""

import argparse
import logging
import os
import signal
import sys
from pathlib import Path

import ray
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from transformers import AutoConfig

from verl.config import ConfigError, RunConfig, file_list
from verl.config_checks import build_config, check_key
from verl.embedding.prompts import PromptRenderer
from verl.single_controller.ray_group import RayWorkerGroup, WorkerError
from verl.trainer.ppo.batch_plan import BatchPlan
from verl.trainer.ppo.core_algos import get_adv_estimator_fn
from verl.trainer.ppo.mismatch import StaleEngineError
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.trainer.ppo.resume import find_resume
from verl.trainer.ppo.validation import Validation
from verl.utils.dataset import PromptDataset
from verl.utils.logging import quiet_libraries
from verl.utils.run_folder import CheckpointError, RunFolder
from verl.utils.signals import Interrupted, StopSignals
from verl.utils.tokenizer import load_tokenizer
from verl.workers.fsdp_workers import ActorRolloutRefWorker
from verl.workers.group import ActorRolloutRefGroup
from verl.workers.reward_manager import load_reward_manager
from verl.workers.rollout.choose import choose_engine

CONFIG_DIR = Path(__file__).parent / "config"
EXIT_USER_ERROR = 2


def main(argv: list[str] | None = None) -> int:
    args = _parse_arguments(argv)
    quiet_libraries()
    try:
        config = compose_config(args.overrides, args.config_name, args.config_path)
        if args.print_config:
            sys.stdout.write(OmegaConf.to_yaml(OmegaConf.create(config.model_dump())))
            return 0
        run(config)
    except (ConfigError, HydraException) as error:
        sys.stderr.write(f"\nmain_ppo: {error}\n")
        return EXIT_USER_ERROR
    except WorkerError as error:
        sys.stderr.write(f"\nmain_ppo: {error}\n")
        return 1
    except (StaleEngineError, CheckpointError) as error:
        sys.stderr.write(f"\nmain_ppo: {error}\n")
        return 1
    except Interrupted as interrupted:
        sys.stderr.write(f"\nmain_ppo: ended by {interrupted}\n")
        return interrupted.exit_code
    return 0


def compose_config(overrides: list[str], config_name: str = "ppo_trainer", config_path: Path = CONFIG_DIR) -> RunConfig:
    """Compose YAML and overrides with hydra, and check the result.

    Raises:
        ConfigError: an unknown key, a wrong type, a missing file or a bad combination.
    """
    for override in OverridesParser.create().parse_overrides(overrides):
        check_key(override.key_or_group)
    with initialize_config_dir(str(config_path.absolute()), version_base=None):
        composed = compose(config_name, overrides)
    values = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(values, dict)
    return build_config({str(key): value for key, value in values.items()})


def run(config: RunConfig) -> None:
    """Check everything that can be checked here, start the workers, train."""
    device, workers_per_node = find_devices(config)
    engine, why = choose_engine(config.actor_rollout_ref.rollout.name)
    config = config.with_engine(engine)
    check_engine_groups(config, workers_per_node)
    try:
        get_adv_estimator_fn(config.algorithm.adv_estimator)
        reward_manager = load_reward_manager(config)
        renderer = build_renderer(config)
        roles = sample_roles(config.train_mode, reward_manager.needs_embeddings)
        dataset = PromptDataset(file_list(config.data.train_files), config.data, roles, renderer)
        validation = None
        if config.validates:
            held_out = PromptDataset(file_list(config.data.val_files), config.data, roles, renderer)
            validation = Validation(config, held_out, renderer, reward_manager.needs_embeddings)
        # The first sample shows a wrong template or an empty text now rather than after the start of the workers.
        renderer.render(list(dataset[0]["chats"].values()))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    world_size = workers_per_node * config.trainer.nnodes
    plan = BatchPlan.from_config(config, len(dataset), len(roles) - 1, world_size)
    folder = RunFolder(config.run_dir.absolute())
    resume = find_resume(config, folder, dataset.sha256)
    with StopSignals() as signals:
        start_ray(config, world_size)
        # Ray exits on SIGTERM with a code of its own.
        signals.listen()
        try:
            group = RayWorkerGroup(
                ActorRolloutRefWorker, (config, plan.total_steps), config.trainer.nnodes, workers_per_node, device,
                folder.path / "stacks", config.trainer.phase_timeout_s,
            )  # fmt: skip
            workers = ActorRolloutRefGroup(group, config.actor_rollout_ref.rollout.ranks_per_engine)
            trainer = RayPPOTrainer(
                config, plan, dataset, validation, renderer, reward_manager, workers, folder, resume, signals
            )
            lines = [*plan.lines(), ("rollout engine", f"{engine}: {why}")]
            if engine == "vllm" and device == "cpu":
                lines.append(("", "on a CPU vllm neither sleeps (free_cache_engine) nor splits prompts"))
                lines.append(("", "(enable_chunked_prefill); these settings have no effect"))
            trainer.display.table(f"GRACE, {config.train_mode}, {config.run_dir}", lines)
            try:
                trainer.fit()
            finally:
                group.shutdown()
        finally:
            # Ends the cluster if it was started here.
            ray.shutdown()


def sample_roles(train_mode: str, needs_embeddings: bool) -> tuple[str, ...]:
    """The texts of a sample that get a rationale; the first one is trained."""
    if not needs_embeddings:
        return ("positive",)
    return ("positive", "query", "negative") if train_mode == "supervised" else ("positive", "query")


def find_devices(config: RunConfig) -> tuple[str, int]:
    """The device and the number of workers per machine.

    Raises:
        ConfigError: cuda is asked for and not there, or there are fewer devices than workers.
    """
    wanted, gpus = config.trainer.device, torch.cuda.device_count()
    cpus = config.ray_init.num_cpus or os.cpu_count() or 1
    device = ("cuda" if gpus else "cpu") if wanted == "auto" else wanted
    if device == "cuda" and not gpus:
        raise ConfigError("trainer.device=cuda but no GPU is visible (CUDA_VISIBLE_DEVICES?); use auto or cpu.")
    available = gpus if device == "cuda" else cpus
    workers = config.trainer.n_gpus_per_node or (gpus if device == "cuda" else 1)
    if workers > available:
        raise ConfigError(
            f"trainer.n_gpus_per_node={workers}, but this machine has {available} "
            f"{'visible GPUs' if device == 'cuda' else 'CPUs (each is one worker)'}; set it to {available} or less."
        )
    return device, workers


def check_engine_groups(config: RunConfig, workers_per_node: int) -> None:
    """Raise ConfigError unless the workers of a machine divide into engines."""
    rollout = config.actor_rollout_ref.rollout
    size = rollout.tensor_model_parallel_size
    if size > 1 and rollout.name != "vllm":
        raise ConfigError(
            f"actor_rollout_ref.rollout.tensor_model_parallel_size={size} needs the engine vllm, and this run "
            f"generates with {rollout.name}; set it to 1."
        )
    if workers_per_node % size:
        divisors = [d for d in range(1, workers_per_node + 1) if workers_per_node % d == 0]
        raise ConfigError(
            f"actor_rollout_ref.rollout.tensor_model_parallel_size={size} does not divide the {workers_per_node} "
            f"workers of a machine; use one of {', '.join(map(str, divisors))}."
        )


def build_renderer(config: RunConfig) -> PromptRenderer:
    """The prompt renderer of the model's tokenizer.

    Raises:
        ConfigError: no such model, or prompt and response do not fit its context.
    """
    model, data = config.actor_rollout_ref.model, config.data
    assert model.path is not None
    tokenizer = load_tokenizer(model.path, model.trust_remote_code)
    model_config = AutoConfig.from_pretrained(
        model.path, trust_remote_code=model.trust_remote_code, **model.override_config
    )
    context = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    wanted = data.max_prompt_length + data.max_response_length
    if context is not None and wanted > context:
        raise ConfigError(
            f"data.max_prompt_length={data.max_prompt_length} + data.max_response_length={data.max_response_length} "
            f"= {wanted} tokens, beyond the model's context of {context}; lower one of them by {wanted - context}."
        )
    return PromptRenderer(tokenizer, data.max_prompt_length, data.truncation)


def start_ray(config: RunConfig, world_size: int) -> None:
    """Join the cluster of RAY_ADDRESS, or start one on this machine."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = os.environ.get("RAY_ADDRESS")
    if address:
        try:
            ray.init(logging_level=logging.ERROR)
        except ConnectionError as error:
            raise ConfigError(
                f"RAY_ADDRESS={address}: {error}. Is `ray start --head` running there, and are RAY_AUTH_MODE and "
                "RAY_AUTH_TOKEN the same as on the head? Without RAY_ADDRESS a cluster is started on this machine."
            ) from error
        return
    if config.trainer.nnodes > 1:
        raise ConfigError(
            f"trainer.nnodes={config.trainer.nnodes} but RAY_ADDRESS is not set; run `ray start --head` on one "
            "machine, `ray start --address=HOST:6379` on the others, and export RAY_ADDRESS=HOST:6379."
        )
    cpus = config.ray_init.num_cpus or max(os.cpu_count() or 1, world_size)
    # What is started here inherits that SIGTERM waits: a batch system sends it to all processes of a job, and the last
    # step cannot be saved when Ray has ended.
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        # On loopback: a cluster of one machine is nobody else's business.
        ray.init(num_cpus=cpus, include_dashboard=False, logging_level=logging.ERROR, _node_ip_address="127.0.0.1")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m verl.trainer.main_ppo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-name", default="ppo_trainer")
    parser.add_argument("--config-path", type=Path, default=CONFIG_DIR)
    parser.add_argument("--print-config", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())

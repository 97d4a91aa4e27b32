"""The training program: python3 -m verl.trainer.main_ppo key=value ...

    --config-name NAME   a YAML of verl/trainer/config, or with --config-path of another folder
    --print-config       show the resolved configuration and stop

The configuration is composed, checked against the data, the model and the machine, and only then are Ray
and the devices started. Exit code 2: something given is wrong, and the message says what.
"""

import argparse
import sys
from pathlib import Path

import ray
from hydra.errors import HydraException
from omegaconf import OmegaConf

from verl.algorithm.advantage import get_adv_estimator_fn
from verl.checkpoint.resume import find_resume
from verl.checkpoint.run_folder import CheckpointError, RunFolder
from verl.config import RunConfig, file_list
from verl.data.dataset import PromptDataset
from verl.errors import UserError
from verl.single_controller.ray_group import RayWorkerGroup, WorkerError
from verl.trainer.ppo.batch_plan import BatchPlan
from verl.trainer.ppo.mismatch import StaleEngineError
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.trainer.ppo.validation import Validation
from verl.trainer.prepare import (
    CONFIG_DIR,
    build_renderer,
    check_engine_groups,
    compose_config,
    find_devices,
    sample_roles,
    start_ray,
)
from verl.trainer.signals import Interrupted, StopSignals
from verl.utils.logging import quiet_libraries
from verl.workers.fsdp_workers import ActorRolloutRefWorker
from verl.workers.group import ActorRolloutRefGroup
from verl.workers.reward_manager import load_reward_manager
from verl.workers.rollout.choose import choose_engine

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
    except (UserError, HydraException) as error:
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
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
    world_size = workers_per_node * config.trainer.nnodes
    plan = BatchPlan.from_config(config, len(dataset), len(roles) - 1, world_size)
    try:
        folder = RunFolder(config.run_dir.absolute())
        resume = find_resume(config, folder, dataset.sha256)
    except CheckpointError as error:
        raise UserError(str(error)) from error
    with StopSignals() as signals:
        reaper = start_ray(config, world_size)
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
            del reaper


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

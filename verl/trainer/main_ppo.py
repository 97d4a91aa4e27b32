"""The training program: python3 -m verl.trainer.main_ppo key=value ...

    --config-name NAME   a YAML of verl/trainer/config, or with --config-path of another folder
    --cfg job            as hydra's: show what was composed, and stop; nothing is checked but the keys
    --print-config       show the checked configuration of the run, and stop

The configuration is composed, checked against the data, the model and the machine, and only then are Ray
and the devices started. Exit code 2: something given is wrong, and the message says what.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
import yaml
from hydra.errors import HydraException
from omegaconf import OmegaConf

from verl.checkpoint.run_folder import CheckpointError
from verl.config import RunConfig
from verl.config_checks import split_keys
from verl.errors import UserError, WorkerError
from verl.single_controller.local_group import LocalWorkerGroup
from verl.single_controller.ray_group import RayWorkerGroup
from verl.single_controller.worker_group import WorkerGroup
from verl.trainer.overrides import plain_values, resolve
from verl.trainer.ppo.mismatch import StaleEngineError
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.trainer.prepare import CONFIG_DIR, compose_config, compose_values, start_ray
from verl.trainer.run import TrainingRun, prepare_run
from verl.trainer.signals import Interrupted, StopSignals
from verl.utils.console import show_any_text
from verl.utils.logging import quiet_libraries
from verl.workers.fsdp_workers import ActorRolloutRefWorker
from verl.workers.group import ActorRolloutRefGroup
from verl.workers.reward_manager.checked import RewardError

EXIT_USER_ERROR = 2


def main(argv: list[str] | None = None) -> int:
    args = _parse_arguments(argv)
    show_any_text()
    quiet_libraries()
    try:
        if args.cfg:
            sys.stdout.write(_composed_yaml(args))
            return 0
        config = compose_config(args.overrides, args.config_name, args.config_path)
        if args.print_config:
            sys.stdout.write(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
            return 0
        run(config)
    except (UserError, HydraException) as error:
        sys.stderr.write(f"\nmain_ppo: {error}\n")
        return EXIT_USER_ERROR
    except (WorkerError, StaleEngineError, CheckpointError, RewardError) as error:
        sys.stderr.write(f"\nmain_ppo: {error}\n")
        return 1
    except Interrupted as interrupted:
        sys.stderr.write(f"\nmain_ppo: stopped by {interrupted}\n")
        return interrupted.exit_code
    return 0


def run(config: RunConfig) -> None:
    """Train: prepare, cluster, workers, fit."""
    with (
        prepare_run(config) as prepared, StopSignals() as signals, cluster(prepared, signals),
        worker_group(prepared) as workers,
    ):  # fmt: skip
        trainer = RayPPOTrainer(prepared, workers, signals)
        trainer.display.table(f"GRACE, {config.train_mode}, {config.run_dir}", prepared.lines())
        trainer.fit()


@contextmanager
def cluster(prepared: TrainingRun, signals: StopSignals) -> Iterator[None]:
    """The Ray cluster that the workers run on, if they do; one that is started here ends with the run."""
    if not prepared.config.trainer.use_ray:
        yield
        return
    reaper = start_ray(prepared.config, prepared.plan.world_size)
    # Ray has put handlers of its own in place, which exit with a code of their own.
    signals.listen()
    try:
        yield
    finally:
        ray.shutdown()
        del reaper


@contextmanager
def worker_group(prepared: TrainingRun) -> Iterator[ActorRolloutRefGroup]:
    """The workers, on Ray or one in this process; they end with the run."""
    config, arguments = prepared.config, (prepared.config, prepared.plan)
    group: WorkerGroup
    if config.trainer.use_ray:
        group = RayWorkerGroup(
            ActorRolloutRefWorker, arguments, config.trainer.nnodes, prepared.workers_per_node, prepared.device,
            prepared.folder.path / "stacks", config.trainer.phase_timeout_s,
        )  # fmt: skip
    else:
        group = LocalWorkerGroup(ActorRolloutRefWorker, arguments, prepared.device)
    try:
        yield ActorRolloutRefGroup(group, config.actor_rollout_ref.rollout.ranks_per_engine)
    finally:
        group.shutdown()


def _parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m verl.trainer.main_ppo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-name", "-cn", default="ppo_trainer", metavar="NAME")
    parser.add_argument("--config-path", "-cp", "--config-dir", "-cd", type=Path, default=CONFIG_DIR, metavar="DIR")
    parser.add_argument("--cfg", "-c", choices=["job"], help="show what hydra composes, and stop")
    parser.add_argument("--package", "-p", metavar="SECTION", help="with --cfg: a section alone")
    parser.add_argument("--resolve", action="store_true", help="with --cfg: replace ${...} by its value")
    parser.add_argument("--print-config", action="store_true", help="show the checked configuration, and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    # Options may stand between overrides, as hydra allows it.
    return parser.parse_intermixed_args(argv)


def _composed_yaml(args: argparse.Namespace) -> str:
    """What hydra composes, as `--cfg job` of a hydra program shows it.

    Raises:
        UserError: an override that cannot be read, a key that does not exist, or no such section.
    """
    composed = compose_values(args.overrides, args.config_name, args.config_path)
    _, problems = split_keys(plain_values(composed, resolve=False))
    if problems:
        raise UserError("\n".join(problems))
    if args.resolve:
        composed = OmegaConf.create(resolve(composed))
    if args.package is None:
        return OmegaConf.to_yaml(composed)
    section = OmegaConf.select(composed, args.package)
    if not OmegaConf.is_config(section):
        raise UserError(f"--package={args.package}: there is no such section.")
    return f"# @package {args.package}\n{OmegaConf.to_yaml(section)}"


if __name__ == "__main__":
    sys.exit(main())

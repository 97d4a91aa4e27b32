"""A training run from its configuration to its end: the work of `python3 -m verl.trainer.main_ppo`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from verl.checkpoint.run_folder import CheckpointError
from verl.config import RunConfig
from verl.errors import UserError, WorkerError
from verl.single_controller.local_group import LocalWorkerGroup
from verl.single_controller.ray_group import RayWorkerGroup
from verl.single_controller.worker_group import WorkerGroup
from verl.trainer.memory_plan import run_lines
from verl.trainer.ppo.alerts import AlertError
from verl.trainer.ppo.mismatch import StaleEngineError
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.trainer.prepare import start_ray
from verl.trainer.run import TrainingRun, prepare_run
from verl.trainer.signals import Interrupted, StopSignals
from verl.utils.logging import quiet_libraries
from verl.workers.fsdp_workers import ActorRolloutRefWorker
from verl.workers.group import ActorRolloutRefGroup
from verl.workers.reward_manager.checked import RewardError


def run_program(config: RunConfig) -> int:
    """Train as the configuration says; the exit code."""
    quiet_libraries()
    try:
        train(config)
    except (UserError, WorkerError, StaleEngineError, CheckpointError, RewardError, AlertError) as error:
        sys.stderr.write(f"\nmain_ppo: {error}\n")
        return 2 if isinstance(error, UserError) else 1
    except Interrupted as interrupted:
        sys.stderr.write(f"\nmain_ppo: stopped by {interrupted}\n")
        return interrupted.exit_code
    return 0


def train(config: RunConfig) -> None:
    """Train as the configuration says: check it and build the run, start the cluster and the workers, and fit.

    However it ends, cluster, workers and the ownership of the run folder end with it.

    Raises:
        UserError: something given cannot work.
        WorkerError: a worker did not start.
        Also what `RayPPOTrainer.fit` raises.
    """
    with (
        prepare_run(config) as prepared, StopSignals() as signals, cluster(prepared, signals),
        worker_group(prepared) as workers,
    ):  # fmt: skip
        trainer = RayPPOTrainer(prepared, workers, signals)
        trainer.display.table(f"GRACE, {config.train_mode}, {config.run_dir}", prepared.lines())
        if prepared.device == "cuda":
            trainer.display.table(
                "Memory", list(run_lines(prepared.config, prepared.reward_manager, prepared.workers_per_node))
            )
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

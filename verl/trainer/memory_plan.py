"""The memory plan of a configuration: for `python3 -m verl.plan`, and for the first lines of a run on GPUs."""

import sys
from collections.abc import Iterator

import torch

from verl.config import RunConfig
from verl.errors import UserError, as_user_error
from verl.planning.plan import GIB, USABLE, Machines, MemoryPlan, Work, lines, make_plan
from verl.planning.remedies import Change, remedies
from verl.planning.trace import PlanError
from verl.trainer.prepare import anchors_per_sample, check_engine_groups, sample_roles
from verl.utils.logging import quiet_libraries
from verl.workers.reward_manager import load_reward_manager
from verl.workers.reward_manager.base import RewardManager


def run_program(config: RunConfig, gpu_gib: float | None, gpus: int, nodes: int | None) -> int:
    """Print the plan; the exit code.

    Args:
        gpu_gib: memory of a GPU in GiB; None = of the one that is visible.
        gpus: of a machine.
        nodes: machines; None = trainer.nnodes.

    Raises:
        UserError: something given cannot work.
    """
    quiet_libraries()
    gpu_bytes = int(gpu_gib * GIB) if gpu_gib else _visible_gpu()
    if gpu_bytes is None:
        raise UserError("no GPU is visible here; give --gpu, the memory of one in GiB, such as --gpu 80")
    machines = Machines(gpu_bytes, gpus, nodes or config.trainer.nnodes)
    config = _with_engine(config)
    check_engine_groups(config, gpus)
    work = find_work(config)
    try:
        plan = make_plan(config, machines, work)
    except PlanError as error:
        raise UserError(str(error)) from error
    for what, value in lines(plan):
        sys.stdout.write(f"{what:<18} {value}\n")
    if not plan.misfits():
        sys.stdout.write("everything fits\n")
        return 0
    sys.stdout.write("looking for settings that make it fit ...\n")
    sys.stdout.flush()
    for line in remedy_lines(plan, remedies(config, machines, work, plan)):
        sys.stdout.write(f"{line}\n")
    return 1


def run_lines(config: RunConfig, manager: RewardManager, gpus: int) -> Iterator[tuple[str, str]]:
    """The plan of a run that starts, as (what, how much) lines; what does not fit is a warning.

    Args:
        config: with the engine's name resolved.
        gpus: workers of a machine.
    """
    gpu_bytes = _visible_gpu()
    if gpu_bytes is None:
        yield "memory plan", "none: this machine has no GPU (python3 -m verl.plan --gpus N --gpu GIB makes one)"
        return
    try:
        plan = make_plan(config, Machines(gpu_bytes, gpus, config.trainer.nnodes), _work_of(config, manager))
    except PlanError as error:
        yield "memory plan", f"none: {error}"
        return
    yield from lines(plan)
    if misfits := plan.misfits():
        yield (
            "",
            f"WARNING: {_named(misfits)} may not fit; bash train.sh --plan with the same settings names what helps",
        )


def find_work(config: RunConfig) -> Work:
    """What the reward manager makes of a step.

    Raises:
        UserError: there is no such manager, or it takes other arguments.
    """
    with as_user_error(ValueError):
        return _work_of(config, load_reward_manager(config))


def _work_of(config: RunConfig, manager: RewardManager) -> Work:
    roles = sample_roles(config.train_mode, manager.needs_embeddings, config.data.trained_text)
    return Work(
        num_anchors=anchors_per_sample(roles, config.data.negatives_per_query),
        embeds=manager.needs_embeddings,
        trains_embeddings=config.reward_model.contrastive
        or manager.trains_anchors
        or config.actor_rollout_ref.actor.embedding_grad_share is not None,
        trains_anchors=manager.trains_anchors,
    )


def remedy_lines(plan: MemoryPlan, found: list[Change]) -> Iterator[str]:
    """What does not fit, and the changes that make it fit."""
    yield (
        f"does not fit: {_named(plan.misfits())}. A plan may fill {USABLE:.0%} of a GPU, {plan.usable / GIB:.1f} GiB, "
        "by assumption: the rest is for what is not counted (CUDA itself, NCCL, gaps between allocations)"
    )
    if not found:
        yield "it fits with none of the settings that were tried, nor with 64 GPUs; use a smaller model or larger GPUs"
    for change in found:
        yield f"it fits with {change}"


def _named(stages: list[str]) -> str:
    return ", ".join("a cache for one row" if stage == "cache" else stage for stage in stages)


def _with_engine(config: RunConfig) -> RunConfig:
    """On a GPU machine auto means vllm, if it is installed there."""
    name = config.actor_rollout_ref.rollout.name
    return config.with_engine("vllm") if name == "auto" else config


def _visible_gpu() -> int | None:
    """Bytes of the smallest visible GPU, or None."""
    sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    return min(sizes, default=None)

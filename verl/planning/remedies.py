"""What makes a run fit that does not: settings are changed, and the run is planned again with each."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from verl.config import RunConfig
from verl.planning.plan import Machines, MemoryPlan, Work, has_second_model, make_plan

_ACTOR, _REF, _ROLLOUT = (f"actor_rollout_ref.{section}" for section in ("actor", "ref", "rollout"))
_TOKENS, _RESPONSE = f"{_ACTOR}.ppo_max_token_len_per_gpu", "data.max_response_length"
_MOST_GPUS = 64


@dataclass(frozen=True)
class Change:
    settings: tuple[tuple[str, Any], ...] = ()
    """Keys of the config and their values."""
    gpus: int | None = None
    """GPUs of all machines together."""

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(key for key, _ in self.settings)

    def __str__(self) -> str:
        named = [f"{key}={value}" for key, value in self.settings]
        return " ".join(named + ([f"{self.gpus} GPUs"] if self.gpus else []))


def remedies(config: RunConfig, machines: Machines, work: Work, plan: MemoryPlan) -> list[Change]:
    """Single changes that make everything fit, or else all of the fewest, in their order, that do so together.

    Empty where none of them do.
    """
    single: dict[tuple[str, ...], Change] = {}
    for change in _changes(config, machines, plan):
        # Shorter rationales are for where a forward of one row is too large.
        covered = change.keys in single or (_RESPONSE in change.keys and (_TOKENS,) in single)
        if not covered and _fits(config, machines, work, [change]):
            single[change.keys] = change
    if single:
        return list(single.values())
    together: list[Change] = []
    for change in _strongest(config, machines, plan):
        together.append(change)
        if _fits(config, machines, work, together):
            return [_joined(_needed(together, lambda some: _fits(config, machines, work, some)))]
    return []


def with_settings(config: RunConfig, settings: tuple[tuple[str, Any], ...]) -> RunConfig:
    """The config with these keys changed."""
    values = config.model_dump()
    for key, value in settings:
        *path, name = key.split(".")
        section = values
        for part in path:
            section = section[part]
        section[name] = value
    return RunConfig.model_validate(values)


def _changes(config: RunConfig, machines: Machines, plan: MemoryPlan) -> Iterator[Change]:
    """What may help, gentle before strong; of one setting the gentlest value that makes everything fit is the first."""
    section = config.actor_rollout_ref
    if not section.model.enable_gradient_checkpointing:
        yield _set("actor_rollout_ref.model.enable_gradient_checkpointing", True)
    by_torch = section.actor.offload(section.actor.fsdp_config).by_torch
    if not by_torch:
        yield from _offloads(config)
    if plan.cached_tokens is not None and section.rollout.name == "vllm":
        yield from _engine_changes(config, machines, plan.misfits())
    elif plan.cached_tokens is not None and "generation" in plan.misfits():
        yield from _fewer_sequences(plan.cached_tokens // plan.longest_row)
    if has_second_model(config):
        yield from _reference_changes(config, plan.misfits())
    if {"score", "update", "reference"} & set(plan.misfits()):
        yield from _smaller_forwards(config)
        if not by_torch:
            yield _kept_on_host(_ACTOR)
    gpus = 2 * machines.ranks
    while gpus <= _MOST_GPUS:
        yield Change(gpus=gpus)
        gpus *= 2


def _offloads(config: RunConfig) -> Iterator[Change]:
    fsdp = config.actor_rollout_ref.actor.fsdp_config
    missing = [name for name in ("param_offload", "optimizer_offload") if not getattr(fsdp, name)]
    changes = [_set(f"{_ACTOR}.fsdp_config.{name}", True) for name in missing]
    yield from changes
    if len(changes) > 1:
        yield _joined(changes)


def _engine_changes(config: RunConfig, machines: Machines, misfits: list[str]) -> Iterator[Change]:
    rollout = config.actor_rollout_ref.rollout
    share, size = rollout.gpu_memory_utilization, rollout.tensor_model_parallel_size
    if not rollout.free_cache_engine:
        yield _set(f"{_ROLLOUT}.free_cache_engine", True)
    if "generation" in misfits:
        yield from (
            _set(f"{_ROLLOUT}.gpu_memory_utilization", less) for less in (0.6, 0.5, 0.4, 0.3, 0.2) if less < share
        )
    if "cache" in misfits:
        higher = (more for more in (0.6, 0.7, 0.8) if more > share)
        yield from (_set(f"{_ROLLOUT}.gpu_memory_utilization", more) for more in higher)
    if {"cache", "sync"} & set(misfits):
        sizes = (wider for wider in (2, 4, 8) if wider > size and machines.gpus % wider == 0)
        yield from (_set(f"{_ROLLOUT}.tensor_model_parallel_size", wider) for wider in sizes)


def _fewer_sequences(rows: int) -> Iterator[Change]:
    """For the cache of an hf engine, which is as large as the rows that are decoded together."""
    while rows > 1:
        rows //= 2
        yield _set(f"{_ROLLOUT}.max_num_seqs", rows)


def _reference_changes(config: RunConfig, misfits: list[str]) -> Iterator[Change]:
    """For the model that the run started from, beside the policy."""
    section = config.actor_rollout_ref
    fsdp = section.ref.fsdp_config
    offload, scores = section.actor.offload(fsdp), "reference" in misfits
    if config.needs_reference and not offload.weights and not offload.by_torch:
        yield _set(f"{_REF}.fsdp_config.param_offload", True)
    if scores and not config.needs_reference:
        yield _set("trainer.diag_log_likelihood", False)
    if (scores or config.needs_reference) and not offload.by_torch:
        yield _kept_on_host(_REF)


def _smaller_forwards(config: RunConfig) -> Iterator[Change]:
    actor, data, longest = config.actor_rollout_ref.actor, config.data, config.longest_row
    tokens, rows = actor.update_limit
    while tokens and tokens > longest:
        tokens = max(longest, tokens // 2)
        yield _set(_TOKENS, tokens)
    while rows and rows > 1:
        rows //= 2
        yield _set(f"{_ACTOR}.ppo_micro_batch_size_per_gpu", rows)
    response = config.longest_rationale
    while response > 64:
        response //= 2
        settings: list[tuple[str, Any]] = [(_RESPONSE, response)]
        if actor.update_limit.max_tokens:
            settings.append((_TOKENS, data.max_prompt_length + response))
        yield Change(tuple(settings))


def _strongest(config: RunConfig, machines: Machines, plan: MemoryPlan) -> Iterator[Change]:
    """The last value of each setting, in their order; more GPUs come last."""
    last: dict[tuple[str, ...], Change] = {}
    more: list[Change] = []
    for change in _changes(config, machines, plan):
        if change.gpus:
            more.append(change)
        else:
            last[change.keys] = change
    yield from last.values()
    yield from more


def _set(key: str, value: Any) -> Change:
    return Change(((key, value),))


def _kept_on_host(section: str) -> Change:
    """By torch's policy, which only one strategy has."""
    return Change(((f"{_ACTOR}.strategy", "fsdp2"), (f"{section}.fsdp_config.offload_policy", True)))


def _joined(changes: list[Change]) -> Change:
    settings = {key: value for change in changes for key, value in change.settings}
    return Change(tuple(settings.items()), next((change.gpus for change in reversed(changes) if change.gpus), None))


def _needed(changes: list[Change], fits: Callable[[list[Change]], bool]) -> list[Change]:
    """Without those that the others do without."""
    needed = list(changes)
    for change in changes:
        fewer = [other for other in needed if other is not change]
        if fewer and fits(fewer):
            needed = fewer
    return needed


def _fits(config: RunConfig, machines: Machines, work: Work, changes: list[Change]) -> bool:
    change = _joined(changes)
    changed = with_settings(config, change.settings)
    if change.gpus:
        # A machine has eight at most, by assumption.
        gpus = min(8, change.gpus)
        machines = Machines(machines.gpu_bytes, gpus, change.gpus // gpus)
    return not make_plan(changed, machines, work).misfits()

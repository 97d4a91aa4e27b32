"""What memory, traffic and tokens a run on GPUs needs: the traced stages, put together as a worker orders them.

`ActorRolloutRefWorker` has the order of device use, docs/gpu.md the table of it. Traced is what the policy does; sums
of whole weights, the engine's share and host memory are formulas, and `lines` marks them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch

from verl.checkpoint.training_state import checkpoint_size, folder_size
from verl.config import MicroBatchLimit, RunConfig
from verl.models.attention import cache_bytes
from verl.models.sharded_load import empty_lm, small_config, why_loaded_whole
from verl.planning.shapes import Parts
from verl.planning.trace import Row, Setup, Trace, planned_config, traced

GIB = 2**30
# An assumption: CUDA's contexts, NCCL's buffers and what torch's allocator cannot fill are not counted.
USABLE = 0.9
# What torch's CPUOffloadPolicy keeps in host memory.
_KEPT_ON_HOST = ("shards", "gradient shards", "optimizer")


@dataclass(frozen=True)
class Machines:
    gpu_bytes: int
    """Of one GPU."""
    gpus: int
    """Of one machine."""
    nodes: int = 1

    @property
    def ranks(self) -> int:
        return self.gpus * self.nodes


@dataclass(frozen=True)
class Work:
    """What follows from the reward manager."""

    num_anchors: int
    """Most anchors of a sample."""
    embeds: bool
    trains_embeddings: bool
    trains_anchors: bool


@dataclass(frozen=True)
class MemoryPlan:
    machines: Machines
    stages: dict[str, Parts]
    """Bytes on the GPU of a rank, of each stage when it takes most."""
    logits: int
    """Bytes of the logits of a chunk, within the activations of a pass through the LM head."""
    cached_tokens: int | None
    """Tokens that an engine's cache holds; None without an engine."""
    longest_row: int
    """Tokens."""
    host: dict[str, int]
    """Bytes of host memory of a machine."""
    checkpoint: int
    """Bytes of a checkpoint."""
    wire: dict[str, float]
    """Bytes that a rank sends to other ranks in a step, by stage."""
    moved: int
    """Bytes that a rank copies between host and GPU in a step."""
    rows: int
    """Bytes of the rows of a step between driver and workers."""
    tokens: dict[str, int]
    """Most tokens of a step."""

    @property
    def usable(self) -> float:
        """Bytes of a GPU that a stage may take."""
        return USABLE * self.machines.gpu_bytes

    def misfits(self) -> list[str]:
        """The stages that do not fit."""
        found = [name for name, parts in self.stages.items() if sum(parts.values()) > self.usable]
        if self.cached_tokens is not None and self.cached_tokens < self.longest_row:
            found.append("cache")
        return found


def make_plan(config: RunConfig, machines: Machines, work: Work) -> MemoryPlan:
    """Plan the run of a config whose engine's name is resolved.

    Raises:
        PlanError: see `traced`.
        UserError: see `planned_config`.
    """
    section = config.actor_rollout_ref
    lm = planned_config(section.model)
    loads = Loads(config, machines.ranks, work)
    text = lm.get_text_config()
    trace = traced(loads.setup(), text.num_hidden_layers)
    engine = _Engine(config, machines, trace, text, loads)
    device = _DeviceUse(config, machines, trace, lm, engine)
    return MemoryPlan(
        machines=machines,
        stages=device.stages(),
        logits=max(stage.logits for stage in trace.stages.values()),
        cached_tokens=engine.cached_tokens,
        longest_row=loads.longest_row,
        host=device.host(),
        checkpoint=checkpoint_size(config, trace.trained, trace.parameters, lm.dtype),
        wire=loads.wire(trace),
        moved=device.moved(),
        rows=loads.row_bytes(text.hidden_size),
        tokens=loads.tokens(),
    )


def has_second_model(config: RunConfig) -> bool:
    """Whether the model that the run started from is loaded beside the policy.

    A policy with adapters is that model where these are off.
    """
    return config.scores_by_untrained and not config.actor_rollout_ref.model.trains_adapter


class Loads:
    """The rows of a step and of a rank, all of full length."""

    def __init__(self, config: RunConfig, ranks: int, work: Work) -> None:
        data, section = config.data, config.actor_rollout_ref
        self._config, self._ranks, self._work = config, ranks, work
        self.longest_row = config.longest_row
        self.trained = data.train_batch_size * config.rows_per_text
        self.anchors = data.train_batch_size * work.num_anchors
        per_sample = config.rows_per_text + (work.num_anchors if work.trains_anchors else 0)
        self._of_update = ceil(section.actor.ppo_mini_batch_size * per_sample / ranks)
        self._of_score = ceil((self.trained + self.anchors) / ranks)
        self._score_limit = section.actor.score_limit(section.rollout)

    @property
    def update_micro_batches(self) -> int:
        """Most of an update."""
        return ceil(self._of_update / self._full_rows(self._config.actor_rollout_ref.actor.update_limit))

    @property
    def score_micro_batches(self) -> int:
        return ceil(self._of_score / self._full_rows(self._score_limit))

    @property
    def decoded_tokens(self) -> int:
        """Most tokens of the rows that an hf engine decodes together. Each rank has an engine."""
        most = self._config.actor_rollout_ref.rollout.max_num_seqs
        return min(most, self._of_score) * self.longest_row

    def setup(self) -> Setup:
        section = self._config.actor_rollout_ref
        # Where things wait between the stages does not change the stages; one trace serves all.
        waits = {"param_offload": False, "optimizer_offload": False, "offload_policy": False}
        fsdp = section.actor.fsdp_config.model_copy(update=waits)
        actor = section.actor.model_copy(update={"fsdp_config": fsdp, "strategy": "fsdp"})
        return Setup(
            section.model, actor, "cuda", self._ranks,
            rows=self._fill(self._of_update, section.actor.update_limit, self.update_micro_batches),
            score_rows=self._fill(self._of_score, self._score_limit, self.score_micro_batches),
            score_limit=self._score_limit, embeds=self._work.embeds, trains_embeddings=self._work.trains_embeddings,
            keeps_forward=False,
        )  # fmt: skip

    def wire(self, trace: Trace) -> dict[str, float]:
        """Bytes that a rank sends in a step, by stage."""
        config = self._config
        score = sum(trace.stages["score"].sent(self.score_micro_batches).values())
        updates = config.num_mini_batches * config.actor_rollout_ref.actor.ppo_epochs
        sent = {"sync": sum(trace.stages["sync"].wire.values())} if config.data.think else {}
        sent |= {
            "score": score,
            "update": updates * sum(trace.stages["update"].sent(self.update_micro_batches).values()),
        }
        return sent | ({"reference": score} if config.needs_reference else {})

    def tokens(self) -> dict[str, int]:
        rows = self.trained + self.anchors
        return {
            "written": rows * self._config.longest_rationale,
            "scored": rows * self.longest_row,
            "trained on": self.trained * self.longest_row * self._config.actor_rollout_ref.actor.ppo_epochs,
        }

    def row_bytes(self, hidden_size: int) -> int:
        """Of int64 ids, float32 log-probs and vectors that go to workers and come back."""
        prompt, response = 8 * self._config.data.max_prompt_length, self._config.longest_rationale
        rows = self.trained + self.anchors
        generation = rows * (prompt + 12 * response) * self._config.data.think
        vectors = 4 * hidden_size * self._work.embeds
        scoring = rows * (prompt + 8 * response + 4 * response + vectors)
        update = self.trained * (prompt + 8 * response + 2 * 4 * response)
        return generation + scoring + update

    def _full_rows(self, limit: MicroBatchLimit) -> int:
        """Rows of full length in a micro-batch."""
        tokens, rows = limit
        return max(1, tokens // self.longest_row if tokens else rows or 1)

    def _fill(self, own: int, limit: MicroBatchLimit, micro_batches: int) -> tuple[Row, ...]:
        """The rows of one micro-batch that is as full as can be, or of two: the second meets the first's gradients."""
        count, length = min(own, self._full_rows(limit)), self.longest_row
        if micro_batches > 1 and limit.max_tokens and limit.max_tokens > length:
            count = ceil(limit.max_tokens / length)
            length = limit.max_tokens // count
        response = max(1, length * self._config.longest_rationale // self.longest_row)
        rows = [Row(max(1, length - response), response, group) for group in range(count * min(2, micro_batches))]
        return tuple(rows)


class _Engine:
    """The rollout engine, by formulas; nothing where no rationale is written."""

    def __init__(self, config: RunConfig, machines: Machines, trace: Trace, text_config: Any, loads: Loads) -> None:
        self.cached_tokens: int | None = None
        self.generating: Parts = {}
        self.in_sync: Parts = {}
        self.asleep: Parts = {}
        if not config.data.think:
            return
        rollout = config.actor_rollout_ref.rollout
        dtype: torch.dtype = getattr(torch, rollout.dtype)
        a_token = cache_bytes(text_config, dtype) / rollout.ranks_per_engine
        weights = dtype.itemsize * trace.parameters // rollout.ranks_per_engine
        is_vllm = rollout.name == "vllm"
        if is_vllm:
            cache = max(0, int(rollout.gpu_memory_utilization * machines.gpu_bytes) - weights)
        else:
            cache = int(a_token * loads.decoded_tokens)
        self.cached_tokens = int(cache / a_token)
        alone: Parts = {"engine weights": weights}
        self.generating = {**alone, "KV cache": cache}
        # hf keeps its weights and frees the cache. vllm keeps both, or frees both and wakes the cache after the sync.
        keeps_cache = is_vllm and not rollout.free_cache_engine
        self.in_sync = self.generating if keeps_cache else alone
        self.asleep = {} if is_vllm and rollout.free_cache_engine else self.in_sync


class _Reference:
    """The model that the run started from, beside the policy: always there for a KL term, or loaded for a diagnosis."""

    def __init__(self, config: RunConfig, shards: int, pinned: int) -> None:
        section = config.actor_rollout_ref
        fsdp = section.ref.fsdp_config
        by_torch, moves, _ = section.actor.offload(fsdp)
        self.scores = has_second_model(config)
        self.stays = self.scores and config.needs_reference
        self.scoring: Parts = {} if by_torch else {"reference": shards}
        """On the GPU while it scores."""
        self.waiting: Parts = self.scoring if self.stays and not moves else {}
        """On the GPU in other stages."""
        self.on_host = self.scores * (pinned if by_torch else shards * moves)
        self.moved = 2 * shards * (self.stays and moves)


class _DeviceUse:
    """Who has the memory in which stage."""

    def __init__(self, config: RunConfig, machines: Machines, trace: Trace, lm: Any, engine: _Engine) -> None:
        self._machines, self._trace, self._engine = machines, trace, engine
        self._writes = config.data.think
        self._folder = folder_size(config, trace.trained, trace.parameters, lm.dtype)
        self._start = _Start(config, machines, trace, lm)
        self._shards = trace.stages["score"].peak["shards"]
        self._optimizer = max(parts.get("optimizer", 0) for parts in trace.stages["update"].peaks.values())
        actor = config.actor_rollout_ref.actor
        self._by_torch, self._params_move, self._optimizer_moves = actor.offload(actor.fsdp_config)
        self._reference = _Reference(config, self._shards, trace.pinned["shards"])

    def stages(self) -> dict[str, Parts]:
        """By stage, in the order of a run."""
        engine, reference = self._engine, self._reference
        optimizer: Parts = {} if self._by_torch or self._optimizer_moves else {"optimizer": self._optimizer}
        shards: Parts = {} if self._by_torch or self._params_move else {"shards": self._shards}
        sync = self._traced("sync")
        gathered = {"gathered layers": sync.pop("activations", 0) + sync.pop("gathered layers", 0)}
        stages = {"start": self._loading()}
        if self._writes:
            stages |= {
                "sync": _sum(sync, gathered, engine.in_sync, optimizer, reference.waiting),
                "generation": _sum(engine.generating, shards, optimizer, reference.waiting),
            }
        stages |= {
            "score": _sum(self._traced("score"), engine.asleep, optimizer, reference.waiting),
            "update": _sum(self._traced("update"), engine.asleep, reference.waiting),
        }
        if reference.scores:
            forward = {name: size for name, size in self._traced("score").items() if name != "shards"}
            stages["reference"] = _sum(forward, reference.scoring, shards, engine.asleep, optimizer)
        return stages

    def _loading(self) -> Parts:
        """Shards are made on the GPU unless torch keeps them in host memory; those of a KL term's reference first."""
        own: Parts = {} if self._by_torch else {"shards": self._shards}
        policy = _sum(self._start.on_device(own), self._engine.asleep, self._reference.waiting)
        if not self._reference.stays:
            return policy
        first = _sum(self._start.on_device(self._reference.scoring), self._engine.asleep)
        return max(policy, first, key=lambda parts: sum(parts.values()))

    def _traced(self, stage: str) -> Parts:
        """The parts on the GPU when they take most together."""
        kept = _KEPT_ON_HOST if self._by_torch else ()
        found = [
            {name: size for name, size in parts.items() if size and name not in kept}
            for parts in self._trace.stages[stage].peaks.values()
        ]
        return max(found, key=lambda parts: sum(parts.values()), default={})

    def host(self) -> dict[str, int]:
        """Bytes of a machine, of weights alone. A sleeping engine's are not needed: they stay where there is room."""
        ranks, reference = self._machines.gpus, self._reference
        kept = ranks * (self._kept_on_host() + reference.on_host)
        return {
            "start": ranks * self._start.on_host(models=1 + reference.stays),
            "steps": kept,
            "checkpoint": kept + self._folder,
        }

    def _kept_on_host(self) -> int:
        """Bytes of a rank's policy."""
        pinned = self._trace.pinned
        if self._by_torch:
            # torch's policy pins weights and gradients; the moments that AdamW makes beside them are not pinned.
            return pinned["shards"] + pinned["gradient shards"] + self._optimizer
        # Moments are copied to the host without waiting, for which torch pins them; weights are not.
        return self._shards * self._params_move + pinned["optimizer"] * self._optimizer_moves

    def moved(self) -> int:
        """Bytes between host and GPU: the weights there and back for sync, score and update, the optimizer once."""
        moved = 2 * (2 + self._writes) * self._shards * self._params_move + 2 * self._optimizer * self._optimizer_moves
        return moved + self._reference.moved


class _Start:
    """What loading takes, by formulas; see `models.sharded_load`."""

    def __init__(self, config: RunConfig, machines: Machines, trace: Trace, lm: Any) -> None:
        self._loaded_whole = why_loaded_whole(lm, config.actor_rollout_ref.model.trust_remote_code) is not None
        self._trace, self._machines, self._lm = trace, machines, lm

    def on_device(self, held: Parts) -> Parts:
        """Shards are filled one weight after the other. Those of a whole model are cut layer by layer.

        Args:
            held: the shards.
        """
        if not self._loaded_whole:
            return held
        layer = self._trace.parameters // self._lm.get_text_config().num_hidden_layers
        # The root has the embedding and the LM head.
        return {**held, "whole layer": 4 * max(layer, 2 * self._trace.largest_weight)}

    def on_host(self, models: int) -> int:
        """Bytes of a rank: the small model of the proof, or later its part of the largest weight as it is stored.

        Not the mapped pages of the files, which the ranks of a machine share and the kernel can drop.

        Args:
            models: the policy, and a KL term's reference; whole ones are in memory together.
        """
        if self._loaded_whole:
            return 4 * self._trace.parameters * models
        small = sum(weight.numel() * weight.itemsize for weight in empty_lm(small_config(self._lm)).parameters())
        part = self._trace.largest_weight * (self._lm.dtype or torch.float32).itemsize // self._machines.ranks
        return max(small, part)


def _sum(*parts: Parts) -> Parts:
    names = dict.fromkeys(name for one in parts for name in one)
    total = {name: sum(one.get(name, 0) for one in parts) for name in names}
    return {name: size for name, size in total.items() if size}


def lines(plan: MemoryPlan) -> Iterator[tuple[str, str]]:
    """The plan as (what, how much) lines."""
    machines = plan.machines
    yield "planned for", f"{machines.nodes} x {machines.gpus} GPU(s) of {machines.gpu_bytes / GIB:.0f} GiB; per rank:"
    for stage, parts in plan.stages.items():
        ordered = sorted(parts.items(), key=lambda part: -part[1])
        named = " + ".join(f"{name} {_gib(size)}" for name, size in ordered if size >= 0.01 * GIB)
        verdict = "" if sum(parts.values()) <= plan.usable else "  DOES NOT FIT"
        yield f"  {stage}", f"{_gib(sum(parts.values()))} GiB = {named or '0'}{verdict}"
    yield "  logits", f"{_gib(plan.logits, 2)} GiB of a chunk at a time, when the LM head runs"
    if plan.cached_tokens is not None:
        rows = plan.cached_tokens / plan.longest_row
        yield "  KV cache", f"{plan.cached_tokens} tokens, {rows:.1f} rows of full length in an engine (formula)"
    yield (
        "host memory",
        ", ".join(f"{name} {_gib(size)}" for name, size in plan.host.items()) + " GiB a machine (formula)",
    )
    yield "checkpoint", f"{_gib(plan.checkpoint)} GiB (formula)"
    sent = ", ".join(f"{name} {_gib(size)}" for name, size in plan.wire.items())
    yield "sent by a rank", f"{_gib(sum(plan.wire.values()))} GiB a step to other ranks: {sent}"
    yield "moved by a rank", f"{_gib(plan.moved)} GiB a step between host and GPU (formula)"
    yield "rows of a step", f"{_gib(plan.rows, 2)} GiB between driver and workers (formula)"
    yield "tokens of a step", ", ".join(f"{count} {name}" for name, count in plan.tokens.items()) + " at most"


def _gib(size: float, digits: int = 1) -> str:
    return f"{size / GIB:.{digits}f}"

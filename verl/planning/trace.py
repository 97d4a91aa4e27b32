"""What one rank's stages take, found by running the project's own policy, scoring and update without numbers.

torch's fake process group stands for the other ranks. It belongs to a whole process, so a trace has a process of its
own. What was found is kept in the user's cache folder.
"""

import contextlib
import copy
import dataclasses
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AttentionInterface, AutoModelForCausalLM

from verl.config import ActorConfig, MicroBatchLimit, ModelConfig
from verl.errors import as_user_error
from verl.models import log_probs
from verl.models.attention import ATTENTIONS, grace_attention
from verl.models.fsdp import full_weights, shard
from verl.models.load import read_model_config
from verl.models.lora import add_adapter, count_parameters
from verl.models.onednn import product, replace_linears
from verl.models.packing import Segment
from verl.models.probe import dropout_of, set_dropout
from verl.planning.shapes import Parts, PlannedPolicy, count
from verl.protocol import DataProto
from verl.workers.actor import Actor

# Models of these many layers are traced; a model of more is the straight line through them.
DEPTHS = (3, 4)
_DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)
_SOURCES = Path(__file__).parents[1]


class PlanError(RuntimeError):
    """The model cannot be planned; the message says why."""


@dataclass(frozen=True)
class Row:
    prompt: int
    """Tokens."""
    response: int
    """Tokens."""
    group: int
    """Rows of one group have the same prompt."""
    trained: bool = True


@dataclass(frozen=True)
class Setup:
    """What decides a trace."""

    model: ModelConfig
    actor: ActorConfig
    device: Literal["cuda", "cpu"]
    world_size: int
    rows: tuple[Row, ...]
    """One rank's rows of one update, or as many of them as tell the peak."""
    score_rows: tuple[Row, ...]
    """Likewise of one call that scores."""
    score_limit: MicroBatchLimit
    """Of a forward that scores."""
    embeds: bool
    """Rewards need embeddings."""
    trains_embeddings: bool
    """Updates follow a gradient on the embeddings."""
    keeps_forward: bool
    """A training step is one update, on a CPU; see `verl.workers.kept_forward`."""
    num_layers: int | None = None
    """None = all of the model's."""


@dataclass(frozen=True)
class Stage:
    peaks: dict[str, Parts]
    """By section of the pass, see `shapes`."""
    wire: dict[str, float]
    """Bytes that the rank sends to others, by the forward since the stage's begin (0 = before it) and collective."""

    @property
    def peak(self) -> Parts:
        """The parts when they take most together."""
        return max(self.peaks.values(), key=lambda parts: sum(parts.values()), default={})

    @property
    def logits(self) -> int:
        """Bytes of the logits of a chunk, when they take most."""
        return max((parts.get("logits", 0) for parts in self.peaks.values()), default=0)

    def sent(self, micro_batches: int) -> dict[str, float]:
        """Bytes that the rank sends, by collective, where it runs this many micro-batches.

        The stage was traced with one or two; all after the first cost the same.
        """
        sent: dict[str, float] = defaultdict(float)
        last = max((int(name.split()[0]) for name in self.wire), default=0)
        for name, size in self.wire.items():
            forward, collective = name.split()
            times = micro_batches - last + 1 if int(forward) == last > 1 else micro_batches if last == 1 else 1
            sent[collective] += size * times
        return dict(sent)


@dataclass(frozen=True)
class Trace:
    stages: dict[str, Stage]
    """sync (gathering the weights), score and update."""
    parameters: int
    trained: int
    """Parameters that are trained."""
    largest_weight: int
    """Elements of the largest weight."""
    pinned: Parts
    """Bytes that the rank's shards, gradient shards and optimizer take in pinned host memory; see `pinned_bytes`."""


def traced(setup: Setup, num_layers: int) -> Trace:
    """The trace of a model of that many layers, from the cache or by running it.

    Raises:
        PlanError: sizes in the model depend on numbers, which a plan does not have.
    """
    if num_layers <= DEPTHS[1]:
        return _cached(setup, (num_layers,))[0]
    return extended(DEPTHS, _cached(setup, DEPTHS), num_layers)


def extended(depths: tuple[int, int], traces: Sequence[Trace], num_layers: int) -> Trace:
    """The straight line through the traces of two numbers of layers, at a third.

    Raises:
        PlanError: the traces have other sections than each other, so that there are no lines.
    """
    few, more = traces
    for name, stage in more.stages.items():
        if lone := few.stages[name].peaks.keys() ^ stage.peaks.keys():
            raise PlanError(
                f"{name}: models of {depths[0]} and {depths[1]} layers do not pass through the same sections "
                f"({min(lone)}), so the memory of one of {num_layers} layers cannot be planned"
            )
    steps = (num_layers - depths[0]) / (depths[1] - depths[0])

    def line(a: float, b: float) -> float:
        return a + (b - a) * steps

    def lines(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
        return {name: max(0, round(line(a.get(name, 0), b.get(name, 0)))) for name in a | b}

    stages = {
        name: Stage(
            {key: lines(few.stages[name].peaks[key], parts) for key, parts in stage.peaks.items()},
            lines(few.stages[name].wire, stage.wire),
        )
        for name, stage in more.stages.items()
    }
    parameters, trained = (round(line(*both)) for both in zip(_counts(few), _counts(more), strict=True))
    return Trace(stages, parameters, trained, more.largest_weight, lines(few.pinned, more.pinned))


def _counts(trace: Trace) -> tuple[int, int]:
    return trace.parameters, trace.trained


def _cached(setup: Setup, depths: Sequence[int]) -> list[Trace]:
    setups = [dataclasses.replace(setup, num_layers=depth) for depth in depths]
    files = [_cache_folder() / f"{_key(one)}.json" for one in setups]
    if not all(file.is_file() for file in files):
        found = in_own_process(setups)
        with contextlib.suppress(OSError):  # A home that cannot be written to costs the time of a trace.
            _cache_folder().mkdir(parents=True, exist_ok=True)
            for file, trace in zip(files, found, strict=True):
                part = file.with_suffix(f".{os.getpid()}")
                part.write_text(json.dumps(dataclasses.asdict(trace)))
                part.replace(file)
        return found
    return [_from_json(json.loads(file.read_text())) for file in files]


def in_own_process(setups: Sequence[Setup]) -> list[Trace]:
    """The traces of setups of one number of ranks. One process for all: it takes about as long to start as to trace."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(run_traces, setups).result()


def _from_json(values: dict[str, Any]) -> Trace:
    return Trace(**{**values, "stages": {name: Stage(**stage) for name, stage in values["stages"].items()}})


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grace" / "plans"


def _key(setup: Setup) -> str:
    """Of all that decides a trace: the setup, the model's config, the versions of torch and transformers, our code."""
    values = vars(setup) | {"model": setup.model.model_copy(update={"path": None})}
    versions = [torch.__version__, transformers.__version__, _code_digest()]
    parts = [repr(values), planned_config(setup.model).to_json_string(), *versions]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


@cache
def _code_digest() -> str:
    code = hashlib.sha256()
    for file in sorted(_SOURCES.rglob("*.py")):
        code.update(file.read_bytes())
    return code.hexdigest()


def planned_config(model: ModelConfig) -> Any:
    """As `read_model_config`.

    Raises:
        UserError: there is none, or the model is an adapter.
    """

    def say(error: Exception) -> str:
        problem = " ".join(str(error).split())[:300]
        where = f"actor_rollout_ref.model.path={model.path}"
        return f"{where}: a plan needs its config.json, which cannot be had: {problem}"

    with as_user_error(OSError, ValueError, say=say):
        return read_model_config(model)


def run_traces(setups: Sequence[Setup]) -> list[Trace]:
    """Trace in this process, which has no process group yet."""
    transformers.logging.set_verbosity_error()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=setups[0].world_size)
    try:
        return [
            trace(setup, *(planned_rows(rows, setup) for rows in (setup.rows, setup.score_rows))) for setup in setups
        ]
    except _DATA_DEPENDENT as error:
        problem = " ".join(str(error).split())[:200]
        raise PlanError(
            f"{setups[0].model.path}: sizes in this model depend on the numbers it computes ({problem}), so its memory "
            "cannot be planned"
        ) from error
    finally:
        dist.destroy_process_group()


def trace(setup: Setup, rows: DataProto, score_rows: DataProto) -> Trace:
    """Sync, score and update of these rows, in the process group that there is."""
    product(torch.ones(1, 1))  # whether oneDNN works is tried with numbers
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with _as_on(setup.device):
        policy = _policy(setup, fake)
        # An update that measures both gradients takes most.
        config = setup.actor.model_copy(update={"embedding_grad_every": 1})
        longest = int(rows.batch["response_length"].max())
        actor = Actor(policy, config, 1.0, longest, total_steps=1, one_mini_batch=setup.keeps_forward)
        stages = {name: Stage(dict(c.peaks), dict(c.wire)) for name, c in _stages(setup, actor, rows, score_rows)}
    trained, parameters = count_parameters(policy.lm)
    largest_weight = max(parameter.numel() for parameter in policy.parameters())
    return Trace(stages, parameters, trained, largest_weight, _pinned_parts(actor, stages["update"]))


def _pinned_parts(actor: Actor, update: Stage) -> Parts:
    """See `Trace.pinned`."""
    weights = list(actor.policy.parameters())
    trained = [weight for weight in weights if weight.requires_grad]
    # Its step counters stay where they are; see `models.fsdp.move_optimizer`.
    moments = [value for state in actor.optimizer.state.values() for name, value in state.items() if name != "step"]
    # An update that measures two gradients holds both.
    most = max(parts.get("gradient shards", 0) for parts in update.peaks.values())
    gradients = round(most / sum(_own_part(weight).nbytes for weight in trained))
    return {
        "shards": pinned_bytes(weights),
        "gradient shards": gradients * pinned_bytes(trained),
        "optimizer": pinned_bytes(moments),
    }


def pinned_bytes(tensors: Iterable[Tensor]) -> int:
    """Host memory that the rank's parts of tensors take where torch pins each: the next power of two of its bytes.

    torch's CachingHostAllocator rounds so, and keeps for reuse what is freed.
    """
    sizes = [_own_part(tensor).nbytes for tensor in tensors]
    return sum(1 << (size - 1).bit_length() for size in sizes if size)


@torch.no_grad()
def _own_part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _stages(setup: Setup, actor: Actor, rows: DataProto, score_rows: DataProto) -> Iterator[tuple[str, Any]]:
    """Run the stages that a run repeats; yields the tracker after each."""
    dtype = torch.bfloat16 if setup.device == "cuda" else torch.float32
    with count(actor.policy, actor.optimizer) as counted:  # type: ignore[arg-type]
        for _ in full_weights(actor.policy, dtype=dtype):
            pass
        yield "sync", counted
        counted.begin()
        scoring = (score_rows, setup.score_limit, setup.embeds, setup.actor.trains_policy, setup.trains_embeddings)
        actor.score(*scoring)
        yield "score", counted
        # The first update makes the optimizer's state, which all others begin with; its rows do not matter, but a kept
        # forward must be used.
        actor.update(rows if setup.keeps_forward else planned_rows([Row(1, 1, 0)], setup), 1)
        counted.begin()
        if setup.keeps_forward:
            actor.score(*scoring)
        actor.update(rows, 1)
        yield "update", counted


def _policy(setup: Setup, fake: FakeTensorMode) -> PlannedPolicy:
    """The policy as a worker has it, of fake weights."""
    config = copy.deepcopy(planned_config(setup.model))
    text = config.get_text_config()
    if setup.num_layers is not None:
        text.num_hidden_layers = setup.num_layers
        if getattr(text, "layer_types", None):
            text.layer_types = list(islice(cycle(text.layer_types), setup.num_layers))
    set_dropout(config, dict.fromkeys(dropout_of(config), 0.0))
    with fake:
        lm = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=ATTENTIONS[setup.model.attn_implementation],
            trust_remote_code=setup.model.trust_remote_code,
        )  # fmt: skip
    replace_linears(lm)
    if setup.model.trains_adapter:
        # peft moves what it makes, which fake tensors do not let it; so these become fake afterwards.
        add_adapter(lm, setup.model, seed=0)
        _make_fake(lm, fake)
    policy = PlannedPolicy(lm, fake, on_gpu=setup.device == "cuda")
    if setup.model.enable_gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    shard(policy, torch.device("cpu"), setup.actor.fsdp_config, offload_policy=False, compute_as=setup.device)
    return policy


def _make_fake(lm: Any, fake: FakeTensorMode) -> None:
    for module in lm.modules():
        for name, weight in module.named_parameters(recurse=False):
            if not isinstance(weight, FakeTensor):
                own = torch.nn.Parameter(fake.from_tensor(weight.detach()), requires_grad=weight.requires_grad)
                module.register_parameter(name, own)


def planned_rows(rows: Sequence[Row], setup: Setup) -> DataProto:
    """Rows of these lengths, of one mini-batch; their tokens mean nothing."""
    width, length = max(row.prompt for row in rows), max(row.response for row in rows)
    prompts = torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        # Two tokens that tell the group.
        prompts[i, -row.prompt :] = torch.tensor([row.group % 97, row.group // 97]).repeat(row.prompt)[: row.prompt]
    columns = {
        "prompts": prompts,
        "prompt_length": torch.tensor([row.prompt for row in rows]),
        "pool_start": torch.zeros(len(rows), dtype=torch.int64),
        "responses": torch.zeros(len(rows), length, dtype=torch.int64),
        "response_length": torch.tensor([row.response for row in rows]),
        "trained": torch.tensor([row.trained for row in rows]),
        "mini_batch": torch.zeros(len(rows), dtype=torch.int64),
        **{name: torch.zeros(len(rows), length) for name in ("old_log_probs", "ref_log_prob")},
        # Not 0: without advantages an update does not measure both gradients.
        "advantages": torch.ones(len(rows), length),
    }
    if setup.trains_embeddings:
        # Broadcasts over the dimensions of the embeddings.
        columns["embedding_grad"] = torch.ones(len(rows), 1)
    return DataProto.from_dict(columns)


@torch.library.register_fake("mkldnn::_reorder_linear_weight")
def _packed_shape(weight: Tensor, rows: int | None = None) -> Tensor:
    return torch.empty_like(weight)


@contextlib.contextmanager
def _as_on(device: str) -> Iterator[None]:
    """Compute in the chunks and with the attention of that device, on a CPU's tensors."""
    if device == "cpu":
        yield
        return
    chunk = log_probs.CHUNK_BYTES["cpu"]
    log_probs.CHUNK_BYTES["cpu"] = log_probs.CHUNK_BYTES["cuda"]
    for kernel, name in ATTENTIONS.items():
        if kernel != "sdpa":
            AttentionInterface.register(name, _flash_shapes)
    try:
        yield
    finally:
        log_probs.CHUNK_BYTES["cpu"] = chunk
        for kernel, name in ATTENTIONS.items():
            AttentionInterface.register(name, partial(grace_attention, kernel=kernel))


def _flash_shapes(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    softcap: float | None = None, packed_segments: list[Segment] | None = None, **further: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """In place of `grace_attention`: the memory of flash attention's kernels, where they may compute it."""
    if softcap is not None or query.shape[3] != value.shape[3]:
        return grace_attention(
            module, query, key, value, attention_mask, softcap=softcap, packed_segments=packed_segments, **further
        )
    return _FlashShapes.apply(*(x[0].transpose(0, 1) for x in (query, key, value))).unsqueeze(0), None


class _FlashShapes(torch.autograd.Function):
    """Dao 2023 (arXiv 2307.08691): the output and one float32 for each token and head are kept, and no scores.

    The backward pass has a float32 sum of the queries' gradients, and keys' gradients of all heads before they are
    summed over the heads that share a key (read in flash-attn 2's sources).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(query.shape)
        log_sums = query.new_empty(query.shape[:2], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, log_sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        sums = query.new_empty(query.shape, dtype=torch.float32)
        shared = [query.new_empty(query.shape) for _ in range(2)] if query.shape[1] != key.shape[1] else []
        grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        del sums, shared
        return grads

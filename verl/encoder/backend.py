"""The backend of an encoder in one process: a rollout engine that generates rationales, and a policy that embeds.

The hf engine decodes with the policy's own weights, so it pools the hidden states of what it writes, and only texts
whose rationale is known already need the policy's forward.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal

import numpy as np
import torch

from verl.config import ModelConfig, RolloutConfig
from verl.embedding.settings import NO_MIX, EmbedderSettings, Mix
from verl.encoder.record import Rationale, Sampling, TextRecord
from verl.errors import UserError
from verl.models.load import load_causal_lm
from verl.models.lora import whole_model_of
from verl.models.onednn import pack_linears
from verl.models.packing import Row, pack
from verl.models.policy import PolicyModel, context_of
from verl.models.sharded_load import load_rounded
from verl.utils.cpus import threads_wanted, usable_cpus
from verl.utils.meeting_place import MeetingPlace
from verl.utils.memory import usable_memory
from verl.utils.seqlen_balancing import pack_rows
from verl.utils.tokenizer import load_tokenizer, stop_token_ids
from verl.workers.device_stages import is_out_of_memory
from verl.workers.rollout.base import Responses, Rollout, RolloutError
from verl.workers.rollout.choose import load_vllm_adapter
from verl.workers.rollout.decoding import rows_that_fit
from verl.workers.rollout.hf import HFRollout

# Tokens of one packed forward. On a CPU: enough to keep two cores busy, few enough to fit their caches.
_FORWARD_TOKENS = {"cpu": 2048, "cuda": 32768}
_MAX_NUM_SEQS = {"cpu": 64, "cuda": 256}
# Texts are embedded as soon as this many have their rationale.
_EMBED_ROWS = 256
# vllm: the most of a memory that it is given by itself, and how much of what is free on a GPU: the rest is for what it
# does not count, and for gaps between allocations.
_MOST_OF_MEMORY = 0.8
_OF_WHAT_IS_FREE = 0.9


@dataclass(frozen=True)
class ModelSpec:
    """Which model is loaded, and how. Plain values, so that it can be sent to other processes."""

    folder: str
    engine: str
    """hf or vllm."""
    device: str
    """cpu or cuda."""
    max_model_len: int
    """vllm: tokens of the longest prompt and rationale together."""
    trust_remote_code: bool = False
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float | None = None
    """vllm: share of the memory; None = `Backend._vllm_share` chooses."""
    ignore_eos: bool = False
    """Generate every rationale to its full length (a control for measurements)."""

    @property
    def dtype_name(self) -> str:
        return "bfloat16" if self.device == "cuda" else "float32"


@dataclass(frozen=True)
class ModelFacts:
    hidden: int
    """H, the dimension of a vector."""
    parameters: int
    embedding_parameters: int
    """Parameters of the token embedding."""
    bytes: int
    context: int | None
    """Most positions of a row, where the model's config has a limit."""
    stop_ids: tuple[int, ...]
    """Tokens that end a rationale, sorted."""


@dataclass(frozen=True)
class Batch:
    """Texts in whose records the backend has just filled in one field."""

    filled: Literal["rationale", "vector"]
    """The field."""
    texts: list[TextRecord]
    seconds: float
    tokens: int
    """Tokens of the rationales generated, or of the rows (prompt and rationale) in the forwards that embedded."""


class Backend:
    """Loads the policy at once, and vllm when the first rationale is generated; hf uses the policy's weights.

    Args:
        processes: those that share this machine, each of them with a backend.
    """

    def __init__(self, spec: ModelSpec, processes: int = 1) -> None:
        if spec.device == "cuda":
            require_gpus(1)
        self.spec = spec
        self._engines_here = max(1, processes // spec.tensor_parallel_size)
        # Each process has a GPU of its own; the memory of a CPU is everyone's.
        self._memory = torch.cuda.mem_get_info()[1] if spec.device == "cuda" else usable_memory() // processes
        if spec.device == "cpu" and threads_wanted() is None:
            # By itself torch takes all CPUs of the machine, also where a container may use a few of them.
            torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()))
        with _explained_memory():
            lm = _load(spec).eval().requires_grad_(False)
        pack_linears(lm)
        self.policy = PolicyModel(lm)
        tokenizer = load_tokenizer(spec.folder, spec.trust_remote_code)
        self._stop_ids = stop_token_ids(tokenizer, lm.config, lm.generation_config)
        self._vllm: Rollout | None = None

    @cached_property
    def facts(self) -> ModelFacts:
        lm: Any = self.policy.lm
        config = lm.config.get_text_config()
        weights = list(lm.parameters())
        return ModelFacts(
            hidden=config.hidden_size,
            parameters=sum(weight.numel() for weight in weights),
            embedding_parameters=lm.get_input_embeddings().weight.numel(),
            bytes=sum(weight.numel() * weight.element_size() for weight in weights),
            context=context_of(lm.config),
            stop_ids=tuple(self._stop_ids),
        )

    def run(
        self, texts: Sequence[TextRecord], settings: EmbedderSettings, sampling: Sampling | None,
        batch_size: int | None, rank: int = 0, group: int = 1,
    ) -> Iterator[Batch]:  # fmt: skip
        """Fill in the rationale and the vector of every record that has none, and yield the records as they change.

        Args:
            sampling: None where every record has its rationale.
            batch_size: texts that the hf engine decodes at once, and most rows of one forward; None = see
                `rows_that_fit`.
            rank, group: number of this process among the `group` processes that share an engine. All of them generate
                together, the first one yields the rationales, and each embeds every `group`-th text.

        Raises:
            RolloutError: the engine cannot generate, or the memory of the GPU ran out.
        """
        own = {text.index for text in texts[rank::group] if text.vector is None}
        ready = [text for text in texts if text.rationale is not None and text.index in own]
        without_rationale = [text for text in texts if text.rationale is None]
        with _explained_memory():
            for batch in self._generate_rationales(without_rationale, settings, sampling, batch_size):
                if rank == 0:
                    yield batch
                written = [text for text in batch.texts if text.index in own]
                if pooled := [text for text in written if text.vector is not None]:
                    yield Batch("vector", pooled, 0.0, 0)
                ready += [text for text in written if text.vector is None]
                if len(ready) >= _EMBED_ROWS:
                    yield self._embed_texts(ready, settings, batch_size)
                    ready = []
            for start in range(0, len(ready), _EMBED_ROWS):
                yield self._embed_texts(ready[start : start + _EMBED_ROWS], settings, batch_size)

    def generate(
        self, prompts: Sequence[Sequence[int]], temperature: float, max_new_tokens: int, seeds: Sequence[int],
        batch_size: int | None, pool_starts: Sequence[int] | None = None, mix: Mix = NO_MIX,
    ) -> Iterator[Responses]:  # fmt: skip
        """Generate a response to each prompt; see `Rollout.generate`.

        Args:
            batch_size: prompts that the hf engine decodes at once, None = see `rows_that_fit`; vllm has its own limit.
            pool_starts, mix: see `RunningPool`, a start per prompt: the hf engine pools too, vllm does not. None = no
                pooling.

        Raises:
            RolloutError: the engine cannot generate, or the memory of the GPU ran out.
        """
        with _explained_memory():
            engine = self._engine(batch_size, max(map(len, prompts), default=0) + max_new_tokens)
            temperatures = [temperature] * len(prompts)
            if pool_starts is not None and isinstance(engine, HFRollout):
                yield from engine.generate_and_pool(prompts, temperatures, max_new_tokens, seeds, pool_starts, mix)
            else:
                yield from engine.generate(prompts, temperatures, max_new_tokens, seeds)

    @torch.no_grad()
    def embed(self, rows: Sequence[Row], batch_size: int | None) -> np.ndarray:
        """[N,H] float32: the vector of each row by its `pool_start` and `mix`, by the forward of training.

        Args:
            batch_size: most rows of one forward; None = as many as have its number of tokens.
        """
        vectors = np.zeros((len(rows), self.facts.hidden), np.float32)
        # A prompt that is computed for every row counts for every row.
        prompts = [row.prompt for row in rows] if self.policy.shares_prompts else range(len(rows))
        for part in pack_rows(
            prompts,
            [len(row.prompt) for row in rows],
            [len(row.response) for row in rows],
            _FORWARD_TOKENS[self.spec.device],
            batch_size,
        ):
            packed = pack([rows[i] for i in part], self.policy.shares_prompts).to(self.policy.device)
            vectors[part] = self.policy(packed, log_probs=False, embeddings=True).embeddings.cpu().numpy()
        return vectors

    def close(self) -> None:
        """Nothing to end: the engine is part of this process. `ProcessesBackend` ends its processes here."""

    def _generate_rationales(
        self, texts: Sequence[TextRecord], settings: EmbedderSettings, sampling: Sampling | None, batch_size: int | None
    ) -> Iterator[Batch]:
        """Fill in the rationales, and the missing vectors too where the engine pools; yields the rationales."""
        if not texts or sampling is None:
            return
        generation = self.generate(
            [text.prompt.ids for text in texts], sampling.temperature, sampling.max_new_tokens,
            [text.seed for text in texts], batch_size,
            [settings.pool_start(text.prompt, has_rationale=True) for text in texts], settings.mix,
        )  # fmt: skip
        start = time.perf_counter()
        for responses in generation:
            for row, response in responses.items():
                text = texts[row]
                text.rationale = Rationale(tuple(response.ids), response.truncated)
                if text.vector is None and response.pooled is not None:
                    text.vector = response.pooled.cpu().numpy()
            tokens = sum(len(response.ids) for response in responses.values())
            yield Batch("rationale", [texts[row] for row in responses], time.perf_counter() - start, tokens)
            start = time.perf_counter()

    def _embed_texts(self, texts: list[TextRecord], settings: EmbedderSettings, batch_size: int | None) -> Batch:
        start = time.perf_counter()
        rows = []
        for text in texts:
            assert text.rationale is not None
            ids = text.rationale.ids
            pool_start = settings.pool_start(text.prompt, has_rationale=bool(ids))
            rows.append(Row(tuple(text.prompt.ids), ids, pool_start, False, settings.mix))
        for text, vector in zip(texts, self.embed(rows, batch_size), strict=True):
            text.vector = vector
        tokens = sum(len(row.prompt) + len(row.response) for row in rows)
        return Batch("vector", texts, time.perf_counter() - start, tokens)

    def _engine(self, batch_size: int | None, longest: int) -> Rollout:
        if self.spec.engine == "hf":
            rows = batch_size or rows_that_fit(self.policy.lm, longest, self._memory)
            return HFRollout(self.policy.lm, self._stop_ids, rows, self.spec.ignore_eos)
        if self._vllm is None:
            self._vllm = self._start_vllm(self._vllm_share())
        return self._vllm

    def _vllm_share(self) -> float:
        """The share of the memory that vllm gets: on a GPU it leaves room for the policy and its largest forward."""
        if self.spec.gpu_memory_utilization is not None:
            return self.spec.gpu_memory_utilization
        if self.spec.device == "cpu":
            return _MOST_OF_MEMORY
        # The share is what vllm takes itself, beside what is taken. torch keeps the memory of a forward that was run:
        # what is free then is needed neither by the policy nor by its forwards.
        length = min(self.spec.max_model_len, self.facts.context or self.spec.max_model_len)
        rows = [Row((0,) * length, (), 0, False)] * max(1, _FORWARD_TOKENS["cuda"] // length)
        self.embed(rows, None)
        free, total = torch.cuda.mem_get_info()
        return min(_MOST_OF_MEMORY, _OF_WHAT_IS_FREE * free / total)

    def _start_vllm(self, share: float) -> Rollout:
        """Start vllm with a share of the memory.

        Raises:
            RolloutError: it cannot run this model here; the message names what to give to the encoder.
        """
        whole_model = whole_model_of(self.spec.folder)
        is_adapter = whole_model != self.spec.folder
        rollout = RolloutConfig(
            # The weights of the folder, so that no weight sync is needed; those of an adapter have to be merged first.
            load_format="dummy" if is_adapter else "auto",
            dtype=self.spec.dtype_name,
            ignore_eos=self.spec.ignore_eos,
            tensor_model_parallel_size=self.spec.tensor_parallel_size,
            gpu_memory_utilization=share,
            free_cache_engine=False,
        )
        with _group_of_one():
            try:
                engine: Rollout = load_vllm_adapter().VLLMRollout(
                    ModelConfig(path=whole_model, trust_remote_code=self.spec.trust_remote_code),
                    rollout,
                    torch.device(self.spec.device),
                    self._stop_ids,
                    weight_names=[name for name, _ in self.policy.lm.named_parameters()],
                    max_model_len=self.spec.max_model_len,
                    max_num_seqs=_MAX_NUM_SEQS[self.spec.device],
                    engines_per_node=self._engines_here,
                )
            except RolloutError as error:
                # Its own message names settings of training.
                raise RolloutError(
                    f"vllm cannot write the rationales of {self.spec.folder!r} here: {error.__cause__ or error}\n"
                    "Give engine=hf, which writes them with the weights that embed; or, where the program "
                    f"has it, another gpu_memory_utilization, which was {share:.2f}, or a larger tensor_parallel_size."
                ) from error.__cause__
        if is_adapter:
            # The policy's own may be packed already.
            engine.update_weights(load_causal_lm(self.spec.folder, self.spec.trust_remote_code).named_parameters())
            engine.wake_up()
        return engine


def require_gpus(processes: int) -> None:
    """Check that there is a GPU for each of as many processes.

    Raises:
        UserError: there are fewer.
    """
    if processes > (found := torch.cuda.device_count()):
        raise UserError(
            f"device=cuda with num_processes={processes} needs as many GPUs, and torch finds {found} here; give "
            f"{'device=cpu' if found == 0 else 'fewer processes, or device=cpu'}"
        )


def _load(spec: ModelSpec) -> Any:
    """The model on its device, in the dtype of its forwards."""
    if spec.device == "cpu":
        return load_causal_lm(spec.folder, spec.trust_remote_code)
    dtype, device = getattr(torch, spec.dtype_name), torch.device(spec.device)
    return load_rounded(spec.folder, spec.trust_remote_code, dtype, device)


@contextmanager
def _explained_memory() -> Iterator[None]:
    """Name the settings that decide how much of a GPU's memory is taken, where it runs out.

    Raises:
        RolloutError: in place of torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, RolloutError) or not is_out_of_memory(error):
            raise
        raise RolloutError(
            "the GPU's memory ran out; give a smaller batch_size or max_new_tokens, with vllm a lower "
            f"gpu_memory_utilization where the program has it, or a larger GPU ({error})"
        ) from error


@contextmanager
def _group_of_one() -> Iterator[None]:
    """Set the environment that vllm's external launcher reads while it starts, unless this process is in a group.

    Programs that this process starts later would take it for theirs.
    """
    # Without it vllm on a CPU would use one thread only.
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    if "RANK" in os.environ:
        yield
        return
    own = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", **_own_meeting_place().environment}
    before = {name: os.environ[name] for name in own if name in os.environ}
    os.environ.update(own)
    try:
        yield
    finally:
        for name in own:
            os.environ.pop(name, None)
        os.environ.update(before)


@cache
def _own_meeting_place() -> MeetingPlace:
    """Of this process until it ends: the group stays when an engine goes, and a later engine meets here too."""
    return MeetingPlace()

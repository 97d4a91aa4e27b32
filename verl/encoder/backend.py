"""The models behind an encoder, in one process: an engine that writes rationales and a policy that embeds them."""

import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from verl.config import ModelConfig, RolloutConfig
from verl.embedding.prompts import Prompt
from verl.embedding.settings import EmbedderSettings
from verl.models.onednn import pack_linears
from verl.models.packing import Row, pack
from verl.models.policy import PolicyModel, load_causal_lm
from verl.utils.seqlen_balancing import pack_rows
from verl.utils.tokenizer import load_tokenizer, stop_token_ids
from verl.workers.rollout.base import Responses, Rollout
from verl.workers.rollout.choose import load_vllm_adapter
from verl.workers.rollout.hf import HFRollout

# Tokens of one packed forward: on a CPU what keeps two cores busy and fits their caches.
_FORWARD_TOKENS = {"cpu": 2048, "cuda": 32768}
_MAX_NUM_SEQS = {"cpu": 64, "cuda": 256}
# Rationales that are waited for before a forward embeds them.
_EMBED_ROWS = 256


@dataclass(frozen=True)
class ModelSpec:
    """What is loaded, and onto what. Plain values, so that other processes can be told."""

    folder: str
    engine: str
    """hf or vllm."""
    device: str
    """cpu or cuda."""
    max_model_len: int
    """vllm: tokens of the longest prompt and rationale together."""
    trust_remote_code: bool = False
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.8
    ignore_eos: bool = False
    """Write every rationale to its full length (a control for measurements)."""

    @property
    def dtype_name(self) -> str:
        return "bfloat16" if self.device == "cuda" else "float32"


@dataclass(frozen=True)
class ModelSize:
    hidden: int
    """H, the dimension of a vector."""
    parameters: int
    embedding_parameters: int
    """Those of the token embedding."""
    bytes: int
    context: int | None
    """Most positions of a row, where the model's config names them."""


@dataclass(frozen=True)
class Item:
    """One text to be done."""

    prompt: Prompt
    seed: int
    rationale: tuple[int, ...] | None
    """Token ids; None = to be written."""
    embed: bool
    """Whether its vector is wanted, or the rationale alone."""


@dataclass(frozen=True)
class Work:
    """Texts to be done in one way."""

    items: Sequence[Item]
    settings: EmbedderSettings
    max_new_tokens: int
    temperature: float
    batch_size: int
    """Texts that the hf engine decodes at once, and most rows of one forward."""


@dataclass(frozen=True)
class Thought:
    """Rationales that have just been written, by the position of their items."""

    responses: Responses
    seconds: float


@dataclass(frozen=True)
class Embedded:
    """Vectors that have just been made."""

    places: list[int]
    """Positions of the items."""
    means: np.ndarray
    """[len(places), H] float32."""
    tokens: int
    """Of the rows, prompts and rationales."""
    seconds: float


class EmbeddingModel:
    """Loads the policy at once and vllm with the first rationale; the hf engine shares the policy's weights."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        lm = load_causal_lm(spec.folder, spec.trust_remote_code)
        lm = lm.to(spec.device, getattr(torch, spec.dtype_name)).eval().requires_grad_(False)
        pack_linears(lm)
        self.policy = PolicyModel(lm)
        tokenizer = load_tokenizer(spec.folder, spec.trust_remote_code)
        self._stop_ids = stop_token_ids(tokenizer, lm.config, lm.generation_config)
        self._vllm: Rollout | None = None

    @cached_property
    def size(self) -> ModelSize:
        lm: Any = self.policy.lm
        config = lm.config.get_text_config()
        weights = list(lm.parameters())
        return ModelSize(
            hidden=config.hidden_size,
            parameters=sum(weight.numel() for weight in weights),
            embedding_parameters=lm.get_input_embeddings().weight.numel(),
            bytes=sum(weight.numel() * weight.element_size() for weight in weights),
            context=getattr(config, "max_position_embeddings", None),
        )

    def run(self, work: Work, rank: int = 0, group: int = 1) -> Iterator[Thought | Embedded]:
        """Do the work; every item's rationale and vector is given once, as soon as it is there.

        Args:
            rank, group: this process's place among those that share an engine. All of them take part in writing, the
                first tells the rationales, and each embeds a share of the items.
        """
        rationales = {i: item.rationale for i, item in enumerate(work.items) if item.rationale is not None}
        mine = {i for i, item in enumerate(work.items) if item.embed and i % group == rank}
        waiting = [i for i in rationales if i in mine]
        for thought in self._think_about(work, [i for i in range(len(work.items)) if i not in rationales]):
            if rank == 0:
                yield thought
            rationales |= {i: tuple(response.ids) for i, response in thought.responses.items()}
            waiting += [i for i in thought.responses if i in mine]
            if len(waiting) >= _EMBED_ROWS:
                yield self._embed_items(work, waiting, rationales)
                waiting = []
        for start in range(0, len(waiting), _EMBED_ROWS):
            yield self._embed_items(work, waiting[start : start + _EMBED_ROWS], rationales)

    def think(
        self, prompts: Sequence[Sequence[int]], temperature: float, max_new_tokens: int, seeds: Sequence[int],
        batch_size: int,
    ) -> Iterator[Responses]:  # fmt: skip
        """Write a response to each prompt; see `Rollout.generate`.

        Args:
            batch_size: prompts that the hf engine decodes at once; vllm decides by itself.
        """
        engine = self._engine(batch_size)
        return engine.generate(prompts, [temperature] * len(prompts), max_new_tokens, seeds)

    @torch.no_grad()
    def embed(self, rows: Sequence[Row], batch_size: int) -> np.ndarray:
        """[N,H] float32: each row's hidden states averaged from its `pool_start` on, by the forward of training.

        Args:
            batch_size: most rows of one forward.
        """
        vectors = np.zeros((len(rows), self.size.hidden), np.float32)
        for part in pack_rows(
            [row.prompt for row in rows],
            [len(row.prompt) for row in rows],
            [len(row.response) for row in rows],
            _FORWARD_TOKENS[self.spec.device],
            batch_size,
        ):
            packed = pack([rows[i] for i in part], self.policy.shares_prompts).to(self.policy.device)
            vectors[part] = self.policy(packed, log_probs=False, embeddings=True).embeddings.cpu().numpy()
        return vectors

    def close(self) -> None:
        """Nothing outlives this process."""

    def _think_about(self, work: Work, places: list[int]) -> Iterator[Thought]:
        if not places:
            return
        parts = self.think(
            [work.items[i].prompt.ids for i in places], work.temperature, work.max_new_tokens,
            [work.items[i].seed for i in places], work.batch_size,
        )  # fmt: skip
        start = time.perf_counter()
        for ended in parts:
            yield Thought({places[row]: response for row, response in ended.items()}, time.perf_counter() - start)
            start = time.perf_counter()

    def _embed_items(self, work: Work, places: list[int], rationales: dict[int, tuple[int, ...]]) -> Embedded:
        start = time.perf_counter()
        rows = []
        for i in places:
            prompt, rationale = work.items[i].prompt, rationales[i]
            rows.append(Row(tuple(prompt.ids), rationale, work.settings.pool_start(prompt, len(rationale)), False))
        means = self.embed(rows, work.batch_size)
        tokens = sum(len(row.prompt) + len(row.response) for row in rows)
        return Embedded(places, means, tokens, time.perf_counter() - start)

    def _engine(self, batch_size: int) -> Rollout:
        if self.spec.engine == "hf":
            return HFRollout(self.policy.lm, self._stop_ids, batch_size, self.spec.ignore_eos)
        if self._vllm is None:
            self._vllm = self._start_vllm()
        return self._vllm

    def _start_vllm(self) -> Rollout:
        _stand_alone()
        # With the checkpoint's own weights, so it needs no sync.
        rollout = RolloutConfig(
            load_format="auto",
            dtype=self.spec.dtype_name,
            ignore_eos=self.spec.ignore_eos,
            tensor_model_parallel_size=self.spec.tensor_parallel_size,
            gpu_memory_utilization=self.spec.gpu_memory_utilization,
            free_cache_engine=False,
        )
        return load_vllm_adapter().VLLMRollout(
            ModelConfig(path=self.spec.folder, trust_remote_code=self.spec.trust_remote_code),
            rollout,
            torch.device(self.spec.device),
            self._stop_ids,
            weight_names=[name for name, _ in self.policy.lm.named_parameters()],
            max_model_len=self.spec.max_model_len,
            max_num_seqs=_MAX_NUM_SEQS[self.spec.device],
            engines_per_node=1,
        )


def _stand_alone() -> None:
    """Make this process a group of one, as the engine expects to be told, unless it is in a group already."""
    if "RANK" in os.environ:
        return
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    # Else vllm on a CPU would leave one thread.
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

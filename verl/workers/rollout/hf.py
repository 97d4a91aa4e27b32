"""The transformers rollout engine: the default where vllm is not installed, and the reference for vllm.

transformers' `generate` is not used: it takes one temperature for all rows, gives log-probs only by keeping the logits
of every step, computes equal prompts and the system turn once per row, and copies the whole cache in every step. Here
the prompts are prefilled as one packed line, and keys and values are written once into buffers of their final size
(`decoding.py`).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from verl.embedding.pooling import RunningPool
from verl.embedding.settings import NO_MIX, Mix
from verl.models.onednn import PackedLinear
from verl.models.packing import Row, pack
from verl.workers.rollout.base import HeldWeight, Responses, Rollout, held_by_product, limit_each
from verl.workers.rollout.decoding import Decoding, Forward


class HFRollout(Rollout):
    """Decodes with a transformers causal language model.

    Args:
        lm: the model with `grace_attention`, on its device and in its dtype; its linear layers may be packed
            (`onednn.pack_linears`). `update_weights` changes its weights.
        stop_ids: token ids that end a response.
        max_num_seqs: most rows decoded at once.
        ignore_eos: continue after an end token, to the length limit.
    """

    name = "hf"

    def __init__(self, lm: Any, stop_ids: Sequence[int], max_num_seqs: int, ignore_eos: bool = False) -> None:
        super().__init__(name for name, _ in lm.named_parameters())
        self.lm = lm.eval().requires_grad_(False)
        self.stop_ids = () if ignore_eos else tuple(stop_ids)
        self.max_num_seqs = max_num_seqs
        self._forward = Forward(lm)
        self._holders = _holders(lm)

    def held(self, name: str, tensor: Tensor, most_columns: int | None) -> list[HeldWeight]:
        """The whole parameter; of a packed layer the weight that it multiplies by, read back through its product."""
        parts = []
        for place, module, leaf in self._holders[name]:
            own = getattr(module, leaf)
            if _is_packed(module, leaf):
                parts.append(held_by_product(place, module.multiply, tensor, most_columns, own.dtype, self.lm.device))
            else:
                parts.append(HeldWeight(place, tensor.to(own.dtype), own))
        return parts

    def generate_and_pool(
        self, prompts: Sequence[Sequence[int]], temperatures: Sequence[float], max_new_tokens: int | Sequence[int],
        seeds: Sequence[int], pool_starts: Sequence[int], mix: Mix = NO_MIX,
    ) -> Iterator[Responses]:  # fmt: skip
        """`generate`, and pool each row's hidden states, which decoding computes anyway but for the last token's.

        Args:
            pool_starts: one per prompt, see `RunningPool`.
            mix: how prompt and response become one vector.
        """
        self._require_awake()
        pool = RunningPool(pool_starts, self.lm.config.get_text_config().hidden_size, self.lm.device, mix)
        return self._generate(prompts, temperatures, limit_each(max_new_tokens, len(prompts)), seeds, pool)

    @torch.no_grad()
    def _generate(
        self, prompts: Sequence[Sequence[int]], temperatures: Sequence[float], limits: Sequence[int],
        seeds: Sequence[int], pool: RunningPool | None = None,
    ) -> Iterator[Responses]:  # fmt: skip
        if prompts:
            yield from Decoding(
                self._forward, prompts, temperatures, limits, seeds, self.stop_ids, self.max_num_seqs, pool
            ).run()

    def wake_weights(self) -> None:
        """Nothing to do: this engine never frees its weights."""

    def sleep(self, keep_weights: bool = False) -> None:
        """Nothing to do: each call frees its own cache."""

    def _wake_cache(self) -> None:
        """Nothing to do: each call allocates its own cache."""

    @torch.no_grad()
    def _score(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        packed = pack([Row(tuple(prompt), (), 0, scored=False) for prompt in prompts], share_prompts=False)
        line = packed.to(self.lm.device)
        hidden = self._forward.hidden(line.input_ids, line.position_ids, packed_segments=line.segments)
        scores = []
        for segment in line.segments:
            targets = line.input_ids[0, segment.start + 1 : segment.end, None]
            logits = self._forward.logits(hidden[0, segment.start : segment.end - 1])
            scores.append(logits.log_softmax(-1).gather(1, targets).squeeze(1).tolist())
        return scores

    def _load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            for _, module, leaf in self._holders[name]:
                if _is_packed(module, leaf):
                    module.load(tensor)
                else:
                    getattr(module, leaf).copy_(tensor)


def _holders(lm: nn.Module) -> dict[str, list[tuple[str, Any, str]]]:
    """For every weight the modules that hold it, as (name, module, attribute); a tied weight has two."""
    names = {id(parameter): name for name, parameter in lm.named_parameters()}
    found: dict[str, list[tuple[str, Any, str]]] = {name: [] for name in names.values()}
    for place, module in lm.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            found[names[id(parameter)]].append((place, module, leaf))
    return found


def _is_packed(module: nn.Module, leaf: str) -> bool:
    return isinstance(module, PackedLinear) and leaf == "weight"

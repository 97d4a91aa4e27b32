"""The transformers rollout engine: the CPU default, and the reference for others.

It decodes with the model's own forward and cache. transformers' `generate` is not used because it has
neither a temperature per row nor log-probs without keeping every step's logits; the loop here keeps
one step's. Equal prompts are prefilled once, finished rows leave the batch.
"""

from collections.abc import Generator, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from verl.workers.rollout.base import HeldWeight, Response, Rollout


class HFRollout(Rollout):
    """Decodes with a transformers causal language model.

    Args:
        lm: the model, on its device, in its dtype; its weights change through `update_weights`.
        stop_ids: token ids that end a response.
        pad_id: any valid id, for the left of short prompts.
        max_num_seqs: most rows decoded at once.
        ignore_eos: go on after an end token.
    """

    name = "hf"

    def __init__(
        self, lm: Any, stop_ids: Sequence[int], pad_id: int, max_num_seqs: int, ignore_eos: bool = False
    ) -> None:
        super().__init__(name for name, _ in lm.named_parameters())
        self.lm = lm.eval().requires_grad_(False)
        self.stop_ids = torch.tensor([] if ignore_eos else list(stop_ids), dtype=torch.int64, device=lm.device)
        self.pad_id = pad_id
        self.max_num_seqs = max_num_seqs

    def held(self, name: str, tensor: Tensor, most_columns: int | None) -> list[HeldWeight]:
        """The parameter itself, whole."""
        own = self.lm.get_parameter(name)
        return [HeldWeight(name, tensor.to(own.dtype), own)]

    @torch.no_grad()
    def _generate(
        self, prompts: Sequence[Sequence[int]], temperatures: Sequence[float], max_new_tokens: int, seed: int
    ) -> Generator[int, None, list[Response]]:
        generator = torch.Generator(self.lm.device).manual_seed(seed)
        # Prompts of similar length side by side need little padding; the sort keeps equal prompts together.
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), list(prompts[i])))
        responses: dict[int, Response] = {}
        for start in range(0, len(order), self.max_num_seqs):
            rows = order[start : start + self.max_num_seqs]
            decoded = yield from self._decode(
                [prompts[i] for i in rows], [temperatures[i] for i in rows], max_new_tokens, generator
            )
            responses.update(zip(rows, decoded, strict=True))
        return [responses[i] for i in range(len(prompts))]

    def wake_weights(self) -> None:
        """They are always there."""

    def sleep(self) -> None:
        """Nothing to free: the cache goes with each call."""

    def _wake_cache(self) -> None:
        """Nothing to take."""

    @torch.no_grad()
    def _score(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        scores = []
        for prompt in prompts:
            ids = torch.tensor([prompt], device=self.lm.device)
            log_probs = self.lm(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
            scores.append(log_probs.gather(1, ids[0, 1:].unsqueeze(1)).squeeze(1).tolist())
        return scores

    def _load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        own = dict(self.lm.named_parameters())
        for name, tensor in weights:
            own[name].copy_(tensor)

    def _decode(
        self,
        prompts: list[Sequence[int]],
        temperatures: list[float],
        max_new_tokens: int,
        generator: torch.Generator,
    ) -> Generator[int, None, list[Response]]:
        """Decode one batch [B] to its end."""
        device = self.lm.device
        ids: list[list[int]] = [[] for _ in prompts]
        log_probs: list[list[float]] = [[] for _ in prompts]
        ended = [False] * len(prompts)
        rows = torch.arange(len(prompts), device=device)  # rows still being decoded
        temperature = torch.tensor(temperatures, device=device)
        logits, cache, mask = self._prefill(prompts)
        for step in range(max_new_tokens):
            token, log_prob = _sample(logits, temperature[rows], generator)
            stopped = torch.isin(token, self.stop_ids)
            for row, t, lp, s in zip(rows.tolist(), token.tolist(), log_prob.tolist(), stopped.tolist(), strict=True):
                ids[row].append(t)
                log_probs[row].append(lp)
                ended[row] = s
            going = (~stopped).nonzero().flatten()
            if step == max_new_tokens - 1 or not len(going):
                yield len(rows)
                break
            if len(going) < len(rows):
                yield len(rows) - len(going)
                rows, token, mask = rows[going], token[going], mask[going]
                cache.batch_select_indices(going)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            logits = self._step(token, mask, cache)
        return [Response(i, p, truncated=not e) for i, p, e in zip(ids, log_probs, ended, strict=True)]

    def _prefill(self, prompts: list[Sequence[int]]) -> tuple[Tensor, DynamicCache, Tensor]:
        """Run each different prompt once; give every row its prompt's logits, cache and mask."""
        unique = list(dict.fromkeys(tuple(p) for p in prompts))
        width = max(len(p) for p in unique)
        tokens = torch.full((len(unique), width), self.pad_id)
        mask = torch.zeros(len(unique), width, dtype=torch.int64)
        for i, prompt in enumerate(unique):
            tokens[i, width - len(prompt) :] = torch.tensor(prompt)
            mask[i, width - len(prompt) :] = 1
        tokens, mask = tokens.to(self.lm.device), mask.to(self.lm.device)
        cache = DynamicCache(config=self.lm.config)
        logits = self.lm(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            past_key_values=cache,
            logits_to_keep=1,
        ).logits[:, -1]
        place = {prompt: i for i, prompt in enumerate(unique)}
        index = torch.tensor([place[tuple(p)] for p in prompts], device=self.lm.device)
        cache.batch_select_indices(index)
        return logits[index], cache, mask[index]

    def _step(self, token: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        """Feed one token [B] per row; return the next logits [B,V]."""
        position = mask.sum(1, keepdim=True) - 1
        output = self.lm(
            input_ids=token.unsqueeze(1), attention_mask=mask, position_ids=position, past_key_values=cache
        )
        return output.logits[:, -1]


def _sample(logits: Tensor, temperature: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw one token per row.

    Args:
        logits: [B,V].
        temperature: [B]; 0 takes the likeliest token.

    Returns:
        Tokens [B] int64 and their log-probs [B] float32 under the tempered distribution.
    """
    greedy = temperature == 0
    scaled = (logits.float() / torch.where(greedy, torch.ones_like(temperature), temperature).unsqueeze(1)).log_softmax(
        -1
    )
    token = torch.multinomial(scaled.exp(), 1, generator=generator).squeeze(1)
    token = torch.where(greedy, logits.argmax(-1), token)
    return token, scaled.gather(1, token.unsqueeze(1)).squeeze(1)

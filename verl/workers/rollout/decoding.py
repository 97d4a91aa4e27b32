"""Decoding: the rows of one call of the transformers engine, from their prompts to their last tokens.

Shapes: N prompts, B rows that are decoded together, V vocabulary, H hidden size.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from verl.embedding.pooling import RunningPool
from verl.models.attention import cache_bytes
from verl.models.decoding_cache import DecodingCache
from verl.models.logits import logit_form
from verl.models.packing import Row, common_beginning, pack
from verl.models.policy import check_longest_row
from verl.utils.seqlen_balancing import pack_rows
from verl.workers.rollout.base import Response, Responses
from verl.workers.rollout.sampling import sample, uniform_draws

# Most tokens of one prefill forward.
_PREFILL_TOKENS = 8192
# Prompts are started when this share of the places is free: one forward of many tokens is faster than many of few.
_REFILLED_SHARE = 0.25
# `rows_that_fit`: what decoding may take of the memory, and the most rows, beyond which they gain nothing on two cores.
_MEMORY_SHARE = 0.25
_MOST_ROWS = 512
# Float32 numbers of a row for each entry of the vocabulary, while a token is drawn: logits, scaled, exponentials.
_LOGIT_COPIES = 3


class Forward:
    """The forward of a causal language model with `grace_attention`, and its head."""

    def __init__(self, lm: Any) -> None:
        self.lm = lm
        self._form = logit_form(lm.config)

    def hidden(self, input_ids: Tensor, position_ids: Tensor, **attention: Any) -> Tensor:
        """The last hidden states; `attention` is what `grace_attention` is given."""
        model = self.lm.base_model
        return model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **attention).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits of hidden states."""
        return self._form.logits(self.lm.get_output_embeddings()(hidden).float())


def rows_that_fit(lm: Any, longest: int, memory: int) -> int:
    """How many rows a quarter of the memory is enough for, from 1 to 512: their keys, values and logits.

    On a CPU every forward reads all weights once, however many rows share it: docs/performance.md.

    Args:
        longest: tokens of the longest prompt and response together.
        memory: bytes.
    """
    config = lm.config.get_text_config()
    row = longest * cache_bytes(config, lm.dtype) + _LOGIT_COPIES * config.vocab_size * torch.float32.itemsize
    return max(1, min(_MOST_ROWS, int(_MEMORY_SHARE * memory / row)))


class Decoding:
    """Decodes the prompts of one call; a prompt takes the place of a row that has ended.

    Args:
        prompts, temperatures, seeds: see `Rollout.generate`.
        limits: length limit of each response.
        stop_ids: token ids that end a response.
        max_rows: most rows decoded together.
        pool: pools the hidden states of each row by the number of its prompt; None = nothing is pooled.

    Raises:
        UserError: see `check_longest_row`.
    """

    def __init__(
        self, forward: Forward, prompts: Sequence[Sequence[int]], temperatures: Sequence[float],
        limits: Sequence[int], seeds: Sequence[int], stop_ids: Sequence[int], max_rows: int, pool: RunningPool | None,
    ) -> None:  # fmt: skip
        device = forward.lm.device
        self.forward, self.seeds, self.most_draws, self.pool = forward, seeds, max(limits), pool
        self.prompts = [tuple(prompt) for prompt in prompts]
        self.stop_ids = frozenset(stop_ids)
        self.max_rows = min(max_rows, len(prompts))
        longest = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
        check_longest_row(forward.lm.config, longest)
        # The longest first, so that the cache's buffers have their size from the beginning. Rows of similar lengths are
        # decoded together, and equal prompts are neighbours.
        self.waiting = deque(sorted(range(len(prompts)), key=lambda i: (-len(self.prompts[i]), self.prompts[i])))
        self.cache = DecodingCache(self.max_rows, len(common_beginning(self.prompts)), longest, device)
        self.temperatures = torch.tensor(temperatures, device=device)
        self.limits = torch.tensor(limits, device=device)
        self.written: dict[int, tuple[list[int], list[float]]] = {}  # ids and log-probs, by the number of the prompt
        # Of the rows being decoded, in the cache's order:
        self.rows = torch.empty(0, dtype=torch.int64, device=device)  # [B], numbers of their prompts
        self.drawn = torch.empty(0, dtype=torch.int64, device=device)  # [B], tokens of their responses
        self.draws = torch.empty(0, self.most_draws, dtype=torch.float64, device=device)  # see `uniform` of `sample`
        self.hidden = torch.empty(0, device=device)  # [B,H], of their newest token
        self.token = torch.empty(0, dtype=torch.int64, device=device)  # [B], the token that follows it

    def run(self) -> Iterator[Responses]:
        """Yield responses as they end, each once, by the number of its prompt."""
        while self.waiting or len(self.rows):
            self._start_rows()
            ended = self._draw()
            # Pooling needs the hidden state of the last token too.
            if self.pool is None:
                yield from self._leave(ended)
            if len(self.rows):
                self._feed()
            if self.pool is not None:
                self.pool.add(self.rows, self.hidden)
                yield from self._leave(ended)

    def _start_rows(self) -> None:
        """Give free places to waiting prompts, if enough are free."""
        free = self.max_rows - len(self.rows)
        if not self.waiting or free < min(len(self.waiting), _REFILLED_SHARE * self.max_rows):
            return
        new = [self.waiting.popleft() for _ in range(min(free, len(self.waiting)))]
        prompts = [self.prompts[row] for row in new]
        for part in pack_rows(prompts, [len(p) for p in prompts], [0] * len(new), _PREFILL_TOKENS):
            self._prefill([new[i] for i in part])

    def _prefill(self, rows: list[int]) -> None:
        """Add rows, whose distinct prompts are computed once, and their common beginning once."""
        device = self.rows.device
        packed = pack([Row(self.prompts[row], (), 0, False) for row in rows], share_prompts=device.type == "cpu")
        # The packed positions of each row's tokens: as pool_start is 0, every token of a row is pooled.
        lines = packed.pool_token.split([len(self.prompts[row]) for row in rows])
        self.cache.expect(lines)
        packed = packed.to(device)
        hidden = self.forward.hidden(
            packed.input_ids, packed.position_ids, packed_segments=packed.segments, decoding_cache=self.cache
        )[0]
        if self.pool is not None:
            for row, line in zip(rows, lines, strict=True):
                self.pool.start(row, hidden[line.to(device)])
        newest = hidden[torch.stack([line[-1] for line in lines]).to(device)]
        self.hidden = torch.cat([self.hidden, newest]) if len(self.rows) else newest
        self.rows = torch.cat([self.rows, torch.tensor(rows, device=device)])
        self.drawn = torch.cat([self.drawn, self.drawn.new_zeros(len(rows))])
        draws = uniform_draws([self.seeds[row] for row in rows], self.most_draws)
        self.draws = torch.cat([self.draws, draws.to(device)])
        self.written |= {row: ([], []) for row in rows}

    def _draw(self) -> Tensor:
        """Draw the next token of every row; return which rows end with it, [B] bool."""
        uniform = self.draws.gather(1, self.drawn.unsqueeze(1)).squeeze(1)
        self.token, log_prob = sample(self.forward.logits(self.hidden), self.temperatures[self.rows], uniform)
        self.drawn = self.drawn + 1
        tokens = self.token.tolist()
        for row, token, value in zip(self.rows.tolist(), tokens, log_prob.tolist(), strict=True):
            ids, log_probs = self.written[row]
            ids.append(token)
            log_probs.append(value)
        stopped = torch.tensor([token in self.stop_ids for token in tokens], device=self.token.device)
        return stopped | (self.drawn == self.limits[self.rows])

    def _feed(self) -> None:
        """Compute the hidden states of every row's newest token."""
        self.cache.advance()
        positions = self.cache.lengths - 1
        self.hidden = self.forward.hidden(self.token.unsqueeze(1), positions.unsqueeze(1), decoding_cache=self.cache)[
            :, -1
        ]

    def _leave(self, ended: Tensor) -> Iterator[Responses]:
        """Yield the responses of the rows that have ended, and give their places free."""
        responses: Responses = {}
        for row in self.rows[ended].tolist():
            ids, log_probs = self.written.pop(row)
            pooled = None if self.pool is None else self.pool.mean(row)
            responses[row] = Response(ids, log_probs, ids[-1] not in self.stop_ids, pooled)
        if responses:
            kept = self.cache.keep(~ended)
            self.rows, self.drawn, self.draws = self.rows[kept], self.drawn[kept], self.draws[kept]
            self.hidden, self.token = self.hidden[kept], self.token[kept]
            yield responses

"""The transformers rollout engine: the default where vllm is not installed, and the reference for vllm.

transformers' `generate` is not used: it takes one temperature for all rows, gives log-probs only by keeping the logits
of every step, computes equal prompts and the system turn once per row, and copies the whole cache in every step. Here
the prompts are prefilled as one packed line, and keys and values are written once into buffers of their final size.

Shapes: B rows that are decoded together, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from verl.embedding.pooling import RunningPool
from verl.models.attention import DecodingCache
from verl.models.logits import logit_form
from verl.models.onednn import PackedLinear
from verl.models.packing import Row, pack
from verl.models.policy import check_longest_row
from verl.utils.seqlen_balancing import pack_rows
from verl.workers.rollout.base import HeldWeight, Response, Responses, Rollout, held_by_product

# The likeliest tokens, which are drawn by their cumulative probabilities; see `_sample`.
_HEAD_TOKENS = 64
# Most tokens of one prefill forward.
_PREFILL_TOKENS = 8192


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
        self.stop_ids = torch.tensor([] if ignore_eos else list(stop_ids), dtype=torch.int64, device=lm.device)
        self.max_num_seqs = max_num_seqs
        self._form = logit_form(lm.config)
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
        self, prompts: Sequence[Sequence[int]], temperatures: Sequence[float], max_new_tokens: int,
        seeds: Sequence[int], pool_starts: Sequence[int],
    ) -> Iterator[Responses]:  # fmt: skip
        """`generate`, and pool each row's hidden states, which decoding computes anyway but for the last token's.

        Args:
            pool_starts: one per prompt, see `RunningPool`.
        """
        self._require_awake()
        return self._generate(prompts, temperatures, max_new_tokens, seeds, pool_starts)

    @torch.no_grad()
    def _generate(
        self, prompts: Sequence[Sequence[int]], temperatures: Sequence[float], max_new_tokens: int,
        seeds: Sequence[int], pool_starts: Sequence[int] | None = None,
    ) -> Iterator[Responses]:  # fmt: skip
        # Prompts of similar length in one batch need little padding; sorting also puts equal prompts together.
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), list(prompts[i])))
        for start in range(0, len(order), self.max_num_seqs):
            rows = order[start : start + self.max_num_seqs]
            draws = _uniform_draws([seeds[i] for i in rows], max_new_tokens).to(self.lm.device)
            pool = None
            if pool_starts is not None:
                hidden_size = self.lm.get_output_embeddings().in_features
                pool = RunningPool([pool_starts[i] for i in rows], hidden_size, self.lm.device)
            for ended in self._decode(
                [prompts[i] for i in rows], [temperatures[i] for i in rows], max_new_tokens, draws, pool
            ):
                yield {rows[place]: response for place, response in ended.items()}

    def wake_weights(self) -> None:
        """Nothing to do: this engine never frees its weights."""

    def sleep(self) -> None:
        """Nothing to do: each call frees its own cache."""

    def _wake_cache(self) -> None:
        """Nothing to do: each call allocates its own cache."""

    @torch.no_grad()
    def _score(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        packed = pack([Row(tuple(prompt), (), 0, scored=False) for prompt in prompts], share_prompts=False)
        line = packed.to(self.lm.device)
        hidden = self._hidden(line.input_ids, line.position_ids, packed_segments=line.segments)
        scores = []
        for segment in line.segments:
            targets = line.input_ids[0, segment.start + 1 : segment.end, None]
            logits = self._logits(hidden[0, segment.start : segment.end - 1])
            scores.append(logits.log_softmax(-1).gather(1, targets).squeeze(1).tolist())
        return scores

    def _load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            for _, module, leaf in self._holders[name]:
                if _is_packed(module, leaf):
                    module.load(tensor)
                else:
                    getattr(module, leaf).copy_(tensor)

    def _decode(
        self,
        prompts: list[Sequence[int]],
        temperatures: list[float],
        max_new_tokens: int,
        draws: Tensor,
        pool: RunningPool | None,
    ) -> Iterator[Responses]:
        """Decode one batch of B rows to its end; draws: [B, max_new_tokens] float64, see `uniform` of `_sample`."""
        device = self.lm.device
        check_longest_row(self.lm.config, max(map(len, prompts)) + max_new_tokens)
        ids: list[list[int]] = [[] for _ in prompts]
        log_probs: list[list[float]] = [[] for _ in prompts]
        rows = torch.arange(len(prompts), device=device)  # rows still being decoded
        temperature = torch.tensor(temperatures, device=device)
        prompt_length = torch.tensor([len(prompt) for prompt in prompts], device=device)
        cache = DecodingCache(prompt_length.tolist(), max_new_tokens, device)
        logits = self._logits(self._prefill(prompts, cache, pool))
        for step in range(max_new_tokens):
            token, log_prob = _sample(logits, temperature[rows], draws[rows, step])
            stopped = torch.isin(token, self.stop_ids)
            ended = stopped if step < max_new_tokens - 1 else torch.ones_like(stopped)
            for row, t, lp in zip(rows.tolist(), token.tolist(), log_prob.tolist(), strict=True):
                ids[row].append(t)
                log_probs[row].append(lp)
            truncated = dict(zip(rows[ended].tolist(), (~stopped[ended]).tolist(), strict=True))
            if pool is None:
                if truncated:
                    yield {row: Response(ids[row], log_probs[row], t) for row, t in truncated.items()}
                kept = cache.keep(~ended)
                rows, token = rows[kept], token[kept]
                if not len(rows):
                    return
            hidden = self._step(token, prompt_length[rows] + step, cache)
            if pool is not None:
                pool.add(rows, hidden)
                if truncated:
                    yield {row: Response(ids[row], log_probs[row], t, pool.mean(row)) for row, t in truncated.items()}
                kept = cache.keep(~ended)
                rows, hidden = rows[kept], hidden[kept]
                if not len(rows):
                    return
            logits = self._logits(hidden)

    def _prefill(self, prompts: list[Sequence[int]], cache: DecodingCache, pool: RunningPool | None) -> Tensor:
        """Compute each distinct prompt once, and their common beginning once; return the last hidden states [B,H]."""
        rows = [Row(tuple(prompt), (), 0, scored=False) for prompt in prompts]
        lengths = [len(prompt) for prompt in prompts]
        parts = pack_rows([row.prompt for row in rows], lengths, [0] * len(rows), _PREFILL_TOKENS)
        last_hidden: dict[int, Tensor] = {}
        for part in parts:
            packed = pack([rows[i] for i in part], share_prompts=self.lm.device.type == "cpu")
            # The packed positions of each row's tokens: as pool_start is 0, every token of a row is pooled.
            lines = packed.pool_token.split([lengths[i] for i in part])
            source = torch.stack([F.pad(line, (cache.width - len(line), 0)) for line in lines]).to(self.lm.device)
            cache.expect(torch.tensor(part, device=self.lm.device), source)
            packed = packed.to(self.lm.device)
            hidden = self._hidden(
                packed.input_ids, packed.position_ids, packed_segments=packed.segments, decoding_cache=cache
            )
            last_hidden.update(zip(part, hidden[0, source[:, -1]], strict=True))
            if pool is not None:
                for i, line in zip(part, lines, strict=True):
                    pool.start(i, hidden[0, line.to(self.lm.device)])
        return torch.stack([last_hidden[i] for i in range(len(rows))])

    def _step(self, token: Tensor, position: Tensor, cache: DecodingCache) -> Tensor:
        """Feed one token [B] per row, at its position [B]; return its hidden states [B,H]."""
        cache.length += 1
        return self._hidden(token.unsqueeze(1), position.unsqueeze(1), decoding_cache=cache)[:, -1]

    def _logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits of hidden states."""
        return self._form.logits(self.lm.get_output_embeddings()(hidden).float())

    def _hidden(self, input_ids: Tensor, position_ids: Tensor, **attention: Any) -> Tensor:
        model = self.lm.base_model
        return model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **attention).last_hidden_state


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


def _uniform_draws(seeds: Sequence[int], count: int) -> Tensor:
    """[B, count] float64 in [0,1): `count` numbers from each of B seeds, the same for every device."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.rand(count, dtype=torch.float64, generator=generator) for generator in generators])


def _sample(logits: Tensor, temperature: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token per row, so that rounding hardly ever changes it (other rows in the batch change the rounding).

    Inverting the cumulative distribution of the whole vocabulary has tens of thousands of bin edges, and rounding can
    move a draw across any of them. So only the `_HEAD_TOKENS` likeliest tokens are drawn that way. Where `uniform` lies
    beyond their cumulative probability, the token is drawn among all others by the Gumbel-max trick (`_race`), whose
    result changes only where two candidates are almost equal.

    Args:
        logits: [B,V].
        temperature: [B]; 0 takes the likeliest token.
        uniform: [B] float64 in [0,1); decides the token.

    Returns:
        Tokens [B] int64 and their log-probs [B] float32 under softmax(logits / temperature).
    """
    greedy = temperature == 0
    scaled = logits.float() / torch.where(greedy, torch.ones_like(temperature), temperature).unsqueeze(1)
    log_z = scaled.logsumexp(-1, keepdim=True)
    size = min(_HEAD_TOKENS, scaled.shape[1])
    head, ids = scaled.topk(size)
    sums = (head - log_z).double().exp().cumsum(-1)
    place = torch.searchsorted(sums, uniform.unsqueeze(1), right=True)
    token = ids.gather(1, place.clamp(max=size - 1)).squeeze(1)
    if size < scaled.shape[1]:
        for row in (place.squeeze(1) == size).nonzero().flatten().tolist():
            token[row] = _race(scaled[row], ids[row], float(uniform[row]))
    token = torch.where(greedy, ids[:, 0], token)
    return token, (scaled.gather(1, token.unsqueeze(1)) - log_z).squeeze(1)


def _race(scaled: Tensor, excluded: Tensor, uniform: float) -> Tensor:
    """Draw from softmax(scaled [V]) without the tokens `excluded`: the largest of logits plus Gumbel noise.

    The noise is seeded by `uniform`. Source: the Gumbel-max trick, see Maddison et al. 2014 (arXiv 1411.0030).
    """
    generator = torch.Generator().manual_seed(int(uniform * 2**53))
    noise = torch.rand(len(scaled), dtype=torch.float64, generator=generator).to(scaled.device)
    weights = scaled.double().index_fill(0, excluded, -torch.inf)
    return (weights - (-noise.log()).log()).argmax()

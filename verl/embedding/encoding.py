"""The way of one call's texts to their vectors: stored, or thought about and embedded; kept as they are made."""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from verl.embedding.model import EmbeddingModel
from verl.embedding.prompts import Prompt
from verl.embedding.settings import EmbedderSettings
from verl.embedding.store import EmbeddingStore, Rationale, StoredRationale, row_key
from verl.embedding.usage import Usage
from verl.models.packing import Row
from verl.workers.rollout.base import RolloutError

# Rationales that are waited for before a forward embeds them.
_EMBED_ROWS = 256
_NOTHING = Rationale((), False)


@dataclass(frozen=True)
class Thinking:
    """How the rationales of one call are sampled."""

    max_new_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class Shelf:
    """A store, and the contexts of one model's rationales and vectors in it."""

    store: EmbeddingStore
    rationales: bytes
    vectors: bytes


@dataclass(frozen=True)
class Tools:
    """What every call of an encoder works with."""

    model: EmbeddingModel
    settings: EmbedderSettings
    decode: Callable[[Sequence[int]], str]
    usage: Usage


class Encoding:
    """N different texts as far as they are done.

    Args:
        prompts: of the texts.
        thinking: None embeds the prompts alone.
        shelf: where there is a store.
    """

    def __init__(self, prompts: Sequence[Prompt], thinking: Thinking | None, tools: Tools, shelf: Shelf | None) -> None:
        self.prompts = prompts
        self.thinking = thinking
        self.tools = tools
        self.shelf = shelf
        self.rationales: dict[int, Rationale] = {}
        self.open = set(range(len(prompts)))
        """Rows without a vector."""
        self.means = np.zeros((len(prompts), tools.model.size.hidden), np.float32)
        if shelf:
            self.rationale_keys = [row_key(shelf.rationales, prompt.ids) for prompt in prompts]
            self.vector_keys = [
                row_key(shelf.vectors, key, [prompt.text_start])
                for key, prompt in zip(self.rationale_keys, prompts, strict=True)
            ]

    def run(
        self, batch_size: int, want_rationales: bool, advance: Callable[[int], None]
    ) -> tuple[np.ndarray, list[str]]:
        """Return [N,H] float32 means and, where wanted, N decoded rationales.

        Args:
            advance: told the number of texts that have come as far as their rationale.

        Raises:
            RolloutError: a text got no rationale.
            StoreError: the store cannot be read or written.
        """
        if self.shelf:
            self._take_stored(self.shelf.store, want_rationales)
        waiting: list[int] = []
        for rows in self._thought(batch_size, want_rationales):
            advance(len(rows))
            waiting += [row for row in rows if row in self.open]
            while len(waiting) >= _EMBED_ROWS:
                self._embed(waiting[:_EMBED_ROWS], batch_size)
                waiting = waiting[_EMBED_ROWS:]
        self._embed(waiting, batch_size)
        if self.open:
            raise RolloutError(f"the engine gave no rationale for {len(self.open)} of {len(self.prompts)} texts")
        if self.shelf:
            self.shelf.store.flush()
        self.tools.usage.truncated += sum(rationale.truncated for rationale in self.rationales.values())
        if not want_rationales:
            return self.means, []
        return self.means, [self.tools.decode(self.rationales[row].ids) for row in range(len(self.prompts))]

    def _take_stored(self, store: EmbeddingStore, want_rationales: bool) -> None:
        """Take over vectors, and the rationales of texts that have none."""
        usage = self.tools.usage
        vectors = store.find_vectors(self.vector_keys)
        for row, key in enumerate(self.vector_keys):
            if key in vectors:
                self.means[row] = vectors[key]
                self.open.discard(row)
        usage.vectors_stored += len(self.prompts) - len(self.open)
        if not self.thinking:
            return
        wanted = range(len(self.prompts)) if want_rationales else sorted(self.open)
        found = store.find_rationales([self.rationale_keys[row] for row in wanted])
        for row in wanted:
            if self.rationale_keys[row] in found:
                self.rationales[row] = found[self.rationale_keys[row]]
                usage.rationales_stored += row in self.open

    def _thought(self, batch_size: int, want_rationales: bool) -> Iterator[list[int]]:
        """Rows in the order in which their rationales come; first those that have or need none."""
        every = range(len(self.prompts))
        if not self.thinking:
            self.rationales = dict.fromkeys(every, _NOTHING)
        missing = [row for row in every if row not in self.rationales and (want_rationales or row in self.open)]
        yield sorted(set(every) - set(missing))
        if not missing:
            return
        assert self.thinking
        parts = self.tools.model.think(
            [self.prompts[row].ids for row in missing],
            self.thinking.temperature,
            self.thinking.max_new_tokens,
            [_row_seed(self.thinking.seed, self.prompts[row].ids) for row in missing],
            batch_size,
        )
        start = time.perf_counter()
        for ended in parts:
            self.tools.usage.thinking_s += time.perf_counter() - start
            made = {missing[place]: Rationale(tuple(r.ids), r.truncated) for place, r in ended.items()}
            self._keep(made)
            yield list(made)
            start = time.perf_counter()

    def _keep(self, made: Mapping[int, Rationale]) -> None:
        """Take over new rationales, and store them."""
        for row, rationale in made.items():
            if not rationale.ids:
                raise RolloutError(f"the engine wrote nothing, not even an end token, about {self.prompts[row].text!r}")
        usage = self.tools.usage
        usage.rationales_made += len(made)
        usage.generated_tokens += sum(len(rationale.ids) for rationale in made.values())
        self.rationales |= made
        if self.shelf:
            stored = {
                self.rationale_keys[row]: StoredRationale(r, self.prompts[row].text, self.tools.decode(r.ids))
                for row, r in made.items()
            }
            self.shelf.store.add_rationales(self.shelf.rationales, stored)

    def _embed(self, rows: Sequence[int], batch_size: int) -> None:
        """Fill in the means of rows whose rationales are there, and store them."""
        if not rows:
            return
        start = time.perf_counter()
        packable = [self._row(self.prompts[row], self.rationales[row].ids) for row in rows]
        means = self.tools.model.embed(packable, batch_size)
        self.means[rows] = means
        self.open -= set(rows)
        usage = self.tools.usage
        usage.embedding_s += time.perf_counter() - start
        usage.vectors_made += len(rows)
        usage.forward_tokens += sum(len(row.prompt) + len(row.response) for row in packable)
        if self.shelf:
            stored = {self.vector_keys[row]: mean for row, mean in zip(rows, means, strict=True)}
            self.shelf.store.add_vectors(self.shelf.vectors, stored)

    def _row(self, prompt: Prompt, rationale: tuple[int, ...]) -> Row:
        return Row(tuple(prompt.ids), rationale, self.tools.settings.pool_start(prompt, len(rationale)), scored=False)


def open_shelf(store: EmbeddingStore, sampling: Mapping[str, Any], pooling: Mapping[str, Any]) -> Shelf:
    """The place in `store` of what these settings make; `sampling` names the weights too."""
    rationales = store.open_context(sampling)
    return Shelf(store, rationales, store.open_context({"rationales": sampling, **pooling}))


def _row_seed(seed: int, ids: Sequence[int]) -> int:
    """A seed below 2**56 that follows from the call's seed and the prompt."""
    digest = hashlib.sha256(f"{seed}".encode() + np.array(ids, "<i4").tobytes()).digest()
    return int.from_bytes(digest[:7], "little")

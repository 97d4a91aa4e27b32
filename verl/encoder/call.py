"""The way of one call's texts to their vectors: stored ones are taken over, others are made and stored."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from verl.embedding.prompts import Prompt
from verl.embedding.settings import EmbedderSettings
from verl.encoder.backend import Embedded, EmbeddingModel, Item, Thought, Work
from verl.encoder.processes import ModelPool
from verl.encoder.store import EmbeddingStore, Rationale, StoredRationale, row_key
from verl.encoder.usage import Usage
from verl.workers.rollout.base import RolloutError

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

    model: EmbeddingModel | ModelPool
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
        self.rationales: dict[int, Rationale] = {} if thinking else dict.fromkeys(range(len(prompts)), _NOTHING)
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
            advance: told the number of texts that have got their rationale, or without thinking their vector.

        Raises:
            RolloutError: a text got no rationale.
            StoreError: the store cannot be read or written.
        """
        if self.shelf:
            self._take_stored(self.shelf.store, want_rationales)
        rows = [
            row for row in range(len(self.prompts))
            if row in self.open or (want_rationales and row not in self.rationales)
        ]  # fmt: skip
        advance(len(self.prompts) - len(rows))
        if rows:
            self._make(rows, batch_size, advance)
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

    def _make(self, rows: Sequence[int], batch_size: int, advance: Callable[[int], None]) -> None:
        """Let the model do `rows`, and keep what it makes."""
        thinking = self.thinking or Thinking(0, 0.0, 0)
        items = [
            Item(
                self.prompts[row], _row_seed(thinking.seed, self.prompts[row].ids),
                self.rationales[row].ids if row in self.rationales else None, row in self.open,
            )
            for row in rows
        ]  # fmt: skip
        work = Work(items, self.tools.settings, thinking.max_new_tokens, thinking.temperature, batch_size)
        advance(sum(item.rationale is not None for item in items) if self.thinking else 0)
        for made in self.tools.model.run(work):
            if isinstance(made, Thought):
                self._keep_rationales({rows[place]: response for place, response in made.responses.items()}, made)
                advance(len(made.responses))
            else:
                self._keep_vectors([rows[place] for place in made.places], made)
                advance(0 if self.thinking else len(made.places))

    def _keep_rationales(self, responses: Mapping[int, Any], thought: Thought) -> None:
        made = {row: Rationale(tuple(response.ids), response.truncated) for row, response in responses.items()}
        for row, rationale in made.items():
            if not rationale.ids:
                raise RolloutError(f"the engine wrote nothing, not even an end token, about {self.prompts[row].text!r}")
        usage = self.tools.usage
        usage.thinking_s += thought.seconds
        usage.rationales_made += len(made)
        usage.generated_tokens += sum(len(rationale.ids) for rationale in made.values())
        self.rationales |= made
        if self.shelf:
            stored = {
                self.rationale_keys[row]: StoredRationale(r, self.prompts[row].text, self.tools.decode(r.ids))
                for row, r in made.items()
            }
            self.shelf.store.add_rationales(self.shelf.rationales, stored)

    def _keep_vectors(self, rows: list[int], embedded: Embedded) -> None:
        self.means[rows] = embedded.means
        self.open -= set(rows)
        usage = self.tools.usage
        usage.embedding_s += embedded.seconds
        usage.vectors_made += len(rows)
        usage.forward_tokens += embedded.tokens
        if self.shelf:
            stored = {self.vector_keys[row]: mean for row, mean in zip(rows, embedded.means, strict=True)}
            self.shelf.store.add_vectors(self.shelf.vectors, stored)


def open_shelf(store: EmbeddingStore, sampling: Mapping[str, Any], pooling: Mapping[str, Any]) -> Shelf:
    """The place in `store` of what these settings make; `sampling` names the weights too."""
    rationales = store.open_context(sampling)
    return Shelf(store, rationales, store.open_context({"rationales": sampling, **pooling}))


def _row_seed(seed: int, ids: Sequence[int]) -> int:
    """A seed below 2**56 that follows from the call's seed and the prompt."""
    digest = hashlib.sha256(f"{seed}".encode() + np.array(ids, "<i4").tobytes()).digest()
    return int.from_bytes(digest[:7], "little")

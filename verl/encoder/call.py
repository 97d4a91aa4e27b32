"""One call of an encoder: what is stored is used, everything else is generated, embedded and stored."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from verl.embedding.settings import EmbedderSettings
from verl.encoder.backend import Backend, Batch
from verl.encoder.call_store import CallStore, NoStore
from verl.encoder.processes import ProcessesBackend
from verl.encoder.record import Sampling, TextRecord
from verl.encoder.usage import Usage
from verl.workers.rollout.base import RolloutError


@dataclass(frozen=True)
class EncodeCall:
    """Fills in the records of a call's N different texts."""

    texts: Sequence[TextRecord]
    sampling: Sampling | None
    """None embeds the prompts alone; then every record has an empty rationale from the beginning."""
    want_rationales: bool
    """Whether the caller wants the rationales too, also of texts whose vector is stored."""
    batch_size: int | None
    settings: EmbedderSettings
    backend: Backend | ProcessesBackend
    store: CallStore | NoStore
    usage: Usage
    advance: Callable[[int], None]
    """Called with the number of texts that have just got their rationale; when sampling is None, their vector."""

    def run(self) -> None:
        """Fill in every vector and, where wanted, every rationale.

        Raises:
            RolloutError: a text got no rationale.
            StoreError: the store cannot be read or written.
        """
        self.store.fill_in(self.texts, self.want_rationales)
        self._count_stored()
        unfinished = [text for text in self.texts if self._is_unfinished(text)]
        self.advance(len(self.texts) - len(unfinished))
        if unfinished:
            self._make(unfinished)
        if missing := sum(text.vector is None for text in self.texts):
            raise RolloutError(f"the engine gave no rationale for {missing} of {len(self.texts)} texts")
        self.store.flush()
        self.usage.truncated += sum(text.rationale.truncated for text in self.texts if text.rationale)

    def _is_unfinished(self, text: TextRecord) -> bool:
        return text.vector is None or (self.want_rationales and text.rationale is None)

    def _count_stored(self) -> None:
        without_vector = [text for text in self.texts if text.vector is None]
        self.usage.vectors_stored += len(self.texts) - len(without_vector)
        if self.sampling:
            self.usage.rationales_stored += sum(text.rationale is not None for text in without_vector)

    def _make(self, unfinished: Sequence[TextRecord]) -> None:
        if self.sampling:
            self.advance(sum(text.rationale is not None for text in unfinished))
        for batch in self.backend.run(unfinished, self.settings, self.sampling, self.batch_size):
            if batch.filled == "rationale":
                self._keep_rationales(batch)
            else:
                self._keep_vectors(batch)
            if batch.filled == ("rationale" if self.sampling else "vector"):
                self.advance(len(batch.texts))

    def _keep_rationales(self, batch: Batch) -> None:
        for text in batch.texts:
            if not (text.rationale and text.rationale.ids):
                # The text itself would reach the logs of a server.
                raise RolloutError(f"the engine generated nothing, not even an end token, for text {text.index}")
        self.usage.thinking_s += batch.seconds
        self.usage.rationales_made += len(batch.texts)
        self.usage.generated_tokens += batch.tokens
        self.store.add_rationales(batch.texts)

    def _keep_vectors(self, batch: Batch) -> None:
        self.usage.embedding_s += batch.seconds
        self.usage.vectors_made += len(batch.texts)
        self.usage.forward_tokens += batch.tokens
        self.store.add_vectors(batch.texts)


def row_seed(seed: int, ids: Sequence[int]) -> int:
    """A seed below 2**56 that depends on the call's seed and the prompt only."""
    digest = hashlib.sha256(f"{seed}".encode() + np.array(ids, "<i4").tobytes()).digest()
    return int.from_bytes(digest[:7], "little")

"""The part of a store that one call may use: what was made from the same weights and settings."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from verl.encoder.record import TextRecord
from verl.encoder.store import EmbeddingStore, row_key


class CallStore:
    """Finds and keeps the rationales and vectors of one set of settings.

    Args:
        sampling: everything but the prompt that decides a rationale, the weights included.
        pooling: everything but the rationale that decides a vector.
        decode: the rationale of a record as text.
    """

    def __init__(
        self,
        store: EmbeddingStore,
        sampling: Mapping[str, Any],
        pooling: Mapping[str, Any],
        decode: Callable[[TextRecord], str],
    ) -> None:
        self._store = store
        self._decode = decode
        self._rationales = store.open_context(sampling)
        self._vectors = store.open_context({"rationales": sampling, **pooling})

    def fill_in(self, texts: Sequence[TextRecord], want_rationales: bool) -> None:
        """Fill in stored vectors, and stored rationales where there is no vector or rationales are wanted."""
        vectors = self._store.find_vectors([self._vector_key(text) for text in texts])
        for text in texts:
            text.vector = vectors.get(self._vector_key(text))
        missing = [text for text in texts if text.rationale is None and (want_rationales or text.vector is None)]
        rationales = self._store.find_rationales([self._rationale_key(text) for text in missing])
        for text in missing:
            text.rationale = rationales.get(self._rationale_key(text))

    def add_rationales(self, texts: Sequence[TextRecord]) -> None:
        for text in texts:
            assert text.rationale is not None
            key, decoded = self._rationale_key(text), self._decode(text)
            self._store.add_rationale(self._rationales, key, text.rationale, text.prompt.text, decoded)

    def add_vectors(self, texts: Sequence[TextRecord]) -> None:
        for text in texts:
            assert text.vector is not None
            self._store.add_vector(self._vectors, self._vector_key(text), text.vector)

    def flush(self) -> None:
        self._store.flush()

    def _rationale_key(self, text: TextRecord) -> bytes:
        return row_key(self._rationales, text.prompt.ids)

    def _vector_key(self, text: TextRecord) -> bytes:
        return row_key(self._vectors, self._rationale_key(text), [text.prompt.text_start])


class NoStore:
    """The `CallStore` of an encoder without a store: finds nothing and keeps nothing."""

    def fill_in(self, texts: Sequence[TextRecord], want_rationales: bool) -> None: ...

    def add_rationales(self, texts: Sequence[TextRecord]) -> None: ...

    def add_vectors(self, texts: Sequence[TextRecord]) -> None: ...

    def flush(self) -> None: ...

"""An encoder that any thread may ask, for libraries that call from threads of their own choice."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from verl.encoder.grace_encoder import GraceEncoder
from verl.text_roles import Role


class SharedEncoder:
    """A `GraceEncoder` in a thread of its own, since an encoder and its store belong to the thread that made them.

    Args:
        path: a model folder or hub name.
        encode_options: of `GraceEncoder.encode` in every call, such as think, max_new_tokens and seed.
        options: of `GraceEncoder`.

    Raises:
        As `GraceEncoder`.
    """

    def __init__(self, path: str | Path, encode_options: Mapping[str, Any] | None, options: Mapping[str, Any]) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self._encode_options = dict(encode_options or {})
        self._encoder = self._thread.submit(partial(GraceEncoder, path, **options)).result()

    def submit(self, texts: Sequence[str], role: Role) -> Future[list[list[float]]]:
        """The vectors of N texts as N lists of H numbers, once they are there."""
        return self._thread.submit(self._lists, list(texts), role)

    def close(self) -> None:
        """Close the encoder after the calls that were submitted."""
        self._thread.submit(self._encoder.close).result()
        self._thread.shutdown()

    def _lists(self, texts: list[str], role: Role) -> list[list[float]]:
        return [vector.tolist() for vector in self._encoder.encode(texts, role=role, **self._encode_options)]

"""LlamaIndex's interface of embeddings.

    from verl.encoder.llama_index import GraceEmbedding

    Settings.embed_model = GraceEmbedding("path/to/model", encode_options={"max_new_tokens": 64})

It needs the package llama-index-core.
"""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import PrivateAttr

from verl.encoder.shared import SharedEncoder


class GraceEmbedding(BaseEmbedding):
    """Embeds by a `GraceEncoder`; from any thread or event loop, one call after another.

    Args:
        path: a model folder or hub name.
        encode_options: of `GraceEncoder.encode` in every call, such as think, max_new_tokens and seed.
        embed_batch_size: most texts that LlamaIndex hands over together.
        options: of `GraceEncoder`, such as engine, device and store.

    Raises:
        As `GraceEncoder` and its `encode`.
    """

    _encoder: SharedEncoder = PrivateAttr()

    def __init__(
        self, path: str | Path, encode_options: Mapping[str, Any] | None = None, embed_batch_size: int = 512,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(model_name=str(path), embed_batch_size=embed_batch_size)
        self._encoder = SharedEncoder(path, encode_options, options)

    @classmethod
    def class_name(cls) -> str:
        return "GraceEmbedding"

    def close(self) -> None:
        """End the engine, and flush the store."""
        self._encoder.close()

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._encoder.submit([query], "query").result()[0]

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._encoder.submit(texts, "document").result()

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return (await asyncio.wrap_future(self._encoder.submit([query], "query")))[0]

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return (await self._aget_text_embeddings([text]))[0]

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.wrap_future(self._encoder.submit(texts, "document"))

"""LangChain's interface of embeddings.

    from verl.encoder.langchain import GraceEmbeddings

    store = InMemoryVectorStore(GraceEmbeddings("path/to/model", encode_options={"max_new_tokens": 64}))

It needs the package langchain-core.
"""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from langchain_core.embeddings import Embeddings

from verl.encoder.shared import SharedEncoder


class GraceEmbeddings(Embeddings):
    """Embeds by a `GraceEncoder`; from any thread or event loop, one call after another.

    Args:
        path: a model folder or hub name.
        encode_options: of `GraceEncoder.encode` in every call, such as think, max_new_tokens and seed.
        options: of `GraceEncoder`, such as engine, device and store.

    Raises:
        As `GraceEncoder` and its `encode`.
    """

    def __init__(self, path: str | Path, encode_options: Mapping[str, Any] | None = None, **options: Any) -> None:
        self._encoder = SharedEncoder(path, encode_options, options)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return self._encoder.submit(texts, "document").result()

    def embed_query(self, text: str) -> list[float]:
        return self._encoder.submit([text], "query").result()[0]

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.wrap_future(self._encoder.submit(texts, "document"))

    async def aembed_query(self, text: str) -> list[float]:
        return (await asyncio.wrap_future(self._encoder.submit([text], "query")))[0]

    def close(self) -> None:
        """End the engine, and flush the store."""
        self._encoder.close()

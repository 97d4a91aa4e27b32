"""Reading requests' bodies within bounds: of one, of all together, and of time."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastapi import Request
from starlette.requests import ClientDisconnect

from verl.serve.errors import ApiError


class ClientGoneError(Exception):
    """The client closed its connection before it was answered."""


@dataclass
class Bodies:
    """The bodies of all requests that are not answered yet."""

    most_bytes: int = 16 * 2**20
    """Of one body: 2048 texts of 8 kB."""
    most_in_all: int = 256 * 2**20
    """Bytes of all together, so that memory is bounded however many clients there are."""
    seconds: float = 30.0
    """That a client may take to send its body."""
    held: int = 0
    """Bytes of all together now."""

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The body, which counts as held until the context ends.

        Raises:
            ApiError: 408, 413, 415 or 429.
            ClientGoneError: the client closed its connection.
        """
        _require_json(request)
        if request.headers.get("content-length", "").isdecimal():
            self._check(int(request.headers["content-length"]))
        body = bytearray()
        try:
            await self._read_into(body, request)
            yield bytes(body)
        finally:
            self.held -= len(body)

    async def _read_into(self, body: bytearray, request: Request) -> None:
        try:
            async with asyncio.timeout(self.seconds):
                async for chunk in request.stream():
                    body += chunk
                    self.held += len(chunk)
                    self._check(len(body))
        except TimeoutError:
            raise ApiError(408, f"the body took longer than {self.seconds:g} s", code="slow_body") from None
        except ClientDisconnect:
            raise ClientGoneError from None

    def _check(self, size: int) -> None:
        if size > self.most_bytes:
            raise ApiError(
                413, f"the body is larger than {self.most_bytes / 2**20:g} MiB; send fewer texts in one request",
                code="body_too_large",
            )  # fmt: skip
        if self.held > self.most_in_all:
            raise ApiError(429, "too many large requests at once", code="server_busy", retry_after=5)


def _require_json(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "send the body as JSON, with the header Content-Type: application/json")

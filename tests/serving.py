"""Servers for tests: one in this process, whose parts can be reached, or the program in a process of its own."""

import asyncio
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from verl.serve.__main__ import parse_args
from verl.serve.app import Service
from verl.serve.server import Server, prepare

NAME = "tiny"
ROOT = Path(__file__).parent.parent


def arguments(folder: Path, *more: str) -> list[str]:
    return ["--model", str(folder), "--name", NAME, "--port", "0", "--device", "cpu", "--max_new_tokens", "12", *more]


@contextmanager
def served(folder: Path, *more: str) -> Iterator[tuple[str, Service]]:
    """The address of a server whose model is loaded, and its service."""
    service, listener = prepare(parse_args(arguments(folder, *more)))
    server = Server(service)
    thread = threading.Thread(target=asyncio.run, args=(server.serve([listener]),))
    service.worker.start()
    thread.start()
    try:
        address = "http://{}:{}".format(*listener.getsockname())
        until_loaded(address)
        yield address, service
    finally:
        service.worker.drain()
        thread.join(60)
        assert not thread.is_alive()


@contextmanager
def program(folder: Path, *more: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address of the program in a process of its own, from when it listens."""
    command = [sys.executable, "-m", "verl.serve", *arguments(folder, *more)]
    here = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=here, stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            if found := re.search(r"listening on (\S+);", line):
                break
        yield found[1], process
    finally:
        process.kill()
        process.communicate()


def until_loaded(address: str) -> dict:
    """What /health says when the model is loaded, or cannot be."""
    with httpx.Client(base_url=address) as client:
        while (health := client.get("/health").json())["status"] == "loading":
            threading.Event().wait(0.05)
    return health


def ask(address: str, **fields) -> httpx.Response:
    """An embedding request to the model `NAME`."""
    return httpx.post(f"{address}/v1/embeddings", json={"model": NAME, **fields}, timeout=120)

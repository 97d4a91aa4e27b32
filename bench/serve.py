"""The server under load: python3 bench/serve.py [--what plain thinking] [--requests 128] [--json FILE]

SmolLM2-135M on a CPU, requests of one sentence of examples/ each, over loopback. Clients send their next request when
the last one is answered. The server, without rationales and with rationales of at most 32 tokens, beside a plain loop
over `encode` in one process and, without rationales, beside sentence-transformers with the same prompts behind the same
app and queue. Each work is done by one process at a time, while the others wait. Prints requests/s and the times of a
request at 1, 8 and 32 clients, and the bar: at 32 clients without rationales the server answers at least 3 times as
many requests as the loop.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from common import MODEL, REPO, Comparison, get_model, markdown, write_json

from verl.utils.cpus import waiting_environment

CLIENTS = (1, 8, 32)
NEW_TOKENS = 32
PROMPT_TOKENS = 160
NAME = "bench"
BAR = 1 / 3
OURS, LOOP, THEIRS = "the server", "a loop over encode", "sentence-transformers, same app"
PLAIN, THINKING = "no rationales", f"rationales of at most {NEW_TOKENS} tokens"
WORKS = {"plain": PLAIN, "thinking": THINKING}
FIELDS: dict[str, dict[str, Any]] = {PLAIN: {"think": False}, THINKING: {"max_new_tokens": NEW_TOKENS}}


def sentences(count: int) -> list[str]:
    lines = (REPO / "examples/sentences.txt").read_text().splitlines()
    return [f"{lines[i % len(lines)]} {i // len(lines) or ''}".strip() for i in range(count)]


@contextmanager
def server(command: list[str]) -> Iterator[str]:
    """The address of a server that has loaded its model."""
    here = {**os.environ, **waiting_environment(), "PYTHONPATH": str(REPO)}
    process = subprocess.Popen([sys.executable, *command], cwd=REPO, env=here, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        found = next(filter(None, (re.search(r"listening on (\S+);", line) for line in process.stderr)), None)
        if found is None:
            raise SystemExit(f"{' '.join(command)} ended with exit code {process.wait()}")
        while httpx.get(f"{found[1]}/health").json()["status"] == "loading":
            time.sleep(0.2)
        yield found[1]
    finally:
        process.terminate()
        process.communicate()


def load(address: str, clients: int, texts: list[str], fields: dict[str, Any]) -> tuple[float, list[float]]:
    """Seconds of all requests, and of each."""
    waiting = iter(texts)

    def one_client(_: int) -> list[float]:
        spent = []
        with httpx.Client(base_url=address, timeout=600) as client:
            for text in waiting:
                start = time.perf_counter()
                body = {"model": NAME, "input": text, "encoding_format": "base64", **fields}
                client.post("/v1/embeddings", json=body).raise_for_status()
                spent.append(time.perf_counter() - start)
        return spent

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        each = list(pool.map(one_client, range(clients)))
    return time.perf_counter() - start, [spent for client in each for spent in client]


def loop(texts: list[str], fields: dict[str, Any]) -> tuple[float, list[float]]:
    """The same by one call of `encode` for each text."""
    from verl import GraceEncoder

    encoder = GraceEncoder(MODEL, device="cpu", max_prompt_length=PROMPT_TOKENS, max_new_tokens=NEW_TOKENS)
    encoder.encode(texts[0], think=False)  # warm-up
    spent = []
    for text in texts:
        start = time.perf_counter()
        encoder.encode(text, **fields)
        spent.append(time.perf_counter() - start)
    return sum(spent), spent


class TheirEncoder:
    """sentence-transformers with the same prompts, as far as the server's worker and app use an encoder."""

    engine_reason = "sentence-transformers"
    revision = ""

    def __init__(self) -> None:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

        from verl.embedding.settings import EmbedderSettings
        from verl.encoder.usage import Usage

        module = Transformer(MODEL, model_kwargs={"torch_dtype": "float32"})
        self.embedding_dim = module.get_embedding_dimension()
        self.model = SentenceTransformer(modules=[module, Pooling(self.embedding_dim, "mean")], device="cpu")
        self.model.tokenizer.pad_token = self.model.tokenizer.pad_token or self.model.tokenizer.eos_token
        self.settings, self.usage = EmbedderSettings(), Usage()

    def __enter__(self) -> "TheirEncoder":
        return self

    def __exit__(self, *_: object) -> None: ...

    def warn_of_untrained(self, _: int | None) -> None: ...

    def describe(self, **_: Any) -> dict[str, Any]:
        return {}

    def encode(self, text: str, **_: Any) -> Any:
        return self.encode_in_full([text])

    def encode_in_full(self, texts: list[str], **_: Any) -> list[Any]:
        from verl.embedding.prompts import rationale_messages
        from verl.encoder.record import EncodedText

        prompts = [
            self.model.tokenizer.apply_chat_template(rationale_messages(t), tokenize=False, add_generation_prompt=True)
            for t in texts
        ]
        return [EncodedText(v, "", 0, 0, False) for v in self.model.encode(prompts, batch_size=64)]


def serve_theirs() -> None:
    from verl.serve import server as parts
    from verl.serve.__main__ import parse_args

    parts.GraceEncoder = lambda *_, **__: TheirEncoder()  # type: ignore[assignment, misc]
    raise SystemExit(parts.run_program(parse_args(["--model", MODEL, "--name", NAME, "--port", "0", "--no_thinking"])))


def measure(requests: int, works: list[str]) -> dict[tuple[str, str, int], tuple[float, list[float]]]:
    """Seconds of all and of each request, by work, who does it and clients."""
    texts = sentences(requests)
    found = {}
    for work in works:
        found[work, LOOP, 1] = loop(texts, FIELDS[work])
        print(f"{work}, {LOOP}: {found[work, LOOP, 1][0]:.1f} s", file=sys.stderr, flush=True)
    ours = ["-m", "verl.serve", "--model", MODEL, "--name", NAME, "--port", "0", "--device", "cpu",
            "--max_prompt_length", str(PROMPT_TOKENS), "--max_new_tokens", str(NEW_TOKENS)]  # fmt: skip
    theirs = [__file__, "--serve_theirs"]
    for who, command, served in ((OURS, ours, works), (THEIRS, theirs, [work for work in works if work == PLAIN])):
        if not served:
            continue
        with server(command) as address:
            load(address, 4, texts[:4], FIELDS[PLAIN])  # warm-up
            for work in served:
                for clients in CLIENTS:
                    whole, _ = found[work, who, clients] = load(address, clients, texts, FIELDS[work])
                    print(f"{work}, {who}, {clients} clients: {whole:.1f} s", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--requests", type=int, default=128, help="of each row of the table")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve_theirs", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve_theirs:
        serve_theirs()
    get_model()
    found = measure(args.requests, [WORKS[name] for name in args.what])
    rows = []
    for (work, who, clients), (whole, each) in found.items():
        p50, p95 = statistics.median(each), statistics.quantiles(each, n=20)[-1]
        rows.append([work, who, clients, f"{args.requests / whole:.1f}", f"{p50:.2f}", f"{p95:.2f}"])
    print(markdown(["work", "who", "clients", "requests/s", "p50, s", "p95, s"], rows))
    most, comparisons = CLIENTS[-1], []
    if "plain" in args.what:
        what = f"serving {args.requests} requests of {most} clients, {PLAIN}"
        ours = found[PLAIN, OURS, most][0]
        comparisons = [
            Comparison(what, ours, LOOP, found[PLAIN, LOOP, 1][0], bar=BAR),
            Comparison(what, ours, THEIRS, found[PLAIN, THEIRS, most][0]),
        ]
    write_json(args.json, {"table": rows}, comparisons)


if __name__ == "__main__":
    main()

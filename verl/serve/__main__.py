"""Serve embeddings in OpenAI's form: python3 -m verl.serve --model FOLDER [--host 127.0.0.1 --port 8000]

POST /v1/embeddings, GET /v1/models, /health, /metrics, /openapi.json, and a page to try it at /. Requests that come
together are embedded together. The server listens on this machine alone unless --host says otherwise, which needs a
key (the environment variable GRACE_API_KEY, or --api_key) or --no_auth. SIGTERM or Ctrl-C: what waits is answered, then
it ends with exit code 0; 1: the model was not loaded or its engine died; 2: an argument is wrong. docs/serving.md has
the rest.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from verl.embedding.settings import add_vector_flags
from verl.errors import UserError
from verl.prompt_options import add_system_prompt_flag, add_template_flags
from verl.utils.console import complain
from verl.utils.cpus import let_waiting_threads_sleep

_NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m verl.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="model folder or hub name")
    add("--name", help="what clients call the model; default: as --model")
    add("--host", default="127.0.0.1", help="address to listen on; default: %(default)s")
    add("--port", type=int, default=8000, help="default: %(default)s; 0: any that is free")
    add("--api_key", metavar="KEY", help="what clients must send; safer as the environment variable GRACE_API_KEY")
    add("--no_auth", action="store_true", help="everyone who reaches the server may use it")
    add("--no_thinking", action="store_true", help="no rationales, unless a request says think=true")
    add("--max_batch", type=int, default=64, help="texts embedded together; default: %(default)s")
    add("--max_queue", type=int, default=16384, help="texts that may wait; more get 429; default: %(default)s")
    add("--store", type=Path, help="folder of rationales and vectors to reuse and to add to")
    add("--max_new_tokens", type=int, help="most tokens of a rationale; default: the model's settings")
    add("--max_prompt_length", type=int, help="most tokens of a prompt; default: the model's settings")
    add_system_prompt_flag(parser, "the model's settings")
    add_template_flags(parser, "the model's settings")
    add("--pooling", choices=("mean", "last", "eos"))
    add("--span", choices=("input+rationale", "rationale"))
    add_vector_flags(parser)
    add("--engine", choices=("auto", "hf", "vllm"), default="auto")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto")
    add("--num_processes", type=int, default=1, help="processes that share the work, one per GPU")
    add("--tensor_parallel_size", type=int, default=1, help="vllm: processes that share one engine")
    add(
        "--gpu_memory_utilization", type=float,
        help="vllm: share of a GPU's memory; default: what the model that embeds and its forwards leave, at most 0.8",
    )  # fmt: skip
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        return complain("serve", UserError(f"{', '.join(missing)} is not installed; pip install -e '.[serve]'"))
    let_waiting_threads_sleep()
    # This takes seconds to load, for which a help text and a wrong flag need not wait.
    from verl.serve.server import run_program

    return run_program(args)


if __name__ == "__main__":
    sys.exit(main())

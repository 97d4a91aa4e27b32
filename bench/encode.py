"""Encoding compared with sentence-transformers: python3 bench/encode.py [--rounds 3] [--json FILE]

SmolLM2-135M on sentences of examples/: this project's encoder without rationales and SentenceTransformer.encode of the
same model with mean pooling and the same prompt, in turn in one process; then this encoder with rationales of 32
tokens, each engine in a process of its own. Prints medians over the rounds, and the ratio.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common import markdown, write_json

REPO = Path(__file__).parent.parent
MODEL = str(REPO / "models/SmolLM2-135M-Instruct")
PLAIN_TEXTS = 256
THINKING_TEXTS = 64
NEW_TOKENS = 32
BATCH = 32


def sentences(count: int) -> list[str]:
    return (REPO / "examples/sentences.txt").read_text().splitlines()[:count]


def seconds(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure_plain(rounds: int) -> dict[str, list[float]]:
    """Seconds without rationales, ours and sentence-transformers' in turn."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    from verl import GraceEncoder
    from verl.embedding.prompts import rationale_messages

    ours = GraceEncoder(MODEL, device="cpu")
    module = Transformer(MODEL, model_kwargs={"torch_dtype": "float32"})
    theirs = SentenceTransformer(modules=[module, Pooling(ours.embedding_dim, "mean")], device="cpu")
    theirs.tokenizer.pad_token = theirs.tokenizer.pad_token or theirs.tokenizer.eos_token
    texts = sentences(PLAIN_TEXTS)
    # Both read the same tokens: the rendered prompts, and in a second comparison the bare sentences.
    rendered = [
        ours.tokenizer.apply_chat_template(rationale_messages(text), tokenize=False, add_generation_prompt=True)
        for text in texts
    ]
    work = {
        "ours, no rationales": lambda: ours.encode(texts, think=False, batch_size=BATCH, show_progress_bar=False),
        "sentence-transformers, same prompts": lambda: theirs.encode(rendered, batch_size=BATCH),
        "sentence-transformers, bare sentences": lambda: theirs.encode(texts, batch_size=BATCH),
    }
    for run in work.values():
        run()  # warm-up
    found: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, run in work.items():
            found[name].append(seconds(run))
    return found


def measure_thinking(engine: str, rounds: int) -> dict[str, Any]:
    """Seconds with rationales, and the share of them in which rationales were generated."""
    from verl import GraceEncoder

    texts = sentences(THINKING_TEXTS)
    encoder = GraceEncoder(
        MODEL, device="cpu", engine=engine, max_prompt_length=160, max_new_tokens=NEW_TOKENS, ignore_eos=True
    )
    encoder.encode(texts[:4], show_progress_bar=False)  # starts the engine
    spent = [
        seconds(lambda seed=turn: encoder.encode(texts, seed=seed, show_progress_bar=False)) for turn in range(rounds)
    ]
    return {
        "seconds": spent,
        "thinking_share": encoder.usage.thinking_s / (encoder.usage.thinking_s + encoder.usage.embedding_s),
    }


def in_own_process(what: str, rounds: int) -> Any:
    """Measure in a process of its own, because vllm changes the process that imports it."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, __file__, "--rounds", str(rounds), "--only", what, "--json", file.name]
        env = {"OMP_NUM_THREADS": str(os.cpu_count()), **os.environ}
        subprocess.run(command, check=True, env=env)
        return json.loads(Path(file.name).read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        found = measure_plain(args.rounds) if args.only == "plain" else measure_thinking(args.only, args.rounds)
        args.json.write_text(json.dumps(found))
        return
    subprocess.run([sys.executable, "-m", "verl.get_demo_model"], check=True, cwd=REPO)
    plain = in_own_process("plain", args.rounds)
    engines = ["hf", *(["vllm"] if find_spec("vllm") else [])]
    thinking = {engine: in_own_process(engine, args.rounds) for engine in engines}
    table = []
    for who, spent in plain.items():
        median = statistics.median(spent)
        table.append([f"{PLAIN_TEXTS} texts", who, f"{median:.1f}", f"{PLAIN_TEXTS / median:.1f}", "-"])
    for engine, figures in thinking.items():
        median = statistics.median(figures["seconds"])
        what = f"{THINKING_TEXTS} texts with rationales of {NEW_TOKENS} tokens"
        share = f"{figures['thinking_share']:.0%}"
        table.append([what, engine, f"{median:.1f}", f"{THINKING_TEXTS / median:.1f}", share])
    print(markdown(["work", "who", "seconds, median", "texts/s", "share of generation"], table))
    theirs, ours = (
        statistics.median(plain[name]) for name in ("sentence-transformers, same prompts", "ours, no rationales")
    )
    print(f"\nOn the same prompts {theirs / ours:.2f} times as fast as sentence-transformers.")
    write_json(args.json, {"plain": plain, "thinking": thinking, "ratio": theirs / ours, "table": table})


if __name__ == "__main__":
    main()

"""Encoding compared with sentence-transformers: python3 bench/encode.py [--rounds 3] [--json FILE]

SmolLM2-135M on sentences of examples/: this project's encoder without rationales and SentenceTransformer.encode of the
same model with mean pooling and the same prompt, in turn in one process. Then rationales of 32 tokens, each engine in a
process of its own; in turn with the hf engine, which pools while it decodes, the same engine with a forward over prompt
and rationale afterwards, and transformers' generate with such a forward. Prints medians over the rounds, and ratios.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common import markdown, write_json

from verl.utils.cpus import usable_cpus

REPO = Path(__file__).parent.parent
MODEL = str(REPO / "models/SmolLM2-135M-Instruct")
PLAIN_TEXTS = 256
THINKING_TEXTS = 64
NEW_TOKENS = 32
BATCH = 32
AFTERWARDS = "hf without pooling, then a forward"
PLAIN = "transformers' generate, then a forward"
# How many times as fast pooling while decoding is to be as a forward afterwards.
BAR = 1.7


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


def measure_thinking(engine: str, rounds: int) -> dict[str, list[float]]:
    """Seconds with rationales; with hf in turn with two ways that run the model over every rationale once more."""
    from verl import GraceEncoder

    texts = sentences(THINKING_TEXTS)
    encoder = GraceEncoder(
        MODEL, device="cpu", engine=engine, max_prompt_length=160, max_new_tokens=NEW_TOKENS, ignore_eos=True
    )
    encoder.encode(texts[:4], show_progress_bar=False)  # starts the engine
    work = {engine: lambda seed: encoder.encode(texts, seed=seed, show_progress_bar=False)}
    if engine == "hf":
        work |= {AFTERWARDS: partial(embed_afterwards, encoder, texts), PLAIN: partial(PlainEncoder().encode, texts)}
    found: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(rounds):
        for name, run in work.items():
            found[name].append(seconds(lambda run=run, seed=turn: run(seed)))
    return found


def embed_afterwards(encoder: Any, texts: list[str], seed: int) -> None:
    """Generate with the encoder's engine without pooling, then embed by the policy's forward."""
    from verl.embedding.prompts import rationale_messages
    from verl.models.packing import Row
    from verl.workers.rollout.base import finish, row_seeds

    prompts = encoder.renderer.render([rationale_messages(text) for text in texts])
    ids = [prompt.ids for prompt in prompts]
    responses = finish(encoder.backend.generate(ids, 1.0, NEW_TOKENS, row_seeds(seed, len(texts)), THINKING_TEXTS))
    starts = [encoder.settings.pool_start(prompt, has_rationale=True) for prompt in prompts]
    rows = [Row(tuple(p), tuple(r.ids), start, False) for p, r, start in zip(ids, responses, starts, strict=True)]
    encoder.backend.embed(rows, THINKING_TEXTS)


class PlainEncoder:
    """transformers alone, as one would write it: padded batches, `generate`, a forward without the head, the mean."""

    def __init__(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token

    def encode(self, texts: list[str], seed: int) -> list[Any]:
        import torch

        from verl.embedding.prompts import rationale_messages

        torch.manual_seed(seed)
        chats = [rationale_messages(text) for text in sorted(texts, key=len)]
        means = []
        for start in range(0, len(chats), BATCH):
            batch = self.tokenizer.apply_chat_template(
                chats[start : start + BATCH], add_generation_prompt=True, padding=True, return_dict=True,
                return_tensors="pt",
            )  # fmt: skip
            with torch.no_grad():
                rows = self.model.generate(
                    **batch, do_sample=True, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS
                )
                prompt_mask = batch["attention_mask"]
                mask = torch.cat([prompt_mask, prompt_mask.new_ones(len(rows), NEW_TOKENS)], dim=1)
                hidden = self.model.model(input_ids=rows, attention_mask=mask).last_hidden_state
            weights = mask.unsqueeze(2)
            means.append((hidden * weights).sum(1) / weights.sum(1))
        return means


def in_own_process(what: str, rounds: int) -> Any:
    """Measure in a process of its own, because vllm changes the process that imports it."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, __file__, "--rounds", str(rounds), "--only", what, "--json", file.name]
        env = {"OMP_NUM_THREADS": str(usable_cpus()), **os.environ}
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
    thinking: dict[str, list[float]] = {}
    for engine in engines:
        thinking |= in_own_process(engine, args.rounds)
    table = []
    for who, spent in plain.items():
        median = statistics.median(spent)
        table.append([f"{PLAIN_TEXTS} texts", who, f"{median:.1f}", f"{PLAIN_TEXTS / median:.1f}"])
    for who, spent in thinking.items():
        median = statistics.median(spent)
        what = f"{THINKING_TEXTS} texts with rationales of {NEW_TOKENS} tokens"
        table.append([what, who, f"{median:.1f}", f"{THINKING_TEXTS / median:.1f}"])
    print(markdown(["work", "who", "seconds, median", "texts/s"], table))
    theirs, ours = (
        statistics.median(plain[name]) for name in ("sentence-transformers, same prompts", "ours, no rationales")
    )
    print(f"\nOn the same prompts {theirs / ours:.2f} times as fast as sentence-transformers.")
    pooling, afterwards, plainly = (statistics.median(thinking[name]) for name in ("hf", AFTERWARDS, PLAIN))
    print(
        f"With rationales the hf engine is {afterwards / pooling:.2f} times as fast as with a forward afterwards "
        f"(the bar: {BAR}), and {plainly / pooling:.2f} times as fast as transformers' generate with one."
    )
    write_json(args.json, {"plain": plain, "thinking": thinking, "ratio": theirs / ours, "table": table})


if __name__ == "__main__":
    main()

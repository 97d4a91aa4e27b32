"""Encoding compared with what else people use.

    python3 bench/encode.py [--rounds 3] [--what plain thinking] [--engines hf vllm] [--json FILE]
    python3 bench/encode.py --what thinking --engines hf --texts 1000 --rounds 1

SmolLM2-135M on texts of examples/. plain: this project's encoder without rationales and SentenceTransformer.encode of
the same model with mean pooling and the same prompt, in turn in one process. thinking: rationales of 32 tokens, each
engine in a process of its own; in turn with the hf engine, which pools while it decodes, transformers' generate with a
forward over prompt and rationale afterwards. With --before, another checkout's hf engine takes turns with this one's.
Prints medians over the rounds, and which bars are met.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from common import (
    MODEL,
    REPO,
    Comparison,
    EncoderProcess,
    example_texts,
    get_model,
    installed_engines,
    markdown,
    seconds,
    write_json,
)
from floor import distinct_tokens, flop_of_a_token, peak_rate

from verl.utils.cpus import usable_cpus, waiting_environment

PLAIN_TEXTS = 128
THINKING_TEXTS = 64
NEW_TOKENS = 32
BATCH = 32
SAME_PROMPTS, OURS = "sentence-transformers, same prompts", "ours, no rationales"
GENERATE = "transformers' generate, then a forward"
# What encoding without rationales may take of sentence-transformers' time, and with them of generate's and of what it
# took before the engine pooled while it decodes.
BARS = {SAME_PROMPTS: 1 / 0.9, GENERATE: 1 / 5, "before": 1 / 1.7}


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
    texts = example_texts(PLAIN_TEXTS)
    # Both read the same tokens: the rendered prompts, and in a second comparison the bare sentences.
    rendered = [
        ours.tokenizer.apply_chat_template(rationale_messages(text), tokenize=False, add_generation_prompt=True)
        for text in texts
    ]
    work = {
        OURS: lambda: ours.encode(texts, think=False, batch_size=BATCH, show_progress_bar=False),
        SAME_PROMPTS: lambda: theirs.encode(rendered, batch_size=BATCH),
        "sentence-transformers, bare sentences": lambda: theirs.encode(texts, batch_size=BATCH),
    }
    ours.encode(texts[:BATCH], think=False, show_progress_bar=False)  # warm-up
    theirs.encode(rendered[:BATCH])
    found: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, run in work.items():
            found[name].append(seconds(run))
    return found


def measure_thinking(engine: str, count: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of `count` texts with rationales; with hf in turn with transformers' generate and a forward."""
    from verl import GraceEncoder

    texts = example_texts(count)
    encoder = GraceEncoder(
        MODEL, device="cpu", engine=engine, max_prompt_length=160, max_new_tokens=NEW_TOKENS, ignore_eos=True
    )
    encoder.encode(texts[:4], show_progress_bar=False)  # starts the engine
    found: dict[str, list[float]] = {engine: [], **({GENERATE: []} if engine == "hf" else {})}
    rival = PlainEncoder() if engine == "hf" else None
    for turn in range(rounds):
        found[engine].append(seconds(lambda seed=turn: encoder.encode(texts, seed=seed, show_progress_bar=False)))
        if rival:
            found[GENERATE].append(seconds(lambda seed=turn: rival.encode(texts, seed)))
    return found


def measure_before(checkout: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds with rationales by this checkout and by another one, which waits as OpenMP does when nothing is set."""
    sides = {
        "hf": EncoderProcess(THINKING_TEXTS, NEW_TOKENS),
        "before": EncoderProcess(THINKING_TEXTS, NEW_TOKENS, checkout=checkout, waiting={"GOMP_SPINCOUNT": "300000"}),
    }
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name, side in sides.items():
            found[name].append(side.seconds(turn))
    for side in sides.values():
        side.close()
    return found


def flop(count: int, new_tokens: int) -> float:
    """FLOP of the matrix products of encoding example sentences: of their distinct tokens."""
    from verl.embedding.prompts import PromptRenderer, rationale_messages
    from verl.utils.tokenizer import load_tokenizer

    renderer = PromptRenderer(load_tokenizer(str(REPO / MODEL)), 160)
    prompts = [prompt.ids for prompt in renderer.render([rationale_messages(text) for text in example_texts(count)])]
    body, head = flop_of_a_token()
    return distinct_tokens(prompts, new_tokens) * body + count * new_tokens * head


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


def in_own_process(what: str, texts: int, rounds: int) -> Any:
    """Measure in a process of its own, because vllm changes the process that imports it."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, __file__, "--rounds", str(rounds), "--texts", str(texts), "--only", what]
        env = {"OMP_NUM_THREADS": str(usable_cpus()), **waiting_environment(), **os.environ}
        subprocess.run([*command, "--json", file.name], check=True, env=env, cwd=REPO)
        return json.loads(Path(file.name).read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--what", nargs="+", choices=("plain", "thinking"), default=["plain", "thinking"])
    parser.add_argument("--engines", nargs="+", choices=("hf", "vllm"), default=installed_engines())
    parser.add_argument("--texts", type=int, default=THINKING_TEXTS, help="texts with rationales")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="another checkout, to compare with")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        measure = measure_plain if args.only == "plain" else partial(measure_thinking, args.only, args.texts)
        args.json.write_text(json.dumps(measure(args.rounds)))
        return
    example_texts(args.texts)  # that there are so many is known before anything is measured
    get_model()
    rate = peak_rate()
    found: dict[str, dict[str, list[float]]] = {}
    floors = {}
    if "plain" in args.what:
        work = f"{PLAIN_TEXTS} texts"
        found[work] = in_own_process("plain", args.texts, args.rounds)
        floors[work] = flop(PLAIN_TEXTS, 0) / rate
    if "thinking" in args.what:
        work = f"{args.texts:,} texts with rationales of {NEW_TOKENS} tokens"
        found[work], floors[work] = {}, flop(args.texts, NEW_TOKENS) / rate
        for engine in args.engines:
            found[work] |= in_own_process(engine, args.texts, args.rounds)
    if args.before:
        found[f"{THINKING_TEXTS} texts in turns"] = measure_before(args.before.resolve(), args.rounds)
    table, comparisons = [], []
    for what, sides in found.items():
        medians = {who: statistics.median(spent) for who, spent in sides.items()}
        count = int(what.split()[0].replace(",", ""))
        table += [[what, who, f"{median:.1f}", f"{count / median:.1f}"] for who, median in medians.items()]
        for other in [who for who in medians if who in BARS]:
            mine = medians.get("hf") or medians[OURS]
            comparisons.append(
                Comparison(f"encoding {what}", mine, other, medians[other], floors.get(what), BARS[other])
            )
    print(markdown(["work", "who", "seconds, median", "texts/s"], table))
    write_json(args.json, {"seconds": found, "table": table}, comparisons)


if __name__ == "__main__":
    main()

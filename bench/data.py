"""Time and memory of the data programs on synthetic texts and triplets.

    python3 bench/data.py --lines 200000 --json data_bench.json

The peak is that of the largest single process; the filter runs several at once. The floors are the tokenizer alone, in
Rust on all CPUs: on the whole prompts of the training file, and on what is left of them without the constant start that
the filter leaves out too. The filter's time also has its start, reading, checks, writing and the validation file.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from common import Comparison, markdown, write_json
from tokenizers import Tokenizer

from verl.embedding.constant_start import constant_start
from verl.embedding.prompts import PromptRenderer, rationale_messages
from verl.utils.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "models/SmolLM2-135M-Instruct"
FLOOR_BATCH = 10_000
MODES = ("unsupervised", "supervised")
# Times the floor of whole prompts that the filter may take.
BAR = 1.3


def sentences(num: int, seed: int) -> Iterator[str]:
    """Texts of 5 to 40 words, whose frequencies follow Zipf's law as those of a language do."""
    rng = random.Random(seed)
    syllables = [a + b for a in "bdfglmnprstv" for b in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(30_000)]
    cumulative = [0.0]
    for rank in range(1, len(words)):
        cumulative.append(cumulative[-1] + 1 / rank)
    for _ in range(num):
        yield " ".join(rng.choices(words, cum_weights=cumulative, k=rng.randint(5, 40))) + "."


def write_inputs(folder: Path, num_lines: int, num_triplets: int) -> tuple[Path, Path]:
    texts, triplets = folder / "texts.txt", folder / "triplets.jsonl"
    with texts.open("w") as file:
        file.writelines(f"{text}\n" for text in sentences(num_lines, 0))
    names = ("query", "positive", "negative")
    columns = [sentences(num_triplets, seed) for seed in (1, 2, 3)]
    with triplets.open("w") as file:
        for row in zip(*columns, strict=True):
            file.write(json.dumps(dict(zip(names, row, strict=True))) + "\n")
    return texts, triplets


def measure(name: str, num_lines: int, argv: list[object]) -> dict[str, Any]:
    """Run one program; its seconds, lines per second and peak memory."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, argv)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{name} failed with exit code {process.returncode}")
    return as_result(name, num_lines, seconds, round(usage.ru_maxrss / 1024))


def as_result(name: str, num_lines: int, seconds: float, peak_mb: int | str) -> dict[str, Any]:
    return {
        "name": name,
        "lines": num_lines,
        "seconds": round(seconds, 2),
        "lines_per_s": round(num_lines / seconds),
        "peak_mb": peak_mb,
    }


def measure_floors(mode: str, parquet: Path, tokenizer_path: Path) -> list[dict[str, Any]]:
    """Seconds of tokenizing all prompts of a file, whole and without their start; no reading, rendering or writing."""
    renderer = PromptRenderer(load_tokenizer(str(tokenizer_path)))
    rows = pq.read_table(parquet).to_pylist()
    chats = [row["prompt"] for row in rows]
    if mode == "supervised":
        texts = [
            text for row in rows for text in (row["multi_input"]["query"], row["multi_input"]["negative_document"])
        ]
        chats += [rationale_messages(text) for text in texts]
    backend = renderer.tokenizer.backend_tokenizer
    prefix, suffix = renderer.frame(chats[0])
    results = []
    for what, first in (("whole", 0), ("without start", constant_start(backend, prefix, suffix)[0])):
        prompts = [prefix[first:] + chat[-1]["content"] + suffix for chat in chats]
        seconds = time_tokenizer(backend, prompts)
        results.append(as_result(f"floor {mode}, {what}", len(rows), seconds, "-"))
    return results


def filter_beside_floor(results: list[dict[str, Any]], mode: str) -> Comparison:
    """The filter's seconds, and those of tokenizing the training file's whole prompts."""
    found = {result["name"]: result for result in results}
    program, floor = found[f"filter {mode}"], found[f"floor {mode}, whole"]
    what = f"the length filter, {program['lines']:,} {mode} lines"
    return Comparison(what, program["seconds"], floor=floor["seconds"], bar=BAR)


def time_tokenizer(backend: Tokenizer, prompts: list[str]) -> float:
    start = time.perf_counter()
    for first in range(0, len(prompts), FLOOR_BATCH):
        backend.encode_batch_fast(prompts[first : first + FLOOR_BATCH], add_special_tokens=False)
    return time.perf_counter() - start


def run_all(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    texts, triplets = write_inputs(folder, args.lines, args.triplets)
    inputs = [("unsupervised", texts, args.lines), ("supervised", triplets, args.triplets)]
    results = []
    for mode, path, num in inputs:
        flags = ["--mode", mode, "--input_file", path, "--local_dir", folder / mode]
        results.append(measure(f"process_data {mode}", num, [ROOT / "process_data.py", *flags]))
    for mode, _, num in inputs:
        flags = ["--train_parquet", folder / mode / "train.parquet", "--out_dir", folder / f"{mode}_filtered"]
        flags += ["--val_parquet", folder / mode / "test.parquet", "--tokenizer_path", args.tokenizer]
        results.append(measure(f"filter {mode}", num, [ROOT / "offline_filter_data.py", *flags]))
    # Last: a child's peak begins with the memory that this process has when it starts it.
    for mode, _, _ in inputs:
        results += measure_floors(mode, folder / mode / "train.parquet", args.tokenizer)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=200_000)
    parser.add_argument("--triplets", type=int, help="default: a quarter of --lines")
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER)
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    args.triplets = args.triplets or args.lines // 4
    with tempfile.TemporaryDirectory() as folder:
        results = run_all(Path(folder), args)
    rows = [[r["name"], f"{r['lines']:,}", r["seconds"], f"{r['lines_per_s']:,}", r["peak_mb"]] for r in results]
    print(markdown(["program", "lines", "seconds", "lines/s", "peak MB"], rows))
    write_json(args.json, {"results": results}, [filter_beside_floor(results, mode) for mode in MODES])


if __name__ == "__main__":
    main()

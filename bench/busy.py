"""A training step and encoding beside busy processes, by how threads wait for each other.

    python3 bench/busy.py [--busy 0 1 2 4] [--rounds 2] [--engine hf] [--json FILE]

While one thread of a parallel loop is not scheduled, the others wait for it: by spinning, which takes the CPU from the
thread that they wait for, or asleep. For each number of busy processes (loops without an end), and for each way of
waiting in turn: the seconds of encoding 48 texts with rationales of 8 tokens, and of a training step on 4 triplets x 4
rationales x 16 tokens. Medians over the rounds, and over the steps after the second.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import MODEL, REPO, markdown, prepare_data, train, write_json

# The first is what OpenMP does when nothing is set.
WAITING = ["GOMP_SPINCOUNT=300000", "GOMP_SPINCOUNT=10000", "GOMP_SPINCOUNT=1000", "OMP_WAIT_POLICY=passive"]
SHAPE, STEPS = (4, 4, 16), 3
ENCODE = f"""
import sys, time
from verl import GraceEncoder
texts = [f"a sentence about thing number {{n}}" for n in range(48)]
encoder = GraceEncoder({MODEL!r}, device="cpu", engine=sys.argv[1], max_new_tokens=8, ignore_eos=True)
for seed in range(3):
    start = time.perf_counter()
    encoder.encode(texts, seed=seed, show_progress_bar=False)
    spent = time.perf_counter() - start
print(spent)
"""


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def seconds(engine: str, train_file: Path, waiting: str) -> tuple[float, float]:
    """Seconds of encoding, and of a training step."""
    name, value = waiting.split("=")
    os.environ[name] = value
    try:
        command = [sys.executable, "-c", ENCODE, engine]
        done = subprocess.run(command, check=True, cwd=REPO, stdout=subprocess.PIPE, text=True)
        with tempfile.TemporaryDirectory() as out:
            engine_key = f"actor_rollout_ref.rollout.name={engine}"
            steps = train(train_file, Path(out), SHAPE, STEPS, engine_key, warm_up=2)
    finally:
        del os.environ[name]
    return float(done.stdout.split()[-1]), statistics.median(step["wall_s"] for step in steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--waiting", nargs="+", default=WAITING, metavar="NAME=VALUE")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--engine", choices=("hf", "vllm"), default="hf")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        train_file = prepare_data(Path(folder))
        for count in args.busy:
            with busy_processes(count):
                for _ in range(args.rounds):
                    for waiting in args.waiting:
                        found.setdefault(f"{count} {waiting}", []).append(seconds(args.engine, train_file, waiting))
                        print(f"{count} busy, {waiting}: {found[f'{count} {waiting}'][-1]}", file=sys.stderr)
    table = []
    for key, measured in found.items():
        encoding, step = (statistics.median(column) for column in zip(*measured, strict=True))
        table.append([*key.split(), f"{encoding:.1f}", f"{step:.1f}"])
    print(markdown(["busy processes", "waiting", "encoding, s", "a step, s"], table))
    write_json(args.json, {"seconds": found, "table": table})


if __name__ == "__main__":
    main()

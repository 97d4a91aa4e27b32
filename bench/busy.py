"""A training step and encoding beside busy processes, by how threads wait for each other.

    python3 bench/busy.py [--busy 0 1 2 4] [--rounds 5] [--what encoding step] [--engine hf] [--json FILE]

While one thread of a parallel loop is not scheduled, the others wait for it: by spinning, which takes the CPU from the
thread that they wait for, or asleep. For each number of busy processes (loops without an end), and for each way of
waiting in turn: the seconds of encoding 48 texts with rationales of 8 tokens, by processes that live as long as the
benchmark, and of a training step on 4 triplets x 4 rationales x 16 tokens, in a run of its own. Medians over the
rounds, and over the steps after the second.
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

from common import Comparison, EncoderProcess, markdown, prepare_data, spread, train, write_json

from verl.utils.cpus import waiting_environment

OWN = ",".join(f"{name}={value}" for name, value in waiting_environment().items())
# The first is what OpenMP does when nothing is set, the second what this project's programs set.
WAITING = ["GOMP_SPINCOUNT=300000", OWN, "GOMP_SPINCOUNT=10000", "OMP_WAIT_POLICY=passive"]
TEXTS, NEW_TOKENS = 48, 8
SHAPE, STEPS = (4, 4, 16), 3
# What a step beside two busy processes may take of the quiet one.
BAR = 2.5


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def variables(waiting: str) -> dict[str, str]:
    return dict(item.split("=") for item in waiting.split(","))


def step_seconds(engine: str, train_file: Path, waiting: str) -> float:
    before = dict(os.environ)
    os.environ.update(variables(waiting))
    try:
        with tempfile.TemporaryDirectory() as out:
            engine_key = f"actor_rollout_ref.rollout.name={engine}"
            steps = train(train_file, Path(out), SHAPE, STEPS, engine_key, warm_up=2)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return statistics.median(step["wall_s"] for step in steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--waiting", nargs="+", default=WAITING, metavar="NAME=VALUE[,NAME=VALUE]")
    parser.add_argument("--what", nargs="+", choices=("encoding", "step"), default=["encoding", "step"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engine", choices=("hf", "vllm"), default="hf")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[str, list[float]] = {}  # by "what|busy processes|waiting"
    with tempfile.TemporaryDirectory() as folder:
        train_file = prepare_data(Path(folder))
        encoders = {}
        if "encoding" in args.what:
            encoders = {w: EncoderProcess(TEXTS, NEW_TOKENS, args.engine, waiting=variables(w)) for w in args.waiting}
        for count in args.busy:
            with busy_processes(count):
                for turn in range(args.rounds):
                    # Every other round in the opposite order: what drifts with time hits all alike.
                    for waiting in args.waiting[:: 1 if turn % 2 == 0 else -1]:
                        for what in args.what:
                            spent = (
                                encoders[waiting].seconds(turn)
                                if what == "encoding"
                                else step_seconds(args.engine, train_file, waiting)
                            )
                            found.setdefault(f"{what}|{count}|{waiting}", []).append(spent)
                            print(f"{what}, {count} busy, {waiting}: {spent:.2f}", file=sys.stderr)
        for encoder in encoders.values():
            encoder.close()
    table = [[*key.split("|"), spread(values)] for key, values in found.items()]
    print(markdown(["what", "busy processes", "waiting", "seconds, median (min to max)"], table))
    quiet, busy = (found.get(f"step|{count}|{OWN}") for count in (0, 2))
    comparisons = []
    if quiet and busy:
        medians = (statistics.median(busy), statistics.median(quiet))
        comparisons = [
            Comparison("a training step beside 2 busy processes", medians[0], "it alone", medians[1], bar=BAR)
        ]
    write_json(args.json, {"seconds": found, "table": table}, comparisons)


if __name__ == "__main__":
    main()

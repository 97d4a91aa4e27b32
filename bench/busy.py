"""A training step and encoding beside busy processes, by how threads wait for each other.

    python3 bench/busy.py [--busy 0 1 2 4] [--engines hf vllm] [--what encoding step] [--rounds 5] [--json FILE]
    python3 bench/busy.py --what step --engines hf vllm --waiting own --rounds 1

While one thread of a parallel loop is not scheduled, the others wait for it: by spinning, which takes the CPU from the
thread that they wait for, or asleep. For each number of busy processes (loops without an end), and for each engine and
way of waiting in turn: the seconds of encoding 48 texts with rationales of 8 tokens, by processes that live as long as
the benchmark, and of a training step, in a run of its own. Medians over the rounds, and over the steps after the
second. The bar compares the steps beside two busy processes with the quiet ones, as this project's programs wait.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from common import (
    ALONE,
    Comparison,
    EncoderProcess,
    installed_engines,
    markdown,
    prepare_data,
    spread,
    train,
    write_json,
)

from verl.utils.cpus import waiting_environment

# What this project's programs set.
OWN = ",".join(f"{name}={value}" for name, value in waiting_environment().items())
# The first is what OpenMP does when nothing is set.
WAITING = ["GOMP_SPINCOUNT=300000", "own", "GOMP_SPINCOUNT=10000", "OMP_WAIT_POLICY=passive"]
TEXTS, NEW_TOKENS = 48, 8
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


def shape_of(text: str) -> tuple[int, int, int]:
    triplets, n, tokens = map(int, text.split("x"))
    return triplets, n, tokens


def step_seconds(engine: str, train_file: Path, waiting: str, shape: tuple[int, int, int], count: int) -> float:
    """The median of `count` steps after the second one."""
    before = dict(os.environ)
    os.environ.update(variables(waiting))
    try:
        with tempfile.TemporaryDirectory() as out:
            engine_key = f"actor_rollout_ref.rollout.name={engine}"
            steps = train(train_file, Path(out), shape, count, engine_key, warm_up=2)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return statistics.median(step["wall_s"] for step in steps)


def measure(args: argparse.Namespace) -> dict[tuple[str, str, int, str], list[float]]:
    """The seconds of every round, by what is done, engine, number of busy processes and way of waiting."""
    found: dict[tuple[str, str, int, str], list[float]] = {}
    with ExitStack() as stack:
        train_file = prepare_data(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        cases = [(what, engine, waiting) for waiting in args.waiting for engine in args.engines for what in args.what]
        encoders = {}
        for case in cases:
            what, engine, waiting = case
            if what == "encoding":
                encoders[case] = EncoderProcess(TEXTS, NEW_TOKENS, engine, waiting=variables(waiting))
                stack.callback(encoders[case].close)
        for count in args.busy:
            with busy_processes(count):
                for turn in range(args.rounds):
                    # Every other round in the opposite order: what drifts with time hits all alike.
                    for what, engine, waiting in cases[:: 1 if turn % 2 == 0 else -1]:
                        spent = (
                            encoders[what, engine, waiting].seconds(turn)
                            if what == "encoding"
                            else step_seconds(engine, train_file, waiting, args.shape, args.steps)
                        )
                        found.setdefault((what, engine, count, waiting), []).append(spent)
                        print(f"{what}, {engine}, {count} busy, {waiting}: {spent:.2f}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument(
        "--waiting", nargs="+", default=WAITING, metavar="NAME=VALUE[,NAME=VALUE]", help=f"`own` is {OWN}"
    )
    parser.add_argument("--what", nargs="+", choices=("encoding", "step"), default=["encoding", "step"])
    parser.add_argument("--shape", type=shape_of, default="4x4x16", help="of a step: triplets x rationales x tokens")
    parser.add_argument("--steps", type=int, default=3, help="counted steps of a run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engines", nargs="+", choices=("hf", "vllm"), default=installed_engines())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.waiting = [OWN if waiting == "own" else waiting for waiting in args.waiting]
    found = measure(args)
    # Beside the quiet one of the same row.
    quiet = {(what, engine, waiting): values for (what, engine, count, waiting), values in found.items() if not count}
    table, comparisons = [], []
    for (what, engine, count, waiting), values in found.items():
        alone = quiet.get((what, engine, waiting))
        times = f"{statistics.median(values) / statistics.median(alone):.2f}" if alone else "-"
        table.append([what, engine, count, waiting, spread(values), times])
        if alone and (what, count, waiting) == ("step", 2, OWN):
            size = "{} triplets x {} x {} tokens".format(*args.shape)
            name = f"a training step, {size}, {engine}, beside 2 busy processes"
            medians = (statistics.median(values), statistics.median(alone))
            comparisons.append(Comparison(name, medians[0], ALONE, medians[1], bar=BAR))
    head = ["what", "engine", "busy processes", "waiting", "seconds, median (min to max)", "times the quiet one"]
    print(markdown(head, table))
    write_json(
        args.json, {"seconds": {"|".join(map(str, key)): v for key, v in found.items()}, "table": table}, comparisons
    )


if __name__ == "__main__":
    main()

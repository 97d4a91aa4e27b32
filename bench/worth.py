"""Does it pay? Rationales and GRACE's policy gradient against no rationale, plain contrastive fine-tuning and others.

    python3 bench/worth.py --plan [--short]                  what would be done, and how long it takes
    python3 bench/worth.py --short                           one seed, small tasks, two minutes of training a row
    python3 bench/worth.py --data DIR                        the full form, hours
    python3 bench/worth.py --data DIR --rows grace joint     these rows of it beside model and baseline
    python3 bench/worth.py --data DIR --recipes all          the recipes of bench/comparison/rows.py, on dev alone
    python3 bench/worth.py --data DIR --recipes A B --steps 50 200 --seeds 3    after so many steps, the last on test

Trains and scores every row for the same seconds on the same texts, on the CPU; chooses on a dev part and shows the test
part once. Every finished part is kept in --out and not done again, so a run may be killed at any moment; a part with
another setting is another part. Writes table.md, result.json and two pictures there, or recipes.json and, after several
numbers of steps, a picture. How to read them: docs/experiments.md. It needs `pip install -e '.[bench,eval]'`.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from common import REPO

from verl.utils.cpus import let_waiting_threads_sleep


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=REPO / "examples", help="folder, see bench/comparison/data.py")
    parser.add_argument("--out", type=Path, help="default: bench_results/worth, or worth_short")
    parser.add_argument("--short", action="store_true", help="everything in small")
    parser.add_argument("--plan", action="store_true", help="print the plan and stop")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="train these of the rows; default: all")
    parser.add_argument("--recipes", nargs="*", metavar="NAME", help="train these instead of the rows; all = every one")
    parser.add_argument("--seconds", type=float, help="of training steps, for every row")
    parser.add_argument("--steps", type=int, nargs="+", help="of training, for every recipe, in place of the seconds")
    parser.add_argument("--seeds", type=int, help="training seeds; 1 for recipes")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    # Both before torch is loaded. Every row is trained and scored on the CPU, as the baseline is.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    let_waiting_threads_sleep()
    from comparison.program import run_program

    return run_program(args)


if __name__ == "__main__":
    # As Ctrl-C does it: a training that was started ends too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())

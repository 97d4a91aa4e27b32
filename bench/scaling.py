"""Step time by number of triplets, rationales, tokens and processes.

    python3 bench/scaling.py [--steps 2] [--shapes 4x4x48 ...] [--json FILE]

One setting is changed at a time, from 4 triplets x 4 rationales x 48 tokens in one process. Where the time of a step is
proportional to its tokens, every row of the table has the same time per token.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from common import markdown, prepare_data, train, write_json

BASE = "4x4x48"
SHAPES = [BASE, "2x4x48", "8x4x48", "4x2x48", "4x8x48", "4x4x24", "4x4x96"]
PHASES = ("gen", "score", "update")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES, help="of one process")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    table, results = [], []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        train_file = prepare_data(folder / "data")
        for i, (name, workers) in enumerate([*((shape, 1) for shape in args.shapes), (BASE, 2)]):
            triplets, n, new_tokens = map(int, name.split("x"))
            shape = (triplets, n, new_tokens)
            metrics = train(train_file, folder / f"run{i}", shape, args.steps, f"trainer.n_gpus_per_node={workers}")
            median = {k: statistics.median(m[f"time/{k}_s"] for m in metrics) for k in PHASES}
            wall = statistics.median(m["wall_s"] for m in metrics)
            tokens = metrics[0]["perf/generated_tokens"]
            row = ["{} x {} x {}".format(*shape), workers, f"{tokens:.0f}", *(f"{median[k]:.2f}" for k in PHASES)]
            table.append([*row, f"{wall:.2f}", f"{1000 * wall / tokens:.1f}"])
            results.append({"shape": shape, "processes": workers, "steps": metrics})
            print(f"{i + 1} of {len(args.shapes) + 1}", flush=True)
    head = ["triplets x n x tokens", "processes", "tokens", *(f"{k}, s" for k in PHASES), "step, s", "ms a token"]
    print(markdown(head, table))
    write_json(args.json, {"runs": results, "table": table})


if __name__ == "__main__":
    main()

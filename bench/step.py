"""The phases of a training step, and the least time that they need.

    python3 bench/step.py [--steps 6] [--json FILE] [key=value ...]

Trains SmolLM2-135M on the example triplets: 4 triplets x 4 rationales x 48 new tokens, and 8 anchors. Prints the median
seconds of each phase over the steps after the second, and its floor: the arithmetic of its matrix products at the rate
that this machine reaches in one large product. Further key=value arguments are passed to main_ppo.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
from common import markdown, prepare_data, spread, train, write_json
from floor import peak_rate, step_flop

SHAPE = (4, 4, 48)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_file = prepare_data(folder / "data")
        flop, rate = step_flop(train_file, SHAPE), peak_rate()
        metrics = train(train_file, folder / "run", SHAPE, args.steps, *args.overrides, warm_up=2)
    seconds = {key[5:-2]: [m[key] for m in metrics] for key in metrics[0] if key.startswith("time/")}
    seconds["whole step"] = [m["wall_s"] for m in metrics]
    flop["whole step"] = sum(flop.values())
    table = []
    for phase, values in seconds.items():
        floor = flop.get(phase, np.nan) / rate
        gap = statistics.median(values) / floor
        table.append([phase, spread(values), *(("-", "-") if np.isnan(floor) else (f"{floor:.2f}", f"{gap:.1f} x"))])
    print(markdown(["phase", "seconds, median (min to max)", "floor, s", "gap"], table))
    print(f"\nFloor: {flop['whole step'] / 1e9:.0f} GFLOP at {rate / 1e9:.0f} GFLOP/s.", end=" ")
    print(f"Through Ray: {statistics.median(m['perf/ray_mb'] for m in metrics):.2f} MiB a step.")
    write_json(args.json, {"seconds": seconds, "flop": flop, "flop_per_s": rate, "table": table})


if __name__ == "__main__":
    main()

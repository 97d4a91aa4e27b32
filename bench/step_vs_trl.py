"""The whole training step compared with TRL's GRPOTrainer.

    python3 bench/step_vs_trl.py [--rounds 2] [--steps 3] [--json FILE]

Both train SmolLM2-135M in float32 on the CPU: the same triplets in the same order, n rationales for each positive and
one for each query and negative, all of the same number of new tokens, the same reward, optimizer and number of threads.
They take turns, each in a process of its own; the first two steps of a turn are not counted. The number of tokens must
be the same in every step. Needs the extra `bench`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import MODEL, REPO, Comparison, markdown, prepare_data, spread, train, write_json
from floor import peak_rate, step_flop

from verl.utils.cpus import usable_cpus

SHAPES = {"small": (4, 4, 48), "large": (4, 8, 96)}
BAR = 1 / 3
WARM_UP = 2


def ours(train_file: Path, folder: Path, shape: tuple[int, int, int], steps: int, engine: str) -> list[dict]:
    metrics = train(train_file, folder, shape, steps, f"actor_rollout_ref.rollout.name={engine}", warm_up=WARM_UP)
    rows = shape[0] * (shape[1] + 2)
    return [
        {
            "wall_s": record["wall_s"],
            "generated_tokens": round(record["perf/generated_tokens"]),
            "prompt_tokens": round(record["data/prompt_tokens_mean"] * rows),
            **{name: value for name, value in record.items() if name.startswith("time/")},
        }
        for record in metrics
    ]


def trl(train_file: Path, folder: Path, shape: tuple[int, int, int], steps: int) -> list[dict]:
    folder.mkdir(parents=True)
    out = folder / "steps.jsonl"
    triplets, n, tokens = shape
    command = [
        sys.executable, "bench/trl_grace.py", "--model", MODEL, "--train_file", str(train_file), "--triplets",
        str(triplets), "--n", str(n), "--new_tokens", str(tokens), "--steps", str(steps + WARM_UP), "--out", str(out),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(usable_cpus()), "TOKENIZERS_PARALLELISM": "true"}
    log = folder / "log"
    with log.open("w") as file:
        if subprocess.run(command, cwd=REPO, env=environment, stdout=file, stderr=file).returncode:
            raise SystemExit(f"bench/trl_grace.py failed:\n{log.read_text()[-3000:]}")
    return [json.loads(line) for line in out.read_text().splitlines()][WARM_UP:]


def check_same_work(one: list[dict], other: list[dict]) -> None:
    for name in ("generated_tokens", "prompt_tokens"):
        a, b = ([step[name] for step in steps] for steps in (one, other))
        if a != b:
            raise SystemExit(f"not the same work: {name} of the steps are {a} here and {b} with TRL")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="counted steps in each turn")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--engines", nargs="+", choices=("hf", "vllm"), default=["hf"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results: dict[str, dict[str, list[dict]]] = {}
    table, comparisons = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_file = prepare_data(folder / "data")
        for shape in args.shapes:
            found: dict[str, list[dict]] = {name: [] for name in ("trl", *args.engines)}
            for turn in range(args.rounds):
                place = folder / f"{shape}{turn}"
                rival = trl(train_file, place / "trl", SHAPES[shape], args.steps)
                found["trl"] += rival
                for engine in args.engines:
                    steps = ours(train_file, place / engine, SHAPES[shape], args.steps, engine)
                    check_same_work(steps, rival)
                    found[engine] += steps
            results[shape] = found
            walls = {name: [step["wall_s"] for step in steps] for name, steps in found.items()}
            rival_s = statistics.median(walls["trl"])
            size = "{} triplets x {} x {} tokens".format(*SHAPES[shape])
            ours_s = statistics.median(walls[args.engines[0]])
            floor = sum(step_flop(train_file, SHAPES[shape]).values()) / peak_rate()
            comparisons.append(Comparison(f"a training step, {size}", ours_s, "TRL", rival_s, floor, BAR))
            for side, values in walls.items():
                share = statistics.median(values) / rival_s
                table.append([size, side, len(values), spread(values, 1), f"{share:.3f}"])
    print(markdown(["shape", "who", "steps", "seconds a step, median (min to max)", "share of TRL's"], table))
    print("\nGenerated and prompt tokens were equal in every step.")
    write_json(args.json, {"steps": results, "table": table}, comparisons)


if __name__ == "__main__":
    main()

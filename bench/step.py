"""Time of a training step by phase: python bench/step.py [--steps 6] [--json FILE] [key=value ...]

Trains SmolLM2-135M on the example triplets at 4 triplets x 4 rationales x 48 new tokens (and 8 anchors) and
prints the median of each phase over the steps after the first. Further key=value go to main_ppo.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).parent.parent
MODEL = "models/SmolLM2-135M-Instruct"


def run(folder: Path, steps: int, overrides: list[str]) -> list[dict[str, float]]:
    """Prepare the data and train; return the metrics of the steps after the first."""
    python, data, out = sys.executable, folder / "data", folder / "run"
    prepare = ["process_data.py", "--mode", "supervised", "--input_file", "examples/triplets.jsonl"]
    subprocess.run([python, "scripts/get_demo_model.py"], check=True, cwd=REPO)
    subprocess.run([python, *prepare, "--local_dir", str(data)], check=True, cwd=REPO, stdout=subprocess.DEVNULL)
    train = [
        "data.train_batch_size=4", "actor_rollout_ref.actor.ppo_mini_batch_size=4", "actor_rollout_ref.rollout.n=4",
        "data.max_prompt_length=160", "data.max_response_length=48", "actor_rollout_ref.rollout.ignore_eos=True",
        f"actor_rollout_ref.model.path={MODEL}", "actor_rollout_ref.model.enable_gradient_checkpointing=False",
        f"data.train_files={data}/train.parquet", f"trainer.default_local_dir={out}", "trainer.save_freq=0",
        "+reward_model.reward_kwargs.enable_length_penalty=False",
        f"trainer.total_training_steps={steps + 1}", "trainer.device=cpu",
    ]  # fmt: skip
    subprocess.run([python, "-m", "verl.trainer.main_ppo", *train, *overrides], check=True, cwd=REPO)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        metrics = run(Path(folder), args.steps, args.overrides)
    names = [n for n in metrics[0] if n.startswith("time/") or n in ("perf/generated_tokens", "perf/ray_mb")]
    medians = {name: statistics.median(m[name] for m in metrics) for name in names}
    spread = {name: (min(m[name] for m in metrics), max(m[name] for m in metrics)) for name in names}
    print(f"\nmedian of {len(metrics)} steps (min to max)")
    for name, value in medians.items():
        print(f"  {name:24} {value:10.2f}   ({spread[name][0]:.2f} to {spread[name][1]:.2f})")
    if args.json:
        machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        args.json.write_text(json.dumps({"machine": machine, "medians": medians, "steps": metrics}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Peak memory by phase of a worker: python3 bench/memory.py [--model FOLDER] [--lora_rank N] [--recompute]

One worker in this process runs two steps of 4 triplets x 8 rationales x 96 tokens; the second is reported: the largest
resident memory during each phase (Linux lets a process reset that mark), and on CUDA the most that was allocated.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import MODEL, markdown, prepare_data, write_json
from one_worker import StepSize, build_config, prompt_rows, run_step, workers_of

SIZE = StepSize(triplets=4, n=8, tokens=96)


def peak_gib() -> float:
    """Largest resident memory since `forget_peak`, in GiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**20


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def give_back_what_is_freed() -> None:
    """Begin again with a malloc that keeps no freed tensors: what it keeps, half a GiB or more, depends on chance."""
    setting = "MALLOC_MMAP_THRESHOLD_"
    if setting not in os.environ:
        os.environ[setting] = str(2**17)
        os.execv(sys.executable, [sys.executable, *sys.argv])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--lora_rank", type=int, default=0, help="0 = all weights are trained")
    parser.add_argument("--recompute", action="store_true", help="activations in the backward pass")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    give_back_what_is_freed()
    found: dict[str, dict[str, float]] = {}

    def phase(name: str, work: Callable[[], Any]) -> Any:
        forget_peak()
        start = time.perf_counter()
        result = work()
        found[name] = {"seconds": time.perf_counter() - start, "resident_gib": peak_gib()}
        if args.device == "cuda":
            found[name]["allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return result

    with tempfile.TemporaryDirectory() as folder:
        train_file = prepare_data(Path(folder))
        config = build_config(args.model, SIZE, args.recompute, lora_rank=args.lora_rank)
        with workers_of(config, args.device) as workers:
            phase("loading", workers.init_model)
            prompts = prompt_rows(config, train_file)
            for step in range(2):
                run_step(workers, prompts, step, phase)
    columns = list(found["update"])
    table = [[name, *(f"{values[column]:.2f}" for column in columns)] for name, values in found.items()]
    print(markdown(["phase", *columns], table))
    write_json(args.json, {"phases": found, "table": table})


if __name__ == "__main__":
    main()

"""What a GPU shows and a CPU does not, in one command: python3 bench/gpu_check.py, or make gpu-check

    [--form small|full] [--device cpu|cuda] [--minutes 10] [--folder bench_results/gpu_check] [--json FILE]

The tests of tests/gpu, attention by both kernels, packed against padded rows, and training steps of SmolLM2 and of a
random model in the shape of Qwen2 1.5B with and without offload, with vLLM where it is installed: tokens per second,
MFU, peak memory beside the plan's. Each part is a process of its own. What is finished is kept in the folder; the
same command does the rest, and parts that failed again. Parts that cannot run here are skipped, with the reason. Exit
code 1: a part failed; 3: time ran out, and the same command goes on.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import REPO, machine, markdown, write_json
from comparison.kept import Kept
from gpu_parts import FORMS, PARTS, Skipped

from verl.utils.files import sha256_of_all

_PROGRAM = Path(__file__)
# Results of other code are not kept.
_CODE = ("verl", "bench", "tests/gpu")
# The least time in which a part is begun.
_LEAST_S = 20


def parse_args() -> argparse.Namespace:
    on_cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if on_cuda else "cpu")
    parser.add_argument("--form", choices=tuple(FORMS), help="full on CUDA, small elsewhere")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--folder", type=Path, default=Path("bench_results/gpu_check"))
    parser.add_argument("--json", type=Path, help="gpu_check.json in the folder")
    parser.add_argument("--part", choices=tuple(PARTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.form = args.form or ("full" if args.device == "cuda" else "small")
    return args


def main() -> int:
    args = parse_args()
    if args.part:
        return run_part(args)
    kept, settings = Kept(args.folder), settings_of(args)
    end = time.monotonic() + 60 * args.minutes
    found: dict[str, dict[str, Any]] = {}
    for name in PARTS:
        own = {**settings, "part": name}
        found[name] = kept.find(_file_name(name), own) or attempt(name, args, kept, own, end)
        print(f"{name}: {in_words(found[name])}", flush=True)
    print("\n" + (table := table_of(found)))
    write_json(args.json or args.folder / "gpu_check.json", {**settings, "parts": found, "table": table})
    states = {part["state"] for part in found.values()}
    return 1 if "failed" in states else 3 if "left" in states else 0


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a kept result must agree in."""
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else None
    code = sha256_of_all(sorted(file for part in _CODE for file in (REPO / part).rglob("*.py")))
    return {"form": args.form, "device": args.device, "gpu": gpu, "code": code, "versions": machine()["versions"]}


def attempt(name: str, args: argparse.Namespace, kept: Kept, own: dict[str, Any], end: float) -> dict[str, Any]:
    """Run a part in a process of its own; only a finished one is kept."""
    remaining = end - time.monotonic()
    if remaining < _LEAST_S:
        return {"state": "left", "why": "no time was left; the same command does it"}
    folder = kept.folder(_file_name(name), own)
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "part.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, str(_PROGRAM), "--part", name, "--form", args.form, "--device", args.device]
    try:
        with (folder / "part.log").open("w") as log:
            subprocess.run([*command, "--folder", str(folder), "--json", str(out)], timeout=remaining, stdout=log,
                           stderr=subprocess.STDOUT, check=False)  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"state": "left", "why": "time ran out in it; the same command begins it again"}
    if not out.is_file():
        return {"state": "failed", "why": f"its process ended without a result; see {folder / 'part.log'}"}
    result = json.loads(out.read_text())
    return kept.get(_file_name(name), own, lambda _: result) if result["state"] == "done" else result


def run_part(args: argparse.Namespace) -> int:
    """In the part's own process: write what it found."""
    start = time.perf_counter()
    try:
        figures = PARTS[args.part](FORMS[args.form], args.device, args.folder)
        result: dict[str, Any] = {"state": "done", "seconds": time.perf_counter() - start, "figures": figures}
    except Skipped as reason:
        result = {"state": "skipped", "why": str(reason)}
    args.json.write_text(json.dumps(result) + "\n")
    return 0


def in_words(part: dict[str, Any]) -> str:
    return f"done in {part['seconds']:.0f} s" if part["state"] == "done" else f"{part['state']}: {part['why']}"


def table_of(found: dict[str, dict[str, Any]]) -> str:
    """A line for each part; MFU is the share of the rate of a large product on the same device."""
    rate = found["rate"].get("figures", {}).get("flop_per_s")
    planned = found["plan"].get("figures", {})
    lines = [[name, _line(part, rate, planned.get(name, {}))] for name, part in found.items()]
    return markdown(["part", "result"], lines)


def _line(part: dict[str, Any], rate: float | None, planned: dict[str, float]) -> str:
    """
    Args:
        planned: GiB by phase.
    """
    if part["state"] != "done":
        return in_words(part)
    figures = part["figures"]
    if "update_flop" not in figures:
        return ", ".join(f"{key} {_short(value)}" for key, value in figures.items() if value not in ([], None))
    seconds, peaks = figures["seconds"], figures["peak_gib"]
    words = [f"update {figures['update_tokens_per_s']:.4g} tokens/s"]
    if rate:
        words.append(f"MFU {100 * figures['update_flop'] / seconds['update'] / rate:.2g} %")
    words.append(f"generation {figures['generated_tokens'] / seconds['gen']:.4g} tokens/s")
    words += [f"sync {seconds['sync']:.2g} s", f"attention by {figures['attention']}"]
    words += [f"peak of {name} {value:.2f} GiB{_beside(planned.get(name))}" for name, value in peaks.items()]
    return ", ".join(words)


def _beside(planned: float | None) -> str:
    return "" if planned is None else f" (planned {planned:.2f})"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(value)
    if isinstance(value, dict):
        return " ".join(f"{key} {_short(part)}" for key, part in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _file_name(name: str) -> str:
    return name.replace(",", "").replace(" ", "_")


if __name__ == "__main__":
    sys.exit(main())

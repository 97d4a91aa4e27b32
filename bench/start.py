"""What it takes to start: CPU seconds until a program shows its help text, and until a process has its imports.

    python3 bench/start.py --before ../grace-before --json start_bench.json

CPU seconds of the process, the smallest of --rounds, because a shared machine adds to all of them. With --before
another checkout is measured too, in turns with this one.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from common import REPO, Comparison, markdown, write_json

# CPU seconds of a help text.
HELP_BAR = 1.5

PROGRAMS = {
    **{f"{name} --help": [name, "--help"] for name in ("eval_mteb.py", "process_data.py", "offline_filter_data.py")},
    **{
        f"-m verl.{name} --help": ["-m", f"verl.{name}", "--help"]
        for name in (
            "trainer.main_ppo", "encoder", "doctor", "merge_model", "export_sentence_transformer", "eval_generation",
            "get_demo_model",
        )
    },
}  # fmt: skip
IMPORTS = {
    f"import {name}": ["-c", f"import {name}"]
    for name in (
        "verl.trainer.main_ppo",
        "verl.trainer.run",
        "verl.workers.fsdp_workers",
        "verl.encoder.grace_encoder",
        "torch",
    )
}


def cpu_seconds(arguments: list[str], checkout: Path) -> float:
    """User and system time of one Python process and its children, which runs in a checkout and imports its verl."""
    here = {**os.environ, "PYTHONPATH": str(checkout)}
    process = subprocess.Popen([sys.executable, *arguments], cwd=checkout, env=here, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed in {checkout} with exit code {process.returncode}")
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="another checkout, to compare with")
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    checkouts = {**({"before": args.before.resolve()} if args.before else {}), "now": REPO.resolve()}
    results = {}
    for what, arguments in {**PROGRAMS, **IMPORTS}.items():
        rounds = [[cpu_seconds(arguments, folder) for folder in checkouts.values()] for _ in range(args.rounds)]
        results[what] = dict(zip(checkouts, map(min, zip(*rounds, strict=True)), strict=True))
        print(what, results[what], file=sys.stderr, flush=True)
    rows = [[what, *(f"{seconds:.2f}" for seconds in found.values())] for what, found in results.items()]
    print(markdown(["CPU s", *checkouts], rows))
    slowest = max(PROGRAMS, key=lambda what: results[what]["now"])
    found = Comparison(f"the slowest help text, `{slowest}`", results[slowest]["now"], bar=HELP_BAR)
    write_json(args.json, {"results": results}, [found])


if __name__ == "__main__":
    main()

"""Run the short form of every benchmark and put the tables into docs/performance.md.

    python3 bench/all.py [--only NAME ...]

A table is between `<!-- NAME -->` and `<!-- end NAME -->`. Each benchmark's JSON goes to
bench_results/.
"""

import argparse
import subprocess
import sys
import time

from common import REPO, machine

DOCUMENT = REPO / "docs/performance.md"
SHORT = {
    "step_vs_trl": ["--rounds", "1", "--steps", "2", "--shapes", "small"],
    "step": ["--steps", "3"],
    "scaling": ["--steps", "1"],
    "memory": [],
    "reward": [],
    "data": ["--lines", "200000"],
    "start": ["--rounds", "1"],
    "encode": ["--rounds", "1"],
}


def run(name: str) -> str:
    """Run one benchmark; return its command, its table and what it printed after the table."""
    command = [sys.executable, f"bench/{name}.py", *SHORT[name], "--json", f"bench_results/{name}.json"]
    done = subprocess.run(command, cwd=REPO, stdout=subprocess.PIPE, text=True)
    if done.returncode or "|" not in done.stdout:
        raise SystemExit(f"{' '.join(command)} failed with exit code {done.returncode}:\n{done.stdout}")
    return f"`python3 {' '.join(command[1:-2])}`\n\n" + done.stdout[done.stdout.index("|") :].strip()


def replace(name: str, text: str) -> None:
    document = DOCUMENT.read_text()
    start, end = f"<!-- {name} -->\n", f"<!-- end {name} -->"
    if start not in document or end not in document:
        raise SystemExit(f"{DOCUMENT} has no place for {name!r}; add the lines {start.strip()} and {end.strip()}")
    before, rest = document.split(start, 1)
    DOCUMENT.write_text(f"{before}{start}{text}\n{end}{rest.split(end, 1)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SHORT, default=list(SHORT))
    args = parser.parse_args()
    start = time.monotonic()
    for i, name in enumerate(args.only):
        print(f"{i + 1} of {len(args.only)}: {name}, {(time.monotonic() - start) / 60:.0f} min so far", flush=True)
        text = run(name)
        print(text + "\n", flush=True)
        replace(name, text)
    found = machine()
    versions = ", ".join(f"{package} {number}" for package, number in found["versions"].items())
    replace(
        "machine",
        f"{found['cpu']}, {found['cores']} cores, {found['memory_gib']} GiB, Python {found['python']}, {versions}.",
    )


if __name__ == "__main__":
    main()

"""Run the benchmarks and put their tables and the picture into docs/performance.md.

    python3 bench/all.py [--only NAME ...]            the short form: what others are compared with, and the bars
    python3 bench/all.py --full [--only NAME ...]     every benchmark, with more repetitions

A table is between `<!-- NAME -->` and `<!-- end NAME -->`, under the command that made it. Each benchmark's JSON goes
to bench/results/. The first table and the picture are made of the comparisons in all JSON files there: a benchmark
that did not run again keeps its own, with the machine it was measured on.
"""

import argparse
import json
import subprocess
import sys
import time

from common import ALONE, REPO, Comparison, machine, markdown

RESULTS = REPO / "bench/results"
DOCUMENT = REPO / "docs/performance.md"
PICTURE = REPO / "docs/performance.svg"
# By the name of the table: a program of bench/ and its arguments. The short form leaves out larger shapes, repetitions,
# phases of steps that are timed beside TRL as a whole, and whole steps beside busy processes: each takes minutes.
SHORT = {
    "reward": ["reward.py"],
    "data": ["data.py", "--lines", "200000"],
    "start": ["start.py", "--rounds", "1"],
    "encode": ["encode.py", "--rounds", "1", "--engines", "hf"],
    "busy": [
        "busy.py", "--what", "encoding", "--engines", "hf", "--busy", "0", "2", "--waiting", "GOMP_SPINCOUNT=300000",
        "own", "--rounds", "2",
    ],
    "step_vs_trl": ["step_vs_trl.py", "--rounds", "1", "--steps", "1", "--shapes", "small"],
}  # fmt: skip
FULL = {
    "reward": ["reward.py"],
    "data": ["data.py", "--lines", "200000"],
    "start": ["start.py"],
    "encode": ["encode.py"],
    "encode_1000": ["encode.py", "--what", "thinking", "--engines", "hf", "--texts", "1000", "--rounds", "1"],
    "busy": ["busy.py", "--what", "encoding", "--rounds", "2"],
    "busy_steps": ["busy.py", "--what", "step", "--waiting", "own", "--rounds", "1"],
    "step_vs_trl": ["step_vs_trl.py"],
    "step": ["step.py"],
    "scaling": ["scaling.py", "--steps", "1"],
    "memory": ["memory.py"],
}


def run(name: str, program: str, *arguments: str) -> str:
    """Run one benchmark; return its command, its table and what it printed after the table."""
    command = [sys.executable, f"bench/{program}", *arguments, "--json", str(RESULTS / f"{name}.json")]
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


def comparisons() -> list[Comparison]:
    """Those of every benchmark that has run, in the order in which they run."""
    files = [RESULTS / f"{name}.json" for name in FULL]
    return [
        Comparison(**found) for file in files if file.is_file() for found in json.loads(file.read_text())["comparisons"]
    ]


def summary(found: list[Comparison]) -> str:
    def seconds(value: float | None) -> str:
        return "-" if value is None else f"{value:.3g}"

    rows = [
        [
            c.what, seconds(c.ours), f"{c.other} {seconds(c.theirs)}" if c.theirs else "-", seconds(c.floor),
            f"{c.theirs / c.ours:.2f}" if c.theirs else "-", f"{c.ours / c.floor:.2f}" if c.floor else "-", c.verdict,
        ]
        for c in found
    ]  # fmt: skip
    return markdown(["work", "s", "elsewhere, s", "floor, s", "times as fast", "times the floor", "bar"], rows)


def draw(found: list[Comparison]) -> None:
    """Seconds as shares of the other's: one pair of bars for each comparison, with the floor as a mark."""
    import matplotlib

    matplotlib.use("svg")
    # The same numbers give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "performance"
    from matplotlib import pyplot

    shown = [c for c in found if c.theirs and c.other != ALONE][::-1]
    figure, axes = pyplot.subplots(figsize=(9, 0.75 * len(shown) + 1), layout="constrained")
    for y, c in enumerate(shown):
        assert c.theirs is not None
        axes.barh(y + 0.2, 1, 0.36, color="#c9ccd1")
        axes.barh(y - 0.2, c.ours / c.theirs, 0.36, color="#2f6fb7")
        axes.text(0.01, y + 0.2, f"{c.other}: {c.theirs:.3g} s", va="center", fontsize=8)
        axes.text(c.ours / c.theirs + 0.01, y - 0.2, f"{c.ours:.3g} s", va="center", fontsize=8)
        if c.floor:
            axes.plot([c.floor / c.theirs] * 2, [y - 0.4, y], color="black")
    axes.set_yticks(range(len(shown)), [c.what for c in shown], fontsize=8)
    axes.set_xlabel("seconds, as a share of the other's; a black line is the floor")
    figure.savefig(PICTURE, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every benchmark, with more repetitions")
    parser.add_argument("--only", nargs="+", choices=FULL, metavar="NAME", help=f"some of {', '.join(FULL)}")
    args = parser.parse_args()
    form = FULL if args.full else SHORT
    names = args.only or list(form)
    if missing := [name for name in names if name not in form]:
        parser.error(f"--only {' '.join(missing)}: the short form leaves it out; add --full")
    start = time.monotonic()
    for i, name in enumerate(names):
        print(f"{i + 1} of {len(names)}: {name}", flush=True)
        text = run(name, *form[name])
        print(text + "\n", flush=True)
        replace(name, text)
        print(f"{(time.monotonic() - start) / 60:.1f} min so far\n", flush=True)
    replace("summary", summary(comparisons()))
    draw(comparisons())
    here = machine()
    versions = ", ".join(f"{package} {number}" for package, number in here["versions"].items())
    replace("machine", f"{here['cpu']}, {here['cores']} cores, {here['memory_gib']} GiB, {versions}.")


if __name__ == "__main__":
    main()

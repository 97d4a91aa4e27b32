"""Write what a run did as one page, or several runs beside each other.

    python3 -m verl.report RUN [RUN ...] --out report.html

A RUN is the folder of a training run, also of one in progress. The page shows alerts, settings, curves, evaluation
before and after, rationales, best and worst groups, and a map of the probe texts with their neighbours. It is one file
that opens in a browser without a network. Exit code 2: an argument is wrong.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from verl.errors import UserError
from verl.utils.console import complain, say
from verl.utils.run_files import REPORT


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m verl.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a training run")
    parser.add_argument("--out", type=Path, help=f"the page; default, for one run: RUN/{REPORT}")
    parser.add_argument(
        "--evaluation", nargs="+", type=Path, default=[Path("results")], metavar="DIR",
        help="output folders of eval_mteb.py to look in besides RUN/evaluation; default: results",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.out is None and len(args.runs) > 1:
        parser.error("--out is needed for several runs")
    args.out = args.out or args.runs[0] / REPORT
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    # numpy and scipy take a second to load, for which a help text and a wrong flag need not wait.
    from verl.report.page import write_report

    try:
        write_report(args.runs, args.out, args.evaluation)
    except (UserError, OSError) as error:
        return complain("verl.report", error)
    say(f"report: {args.out} ({args.out.stat().st_size / 1e6:.2f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())

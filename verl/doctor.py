"""Whether this machine can train: python3 -m verl.doctor [key=value ...], or bash train.sh --doctor [key=value ...]

Each line is OK, or FIX with what to do. Give the overrides of the run that you plan. Exit code 1: a check failed; 2: an
override is wrong.
"""

import argparse
import sys
from collections.abc import Sequence

from verl.errors import UserError
from verl.trainer.compose import compose_config
from verl.utils.console import show_any_text
from verl.utils.cpus import let_waiting_threads_sleep


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m verl.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    show_any_text()
    let_waiting_threads_sleep()
    try:
        config = compose_config(args.overrides)
    except UserError as error:
        sys.stderr.write(f"\ndoctor: {error}\n")
        return 2
    # This takes seconds to load, for which a help text and a wrong flag need not wait.
    from verl.trainer.machine_checks import run_program

    return run_program(config)


if __name__ == "__main__":
    sys.exit(main())

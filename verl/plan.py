"""What memory, traffic and tokens a training run on GPUs needs, before it starts:

    python3 -m verl.plan --gpus 4 --gpu 80 [key=value ...]
    bash train.sh --plan --gpus 4 --gpu 80 [key=value ...]

No GPU is needed, and of the model its config.json alone. Give the overrides of the run. Exit code 1: it does not fit,
and the last lines name the settings with which it does; 2: an override is wrong.
"""

import argparse
import sys
from collections.abc import Sequence

from verl.errors import UserError
from verl.trainer.compose import compose_config
from verl.utils.console import show_any_text
from verl.utils.cpus import let_waiting_threads_sleep
from verl.utils.gpus import count_gpus


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m verl.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", type=float, metavar="GIB", help="memory of a GPU in GiB; the visible one's")
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs of a machine; as many as are visible")
    parser.add_argument("--nodes", type=int, metavar="N", help="machines; trainer.nnodes")
    parser.add_argument("--print-gpus", action="store_true", help="show the number of GPUs, and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)
    if args.gpus is None:
        args.gpus = count_gpus()
    if args.gpus < 1:
        parser.error("no GPU is visible; give --gpus and --gpu, the memory of each in GiB")
    if args.gpu is not None and args.gpu <= 0:
        parser.error(f"--gpu {args.gpu:g}: give the memory of a GPU in GiB, such as 80")
    if args.nodes is not None and args.nodes < 1:
        parser.error(f"--nodes {args.nodes}: give the number of machines")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    show_any_text()
    let_waiting_threads_sleep()
    if args.print_gpus:
        sys.stdout.write(f"{args.gpus}\n")
        return 0
    try:
        config = compose_config(args.overrides, has_data=False)
        # This takes seconds to load, for which a help text and a wrong flag need not wait.
        from verl.trainer.memory_plan import run_program

        return run_program(config, args.gpu, args.gpus, args.nodes)
    except UserError as error:
        sys.stderr.write(f"\nplan: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())

"""Upload a model to the hub: weights, tokenizer, how it embeds, and its card with licence, base model and scores.

    python3 -m verl.push_to_hub --model checkpoints/GRACE/quickstart/global_step_28 --repo OWNER/NAME --dry_run
    python3 -m verl.push_to_hub --model checkpoints/GRACE/quickstart/global_step_28 --repo OWNER/NAME --private

Everything is checked and listed before anything is sent; --dry_run ends there. Optimizer states, shards and other files
of a checkpoint stay here. Scores are those that eval_mteb.py wrote for these very weights by the model's own settings.
The login is that of `hf auth login` or HF_TOKEN. The same command continues an upload that was interrupted, and sends
what has changed. Exit codes: 0 done, 2 the model, an argument or the hub does not allow it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m verl.push_to_hub", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, required=True, help="RUN/global_step_N, or a model folder, such as its huggingface"
    )
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME", help="made when it is not there")
    parser.add_argument(
        "--private", action="store_true", help="make the repository private; an existing public one is an error"
    )
    parser.add_argument("--revision", metavar="BRANCH", help="made when it is not there; default: main")
    parser.add_argument(
        "--license", help="by the hub's name, as apache-2.0; default: that of the card, else of the base model's card"
    )
    parser.add_argument(
        "--results", type=Path, metavar="DIR",
        help="--output_dir of eval_mteb.py, or a folder in it; default: results, where it is there",
    )  # fmt: skip
    parser.add_argument(
        "--leaderboard", type=Path, metavar="DIR",
        help="also write the scores to this folder, as mteb's results repository wants them",
    )  # fmt: skip
    parser.add_argument("--dry_run", action="store_true", help="check and list everything, and send nothing")
    args = parser.parse_args(argv)
    if args.dry_run and args.leaderboard:
        parser.error("--leaderboard names the commit of the upload, which --dry_run does not make; leave one out")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    # This takes seconds to load, for which a help text and a wrong flag need not wait.
    from verl.hub.push import run_program

    return run_program(args)


if __name__ == "__main__":
    sys.exit(main())

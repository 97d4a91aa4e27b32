"""Find hard negatives for pairs of a query and its positive texts.

    python3 -m verl.mine_negatives --model M --input pairs.jsonl --output triplets.jsonl --num_negatives 5
    python3 process_data.py --mode supervised --input_file triplets.jsonl --local_dir data/mine

M embeds all texts: a model of this project, or any of sentence-transformers. A query's negatives are the texts that are
nearest to it among all positives and negatives of the input, without its own positives and, because they may be right
as well, without those whose similarity is not at least the margin below that of its least similar positive. The output
has a line per input line, {"query", "pos", "neg"}, the hardest negative first; lines of a query for which none is left
are left out. Needs sentence-transformers (pip install -e '.[eval]').
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from verl.encoder.arguments import add_engine_flags
from verl.utils.cpus import let_waiting_threads_sleep


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m verl.mine_negatives", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="model folder or hub name")
    add("--input", type=Path, required=True, help="pairs, with negatives or without, in any form of process_data.py")
    add("--output", type=Path, required=True, help="a .jsonl file")
    add("--num_negatives", type=int, default=5, help="most negatives of a query")
    add("--margin", type=float, default=0.05, help="as a share of the positive's similarity")
    add("--range_min", type=int, default=0, help="nearest texts that are passed over")
    add("--range_max", type=int, help="nearest texts that are looked at; default: enough, by the other flags")
    add("--no_thinking", action="store_true", help="embed the texts without rationales")
    add("--max_new_tokens", type=int, help="most tokens of a rationale; default: the model's settings")
    add("--seed", type=int, default=0, help="of the rationales")
    add_engine_flags(parser)
    args = parser.parse_args(argv)
    if args.output.suffix != ".jsonl":
        parser.error(f"--output {args.output} must end in .jsonl")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    let_waiting_threads_sleep()
    # This takes seconds to load, for which a help text and a wrong flag need not wait.
    from verl.encoder.hard_negatives import run_program

    return run_program(args)


if __name__ == "__main__":
    sys.exit(main())

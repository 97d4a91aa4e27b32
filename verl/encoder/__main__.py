"""Embed a file of texts.

    python3 -m verl.encoder --model FOLDER --input texts.jsonl --output vectors.parquet
    python3 -m verl.encoder --model FOLDER --input millions.jsonl.gz --output vectors

The input is text (one text a line), JSON lines, CSV or parquet with a column `text` (or `sentence`); blank lines of a
text file are skipped. The output has a row per text, in order: text, rationale, vector. Vectors have unit length, for
cosines; --not_normalized is for training a classifier or a clustering on them.

The same command continues a run that was killed. Into one file, rationales and vectors are written to --store as they
are made; without --store a store next to the output is used, and removed when the output is complete. Into a folder,
the output is files of --shard_rows texts each, and those that are finished are kept, after a comparison of their texts
and of what made them; neither the input nor the vectors are held in memory as a whole.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from verl.embedding.settings import add_vector_flags
from verl.encoder.arguments import SHARD_ROWS, add_engine_flags
from verl.prompt_options import add_system_prompt_flag, add_template_flags
from verl.text_roles import ROLES
from verl.utils.cpus import let_waiting_threads_sleep


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m verl.encoder", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="model folder or hub name")
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument(
        "--output", type=Path, required=True, help="a .parquet file; any other name is that of a folder of them"
    )
    parser.add_argument(
        "--shard_rows", type=int,
        help="texts of each file of a folder: so many are held in memory together, and embedded again after a kill; "
        f"default: {SHARD_ROWS:,}",
    )  # fmt: skip
    parser.add_argument("--store", type=Path, help="folder of rationales and vectors to reuse and to add to")
    parser.add_argument("--role", choices=ROLES, help="embed the texts as the model's settings say for this role")
    parser.add_argument("--task", help="name of an instruction of the model's settings")
    parser.add_argument("--no_thinking", action="store_true", help="embed the texts alone")
    add_system_prompt_flag(parser, "the model's settings")
    add_template_flags(parser, "the model's settings")
    parser.add_argument("--not_normalized", action="store_true", help="vectors as they are, not of unit length")
    parser.add_argument("--max_new_tokens", type=int, help="most tokens of a rationale; default: the model's settings")
    parser.add_argument("--max_prompt_length", type=int, help="most tokens of a prompt; default: the model's settings")
    parser.add_argument("--temperature", type=float, help="default: the model's settings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pooling", choices=("mean", "last", "eos"))
    parser.add_argument("--span", choices=("input+rationale", "rationale"))
    add_vector_flags(parser)
    add_engine_flags(parser)
    parser.add_argument("--num_processes", type=int, default=1, help="processes that share the work, one per GPU")
    args = parser.parse_args(argv)
    if args.output.suffix != ".parquet" or args.output.is_dir():
        if args.shard_rows is None:
            args.shard_rows = SHARD_ROWS
    elif args.shard_rows is not None:
        parser.error(f"--shard_rows is for a folder, and --output {args.output} is one file; give one of the two")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    let_waiting_threads_sleep()
    # This takes seconds to load, for which a help text and a wrong flag need not wait.
    from verl.encoder.embed_file import run_program

    return run_program(args)


if __name__ == "__main__":
    sys.exit(main())

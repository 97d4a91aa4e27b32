"""Drop rows whose prompts are too long for training, and store every prompt's length beside its row.

    python3 offline_filter_data.py --train_parquet data/mine/train.parquet \\
        --val_parquet data/mine/test.parquet --out_dir data/mine_filtered \\
        --tokenizer_path models/SmolLM2-135M-Instruct

A row is kept if all its texts fit: the prompt, and of a triplet the query and the negative too. Of its further
positives and negatives those that do not fit are left out. The outputs (train.parquet, test.parquet, filter.json)
appear together at the end.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from verl.prompt_options import add_template_flags


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="offline_filter_data.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--train_parquet", type=Path, required=True)
    add("--val_parquet", type=Path, help="written as test.parquet; without it an earlier one there is removed")
    add("--out_dir", type=Path, required=True)
    add("--tokenizer_path", required=True, help="folder or hub name of the model that will be trained")
    add("--max_len", type=int, default=1024, help="most tokens a prompt may have (data.max_prompt_length)")
    add("--num_proc", type=int, help="most processes to measure with; default: as many as CPUs that it may use")
    add("--prompt_key", default="prompt", help="the column of chat messages")
    add_template_flags(parser, "as in training without data.system_prompt_in and data.template_date")
    add("--trust_remote_code", action="store_true", help="run Python code that the tokenizer's folder brings")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    # This takes seconds to load, for which a help text and a wrong flag need not wait.
    from verl.data.filter_files import run_program

    return run_program(args)


if __name__ == "__main__":
    sys.exit(main())

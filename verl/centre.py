"""Find the mean vector of a model's data and keep it with the model, whose vectors then lack its direction.

    python3 -m verl.centre --model checkpoints/GRACE/quickstart/global_step_28/huggingface --input train.parquet
    python3 -m verl.centre --model SmolLM2-135M-Instruct --input train.parquet --output SmolLM2-centred

Texts are embedded by the model's own settings, with rationales (unless these say think=false) and without, which have
a mean each. The means are written as embedder_centre/mean.safetensors into the model's folder, or into a copy of it,
and embedder_config.json gets "centre": true. GraceEncoder, verl.encoder and eval_mteb.py use it without being told.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from verl.encoder.arguments import add_engine_flags
from verl.utils.cpus import let_waiting_threads_sleep


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m verl.centre", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="model folder, or with --output a hub name too")
    parser.add_argument(
        "--input", type=Path, required=True,
        help="a file that process_data.py wrote, or one that it reads: triplets or texts",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, help="new folder, a copy of the model with the centre")
    parser.add_argument("--max_texts", type=int, default=1000, help="most texts that are embedded, drawn at random")
    parser.add_argument("--max_new_tokens", type=int, help="most tokens of a rationale; default: the model's settings")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn texts, and of their rationales")
    add_engine_flags(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    let_waiting_threads_sleep()
    # This takes seconds to load, for which a help text and a wrong flag need not wait.
    from verl.encoder.find_centre import run_program

    return run_program(args)


if __name__ == "__main__":
    sys.exit(main())

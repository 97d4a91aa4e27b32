"""Export a model to a folder that sentence-transformers loads; the vectors are compared.

    python3 -m verl.export_sentence_transformer --model_path merged --output exported [--rationales]

SentenceTransformer("exported").encode(texts) needs no code of this project and gives the vectors of
GraceEncoder("merged").encode(texts, think=False). The prompt is part of the exported chat template. Where the beginning
of the prompt is not pooled, it consists of copies of its tokens with ids of their own, because the module of
sentence-transformers that leaves tokens out selects them by id, and a text may hold the original tokens.

With --rationales the folder is the model itself, with a modules.json that names this project's module: where it is
installed, SentenceTransformer("exported", trust_remote_code=True).encode(texts) gives the vectors of
GraceEncoder("merged").encode(texts).
Exit codes: 0 done, 1 the vectors differ, 2 this model or these arguments allow no export.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m verl.export_sentence_transformer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model_path", required=True, help="model folder or hub name")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--rationales", action="store_true",
        help="embed with rationales: whoever loads the folder needs this project, and trust_remote_code=True",
    )  # fmt: skip
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    # This takes seconds to load, for which a help text and a wrong flag need not wait.
    from verl.encoder.export import run_program

    return run_program(args)


if __name__ == "__main__":
    sys.exit(main())

"""Make a transformers folder from the shards of a checkpoint, or compare the two. No GPU is needed.

    python3 -m verl.merge_model merge --backend fsdp --local_dir checkpoints/GRACE/quickstart --target_dir merged
    python3 -m verl.merge_model test --backend fsdp --local_dir checkpoints/GRACE/quickstart --test_hf_dir merged

--local_dir is a run folder (its newest complete step is used), a global_step_N folder, or a folder that holds the
shards: torch DCP shards, or the model_world_size_W_rank_R.pt files of verl 0.4. Config and tokenizer are those of the
checkpoint if it has them, else those of --hf_model_path. Where a LoRA adapter was trained, and for an adapter's folder,
the adapter is added to its model in float32. Exit codes: 0 done, 1 the folders differ (test), 2 the arguments or the
checkpoint are wrong.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

DTYPES = ("auto", "float32", "bfloat16", "float16")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m verl.merge_model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    both = argparse.ArgumentParser(add_help=False)
    both.add_argument("--backend", required=True, help="fsdp is the only one")
    both.add_argument("--local_dir", type=Path, required=True, help="run, step or shard folder")
    both.add_argument(
        "--hf_model_path", help="folder or hub name with config and tokenizer, if the checkpoint has none"
    )
    both.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights; auto = the config's")
    merge = commands.add_parser("merge", parents=[both], help="write a transformers folder")
    merge.add_argument(
        "--target_dir", type=Path, default=Path("tmp"), help="folder to write; an earlier result is replaced"
    )
    merge.add_argument("--hf_upload_path", metavar="REPO", help="upload the folder to this hub repository")
    merge.add_argument(
        "--private", action="store_true", help="make the repository private; an existing public one is an error"
    )
    test = commands.add_parser("test", parents=[both], help="compare with a transformers folder")
    test.add_argument("--test_hf_dir", type=Path, required=True, help="folder with the safetensors to compare with")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    # This takes seconds to load, for which a help text and a wrong flag need not wait.
    from verl.checkpoint.merge import run_program

    return run_program(args)


if __name__ == "__main__":
    sys.exit(main())

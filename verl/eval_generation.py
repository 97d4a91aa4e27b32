"""Does a trained embedder still generate? Exact match on questions whose answer is a number, as in GSM8K.

    python3 -m verl.eval_generation --model_path MODEL --base_model BASE --data gsm8k_test.jsonl

The model is asked as a chat model, without the embedder's system prompt. --data is JSON lines or parquet with the
columns question and answer; verl/evaluation/exact_match.py says where the gold number is. The results are written to
OUTPUT_DIR/NAME: generation.json and generations.jsonl. Exit code 0: done; 1: the engine failed; 2: an argument or a
file is wrong.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from verl.utils.answers import MARK
from verl.utils.cpus import let_waiting_threads_sleep

INSTRUCTION = f"Reason step by step. Then write {MARK} and after it the final number, alone on the last line."


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m verl.eval_generation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model_path", required=True, help="folder or hub name of the model")
    add("--base_model", help="also run this model, with the same settings, and show the differences")
    add("--data", type=Path, required=True, help="JSON lines, or .parquet")
    add("--num_examples", type=int, default=100, help="rows to use, from the beginning of the file")
    add("--max_new_tokens", type=int, default=512, help="most tokens of a response")
    add("--max_prompt_length", type=int, default=1024, help="most tokens of a prompt; a longer one is an error")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--seed", type=int, default=0, help="of the sampling")
    add("--engine", choices=("auto", "hf", "vllm"), default="auto", help="generates the answers")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto")
    add("--batch_size", type=int, help="prompts that hf decodes at once; default: what the memory is enough for")
    add("--instruction", default=INSTRUCTION, help="appended to every question; default: %(default)s")
    add("--output_dir", type=Path, default=Path("results/generation"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    let_waiting_threads_sleep()
    # This takes seconds to load, for which a help text and a wrong flag need not wait.
    from verl.evaluation.generation import run_program

    return run_program(args)


if __name__ == "__main__":
    sys.exit(main())

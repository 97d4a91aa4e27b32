"""Evaluate an embedder on MTEB, or on tasks in local files.

    python3 eval_mteb.py --model_path checkpoints/GRACE/quickstart/global_step_28/huggingface --task_dir examples/eval
    python3 eval_mteb.py --model_path MODEL --base_model Qwen/Qwen2.5-1.5B-Instruct --suite quick
    python3 eval_mteb.py --model_path MODEL --benchmark "MTEB(eng, v1)" --yes

Rationales and vectors are written to --store as they are made, so the same command continues a run that was killed;
finished tasks are not repeated for the same weights and settings. Exit code 0: every task finished; 1: a task or
the engine failed; 2: an argument or a file is wrong.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from verl.embedding.settings import add_vector_flags
from verl.encoder.arguments import BATCH_SIZE_HELP
from verl.evaluation.options import ASK_ABOVE_HOURS, SUITES
from verl.prompt_options import add_system_prompt_flag, add_template_flags
from verl.utils.cpus import let_waiting_threads_sleep


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("model")
    model.add_argument("--model_path", required=True, help="folder or hub name of the model")
    model.add_argument("--forward_model_path", help="must equal --model_path: one model generates and embeds")
    model.add_argument("--model_name", help="name in the results; default: taken from the path")
    model.add_argument(
        "--base_model", help="also evaluate this model, with the same settings, and show the differences"
    )
    model.add_argument("--embedder_config", type=Path, help="folder with the embedder_config.json to use")
    model.add_argument("--trust_remote_code", action="store_true", help="allow code from the model's repository to run")
    what = parser.add_argument_group("tasks")
    what.add_argument("--tasks", nargs="+", default=[], metavar="NAME", help="tasks of MTEB or --task_dir")
    what.add_argument("--task_dir", type=Path, help="folder of local tasks (see verl/evaluation/local_tasks.py)")
    what.add_argument("--suite", choices=SUITES, help="; ".join(f"{name}: {text}" for name, text in SUITES.items()))
    what.add_argument("--benchmark", help='a benchmark of mteb by its name, such as "MTEB(eng, v1)"')
    how = parser.add_argument_group("embedding")
    how.add_argument("--no_thinking", action="store_true", help="embed the texts alone, without rationales")
    add_system_prompt_flag(how, "the model's settings")
    add_template_flags(how, "the model's settings")
    how.add_argument("--input_max_length", type=int, help="most tokens of a prompt; default: the model's settings")
    how.add_argument("--thinking_max_length", type=int, help="most tokens of a rationale; default: the settings")
    how.add_argument("--temperature", type=float, help="of the rationales; default: the settings")
    how.add_argument("--pooling_method", choices=("mean", "last", "eos"), help="eos is an old name of last")
    how.add_argument("--span", choices=("input+rationale", "rationale"), help="tokens that are pooled")
    add_vector_flags(how)
    how.add_argument(
        "--normalize_embeddings", action="store_true",
        help="scale vectors to unit length; classification, clustering and pairs see the difference",
    )  # fmt: skip
    how.add_argument("--seed", type=int, default=0, help="of the rationales")
    how.add_argument(
        "--ignore_eos", action="store_true", help="generate every rationale to its full length (a control)"
    )
    how.add_argument("--batch_size", type=int, help=BATCH_SIZE_HELP)
    how.add_argument("--engine", choices=("auto", "hf", "vllm"), default="auto", help="generates the rationales")
    how.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    how.add_argument(
        "--num_processes", type=int, help="processes that share the work; default: one for each visible GPU"
    )
    how.add_argument(
        "--vllm_tensor_parallel_size", type=int, default=int(os.environ.get("VLLM_TENSOR_PARALLEL_SIZE", "1")),
        help="processes that share one vllm engine",
    )  # fmt: skip
    how.add_argument(
        "--vllm_gpu_memory_utilization", type=float,
        default=os.environ.get("VLLM_GPU_MEMORY_UTILIZATION"),
        help="vllm: share of a GPU's memory; default: what the model that embeds and its forwards leave, at most 0.8",
    )  # fmt: skip
    where = parser.add_argument_group("output")
    where.add_argument("--output_dir", type=Path, default=Path("results"))
    where.add_argument("--store", type=Path, help="folder of rationales and vectors; default: OUTPUT_DIR/store")
    where.add_argument("--timing_log", type=Path, help="also write the seconds of each task to this file")
    where.add_argument("--overwrite", action="store_true", help="also run tasks that have results")
    where.add_argument("--yes", action="store_true", help=f"do not ask above {ASK_ABOVE_HOURS:g} hours")
    where.add_argument("--show", type=int, default=0, metavar="N", help="print N texts with their rationales")
    args = parser.parse_args(argv)
    if args.forward_model_path not in (None, args.model_path):
        parser.error(f"--forward_model_path {args.forward_model_path} must equal --model_path: one model does both")
    if not (args.tasks or args.task_dir or args.suite or args.benchmark):
        parser.error("give --suite, --benchmark, --tasks or --task_dir")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    let_waiting_threads_sleep()
    # This takes seconds to load, for which a help text and a wrong flag need not wait.
    from verl.evaluation.evaluate import run_program

    return run_program(args)


if __name__ == "__main__":
    sys.exit(main())

"""Score an embedder with MTEB, or on local files.

    python3 eval_mteb.py --model_path checkpoints/GRACE/quickstart/global_step_8/huggingface --task_dir examples/eval
    python3 eval_mteb.py --model_path MODEL --base_model Qwen/Qwen2.5-1.5B-Instruct --suite quick
    python3 eval_mteb.py --model_path MODEL --benchmark "MTEB(eng, v1)" --yes

Rationales and vectors are kept in --store while they are made, so a run that was killed goes on where it was, and
finished tasks are not repeated for the same weights and settings. Exit code 0: every task finished; 1: a task or
the engine failed; 2: something given is wrong.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import datasets
import mteb
import torch
from rich.console import Console

from verl import GraceEncoder
from verl.checkpoint.model_card import put_scores
from verl.embedding.settings import EmbedderSettings
from verl.encoder.store import StoreError
from verl.errors import UserError
from verl.evaluation.mteb_model import GraceMTEB
from verl.evaluation.plan import ASK_ABOVE_HOURS, Rate, measure_rate, plan_costs, plan_table, sample_texts
from verl.evaluation.records import name_of
from verl.evaluation.report import Summary, TaskReport, timing_lines
from verl.evaluation.suites import SUITES, Selection, select_tasks
from verl.utils.logging import quiet_libraries
from verl.utils.versions import installed_versions
from verl.workers.rollout.base import RolloutError

EXIT_TASK_FAILED = 1
EXIT_USER_ERROR = 2
STAND_INS = Path(__file__).parent / "examples" / "sentences.txt"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("model")
    model.add_argument("--model_path", required=True, help="folder or hub name of the model")
    model.add_argument("--forward_model_path", help="must equal --model_path: rationales and vectors are of one model")
    model.add_argument("--model_name", help="name in results; default: from the path")
    model.add_argument("--base_model", help="score this one too, with the same settings, and show differences")
    model.add_argument("--embedder_config", type=Path, help="folder whose embedder_config.json is used instead")
    model.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    what = parser.add_argument_group("tasks")
    what.add_argument("--tasks", nargs="+", default=[], metavar="NAME", help="of MTEB, or of --task_dir")
    what.add_argument("--task_dir", type=Path, help="folder of local tasks (see verl/evaluation/local_tasks.py)")
    what.add_argument("--suite", choices=SUITES, help="; ".join(f"{name}: {text}" for name, text in SUITES.items()))
    what.add_argument("--benchmark", help='a benchmark of mteb by its name, such as "MTEB(eng, v1)"')
    how = parser.add_argument_group("embedding")
    how.add_argument("--no_thinking", action="store_true", help="embed the texts alone, without rationales")
    how.add_argument("--input_max_length", type=int, help="most tokens of a prompt; default: the model's settings")
    how.add_argument("--thinking_max_length", type=int, help="most tokens of a rationale; default: the settings")
    how.add_argument("--temperature", type=float, help="of the rationales; default: the settings")
    how.add_argument("--pooling_method", choices=("mean", "last", "eos"), help="eos is an old name of last")
    how.add_argument("--span", choices=("input+rationale", "rationale"), help="tokens that are pooled")
    how.add_argument("--seed", type=int, default=0, help="of the rationales")
    how.add_argument("--ignore_eos", action="store_true", help="write every rationale to its full length (a control)")
    how.add_argument("--batch_size", type=int, default=64, help="texts of one forward, and that hf decodes at once")
    how.add_argument("--engine", choices=("auto", "hf", "vllm"), default="auto", help="writes the rationales")
    how.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    how.add_argument(
        "--num_processes", type=int, default=max(1, torch.cuda.device_count()),
        help="processes that share the work; default: one for each visible GPU",
    )  # fmt: skip
    how.add_argument(
        "--vllm_tensor_parallel_size", type=int, default=int(os.environ.get("VLLM_TENSOR_PARALLEL_SIZE", "1")),
        help="processes that share one engine of vllm",
    )  # fmt: skip
    how.add_argument(
        "--vllm_gpu_memory_utilization", type=float,
        default=float(os.environ.get("VLLM_GPU_MEMORY_UTILIZATION", "0.8")), help="share of a GPU for vllm",
    )  # fmt: skip
    where = parser.add_argument_group("output")
    where.add_argument("--output_dir", type=Path, default=Path("results"))
    where.add_argument("--store", type=Path, help="rationales and vectors; default: OUTPUT_DIR/store")
    where.add_argument("--timing_log", type=Path, help="also write seconds by task here")
    where.add_argument("--overwrite", action="store_true", help="run tasks again that have results")
    where.add_argument("--yes", action="store_true", help=f"do not ask above {ASK_ABOVE_HOURS:g} hours")
    where.add_argument("--show", type=int, default=0, metavar="N", help="print N texts with their rationales")
    args = parser.parse_args(argv)
    if args.forward_model_path not in (None, args.model_path):
        parser.error(f"--forward_model_path {args.forward_model_path} must equal --model_path: one model does both")
    if not (args.tasks or args.task_dir or args.suite or args.benchmark):
        parser.error("give --suite, --benchmark, --tasks or --task_dir")
    return args


class Evaluation:
    """One model on the selected tasks."""

    def __init__(self, args: argparse.Namespace, console: Console) -> None:
        self.args = args
        self.console = console
        self.selection: Selection = select_tasks(args.benchmark, args.suite, args.tasks, args.task_dir)
        self.encoder = GraceEncoder(
            args.model_path, engine=args.engine, device=args.device,
            settings=EmbedderSettings.read(args.embedder_config) if args.embedder_config else None,
            pooling=args.pooling_method, span=args.span, max_prompt_length=args.input_max_length,
            max_new_tokens=args.thinking_max_length, store=args.store or args.output_dir / "store",
            num_processes=args.num_processes, tensor_parallel_size=args.vllm_tensor_parallel_size,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization, trust_remote_code=args.trust_remote_code,
            ignore_eos=args.ignore_eos,
        )  # fmt: skip
        self.options = {"think": not args.no_thinking, "seed": args.seed}
        if args.temperature is not None:
            self.options["temperature"] = args.temperature
        name = args.model_name or name_of(args.model_path)
        self.model = GraceMTEB(self.encoder, name, self.options)
        self.cache = mteb.ResultCache(args.output_dir)
        self.folder = summary_folder(args.output_dir, name, args.no_thinking)
        self.summary = Summary(
            title=self.selection.title,
            comparable=self.selection.comparable,
            wanted=[task.metadata.name for task in self.selection.tasks],
            model={"name": name, "path": str(args.model_path), "revision": self.encoder.revision},
            settings=self.encoder.describe(**self.options),
            versions=installed_versions(),
            command=shlex.join([Path(sys.executable).name, *sys.argv]),
        )
        earlier = Summary.read(self.folder)
        same = earlier and (earlier.model["revision"], earlier.settings) == (
            self.summary.model["revision"], self.summary.settings)  # fmt: skip
        self.earlier = {task.name: task for task in earlier.tasks} if earlier and same else {}

    def run(self, base: Summary | None) -> Summary:
        """Plan, run the tasks one by one, and write the summary after each."""
        self.plan()
        for number, task in enumerate(self.selection.tasks, start=1):
            self.console.print(f"task {number} of {len(self.selection.tasks)}: {task.metadata.name}", markup=False)
            report = self.run_task(task)
            self.summary.tasks.append(report)
            self.summary.write(self.folder, base)
            self.console.print(f"  {_outcome(report)}", markup=False)
        return self.summary

    def plan(self) -> None:
        """Show what the tasks cost, and ask when that is much.

        Raises:
            UserError: it is much, and nobody is there to be asked or says yes.
        """
        args, encoder = self.args, self.encoder
        self.console.print(
            f"{len(self.selection.tasks)} tasks ({self.selection.title}); rationales: "
            + (f"{encoder.backend.spec.engine} ({encoder.engine_reason})" if self.options["think"] else "none"),
            markup=False,
        )
        kept = self.folder / "rate.json"
        before = replace(encoder.usage)
        texts = sample_texts(self.selection.tasks, STAND_INS)
        rate = measure_rate(encoder, texts, self.options, args.batch_size)
        self.summary.sample_usage = asdict(encoder.usage - before)
        if rate:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(asdict(rate)) + "\n")
        elif kept.is_file():
            rate = Rate(**json.loads(kept.read_text()))
        else:
            self.console.print("no plan: the sample was in the store already, and its rate is not known")
            return
        costs = plan_costs(self.selection.tasks, rate, self.options["think"])
        self.console.print(plan_table(costs, rate))
        hours = sum(cost.hours for cost in costs)
        if hours > ASK_ABOVE_HOURS and not args.yes:
            self._ask(hours)

    def _ask(self, hours: float) -> None:
        if not sys.stdin.isatty():
            raise UserError(
                f"this takes about {hours:.0f} hours; give --yes to run it, or --suite quick, --no_thinking, or a "
                "smaller --thinking_max_length"
            )
        if self.console.input(f"This takes about {hours:.0f} hours. Go on? [y/N] ").strip().lower() not in ("y", "yes"):
            raise UserError("not started")

    def run_task(self, task: Any) -> TaskReport:
        name = task.metadata.name
        report = TaskReport(name, task.metadata.type, task.metadata.main_score)
        stored = self.cache.load_task_result(name, self.model.mteb_model_meta)
        # mteb keeps a finished result also when the data is another by now.
        outdated = stored is not None and stored.dataset_revision != task.metadata.revision
        before, start = replace(self.encoder.usage), time.perf_counter()
        result = mteb.evaluate(
            self.model, task, cache=self.cache, raise_error=False, co2_tracker=False,
            overwrite_strategy="always" if outdated or self.args.overwrite else "only-missing",
            encode_kwargs={"batch_size": self.args.batch_size, "show_progress_bar": False}, show_progress_bar=False,
        )  # fmt: skip
        spent = self.encoder.usage - before
        if result.exceptions:
            # mteb keeps a result without a score of an aggregated task of which a part failed.
            self.cache.get_task_result_path(name, self.model.mteb_model_meta).unlink(missing_ok=True)
            report.error = result.exceptions[0].exception or "no message"
            return report
        if spent.texts == 0 and name in self.earlier:
            return self.earlier[name]
        (task_result,) = result.task_results
        report.score = 100 * task_result.get_score()
        ran = spent.texts > 0
        report.seconds = time.perf_counter() - start if ran else task_result.evaluation_time
        report.usage = asdict(spent) if ran else None
        return report


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    quiet_libraries()
    datasets.disable_progress_bars()
    # A table in a file or a pipe needs no line breaks.
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
    try:
        base = score_base(args, console) if args.base_model else None
        evaluation = Evaluation(args, console)
        with evaluation.encoder as encoder:
            summary = evaluation.run(base)
            report(evaluation, base)
            shown = show_rationales(encoder, evaluation, args.show)
    except (UserError, StoreError, ValueError, OSError) as error:
        sys.stderr.write(f"eval_mteb: {error}\n")
        return EXIT_USER_ERROR
    except RolloutError as error:  # outside of a task: in the plan's sample
        sys.stderr.write(f"eval_mteb: the engine failed before any task was run: {error}\n")
        return EXIT_TASK_FAILED
    console.print("\n".join(shown), markup=False, end="\n" if shown else "")
    return EXIT_TASK_FAILED if summary.missing else 0


def score_base(args: argparse.Namespace, console: Console) -> Summary:
    """Run this program on the base model, in a process of its own: two models do not share a GPU's memory.

    Raises:
        UserError: it did not start; failed tasks only lack their difference.
    """
    if name_of(args.base_model) == (args.model_name or name_of(args.model_path)):
        raise UserError(
            f"--base_model {args.base_model} has the name of --model_path {args.model_path}; give --model_name"
        )
    drop = {"model_path", "base_model", "model_name", "timing_log", "forward_model_path"}
    command = [sys.executable, str(Path(__file__)), "--model_path", args.base_model]
    for name, value in vars(args).items():
        # By identity: a temperature of 0 equals False and is none.
        if name in drop or value is None or value is False or value == []:
            continue
        values = [] if value is True else [str(v) for v in (value if isinstance(value, list) else [value])]
        command += [f"--{name}", *values]
    if not args.embedder_config and Path(args.model_path).is_dir():
        command += ["--embedder_config", args.model_path]
    console.print(f"first the base model {args.base_model}", markup=False)
    code = subprocess.run(command, check=False).returncode
    summary = Summary.read(summary_folder(args.output_dir, name_of(args.base_model), args.no_thinking))
    if code not in (0, EXIT_TASK_FAILED) or summary is None:
        raise UserError(f"--base_model {args.base_model} could not be scored (exit code {code}, see above)")
    return summary


def report(evaluation: Evaluation, base: Summary | None) -> None:
    """The final table, and where everything is."""
    console, summary, usage = evaluation.console, evaluation.summary, evaluation.encoder.usage
    console.print(summary.table(base))
    for note in summary.notes():
        console.print(note, markup=False)
    console.print(
        f"{usage.generated_tokens:,} rationale tokens; {usage.hit_rate:.0%} of the vectors came from the store or over "
        f"a stored rationale; {usage.shortened:,} texts were cut to fit, {usage.empty_texts:,} were empty"
    )
    title = f"{summary.title}{'' if evaluation.options['think'] else ', without rationales'}"
    if put_scores(evaluation.encoder.folder, title, [*summary.score_lines(base), "", *summary.notes()]):
        console.print(f"scores added to {evaluation.encoder.folder}/README.md", markup=False)
    console.print(f"summary: {evaluation.folder}/summary.md   results: {evaluation.args.output_dir}/results")
    if evaluation.args.timing_log:
        evaluation.args.timing_log.write_text("\n".join([*timing_lines(summary), ""]))


def show_rationales(encoder: GraceEncoder, evaluation: Evaluation, count: int) -> list[str]:
    texts = sample_texts(evaluation.selection.tasks, STAND_INS)[:count]
    if not texts or not evaluation.options["think"]:
        return []
    rationales = encoder.encode(texts, return_rationales=True, show_progress_bar=False, **evaluation.options)[1]
    name = evaluation.summary.model["name"]
    return [f"[{name}] {t}\n    -> {' '.join(r.split())}" for t, r in zip(texts, rationales, strict=True)]


def summary_folder(output_dir: Path, name: str, no_thinking: bool) -> Path:
    return output_dir / (f"{name}_no_thinking" if no_thinking else name)


def _outcome(report: TaskReport) -> str:
    if report.error:
        return f"failed: {report.error}"
    return f"{report.metric} {report.score:.2f}" + (f" in {report.seconds:.1f} s" if report.seconds else "")


if __name__ == "__main__":
    sys.exit(main())

"""Evaluating a model on tasks, and its base model for comparison: the work of `eval_mteb.py`."""

import argparse
import json
import math
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import datasets
import mteb
import torch
from rich.console import Console

from verl.checkpoint.model_card import FILE_NAME as CARD
from verl.checkpoint.model_card import put_scores
from verl.checkpoint.model_folder import model_folder
from verl.embedding.centre import FILE_NAME as CENTRE_FILE
from verl.embedding.settings import EmbedderSettings, why_this_prompt
from verl.encoder.arguments import check_options
from verl.encoder.grace_encoder import GraceEncoder
from verl.encoder.store import StoreError
from verl.errors import UserError
from verl.evaluation.local_tasks import LocalTask
from verl.evaluation.mteb_model import GraceMTEB, described
from verl.evaluation.options import ASK_ABOVE_HOURS
from verl.evaluation.plan import Rate, has_rationales, measure_rate, plan_costs, plan_table, sample_texts
from verl.evaluation.published import Own, difference_from
from verl.evaluation.records import name_of
from verl.evaluation.report import Summary, TaskReport, timing_lines
from verl.evaluation.suites import Selection, select_tasks
from verl.utils.console import complain
from verl.utils.files import replace_file
from verl.utils.logging import quiet_libraries
from verl.utils.versions import installed_versions
from verl.workers.rollout.base import RolloutError

EXIT_TASK_FAILED = 1
_CHECKOUT = Path(__file__).parents[2]
# Of mteb's data loader, which would warn if it were not told; the encoder gets all texts of a call together.
_LOADER_ROWS = 256
# What the rate is measured on where no local task has texts.
SAMPLE_FILE = _CHECKOUT / "examples" / "sentences.txt"


def open_encoder(args: argparse.Namespace) -> GraceEncoder:
    num_processes = max(1, torch.cuda.device_count()) if args.num_processes is None else args.num_processes
    return GraceEncoder(
        args.model_path, engine=args.engine, device=args.device,
        settings=EmbedderSettings.read(args.embedder_config) if args.embedder_config else None,
        pooling=args.pooling_method, span=args.span, text_share=args.text_share,
        no_rationale_weight=args.no_rationale_weight, centre=False if args.no_centre else None,
        system_prompt=args.system_prompt,
        system_prompt_in=args.system_prompt_in, template_date=args.template_date,
        max_prompt_length=args.input_max_length, max_new_tokens=args.thinking_max_length,
        store=args.store or args.output_dir / "store",
        num_processes=num_processes, tensor_parallel_size=args.vllm_tensor_parallel_size,
        gpu_memory_utilization=args.vllm_gpu_memory_utilization, trust_remote_code=args.trust_remote_code,
        ignore_eos=args.ignore_eos,
    )  # fmt: skip


def encode_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `GraceEncoder.encode`, the same for every task."""
    options = {"seed": args.seed, "normalize_embeddings": args.normalize_embeddings}
    options |= {"think": False} if args.no_thinking else {}
    return options if args.temperature is None else {**options, "temperature": args.temperature}


class Evaluation:
    """One model on the selected tasks."""

    def __init__(self, args: argparse.Namespace, console: Console) -> None:
        self.args = args
        self.console = console
        self.selection: Selection = select_tasks(args.benchmark, args.suite, args.tasks, args.task_dir)
        self.encoder = open_encoder(args)
        self.options = encode_options(args)
        name = args.model_name or name_of(args.model_path)
        self.model = GraceMTEB(self.encoder, name, self.options, args.batch_size)
        self.cache = mteb.ResultCache(args.output_dir)
        self.folder = summary_folder(args.output_dir, name, args.no_thinking)
        self.summary = Summary(
            title=self.selection.title,
            comparable=self.selection.comparable,
            wanted=[task.metadata.name for task in self.selection.tasks],
            model={"name": name, "path": str(args.model_path), "revision": self.encoder.revision},
            settings=described(self.encoder, self.model.options),
            versions=installed_versions(),
            command=shlex.join([Path(sys.executable).name, *sys.argv]),
        )
        self.earlier = self._earlier_reports()

    def run(self, base: Summary | None) -> Summary:
        """Plan, run the tasks one by one, and write the summary after each.

        Args:
            base: the base model's summary, to show differences.
        """
        self.plan()
        for number, task in enumerate(self.selection.tasks, start=1):
            self.console.print(f"task {number} of {len(self.selection.tasks)}: {task.metadata.name}", markup=False)
            report = self.run_task(task)
            self.summary.tasks.append(report)
            self.summary.write(self.folder, base)
            self.console.print(f"  {_outcome(report)}", markup=False)
        return self.summary

    def plan(self) -> None:
        """Show what the tasks will cost, and ask for confirmation above ASK_ABOVE_HOURS.

        Raises:
            UserError: it is not confirmed, or there is no terminal to ask on.
        """
        args, tasks = self.args, self.selection.tasks
        engine = f"{self.encoder.backend.spec.engine} ({self.encoder.engine_reason})"
        thinks = has_rationales(self.encoder, self.options)
        self.console.print(
            f"{len(tasks)} tasks ({self.selection.title}); rationales: {engine if thinks else 'none'}", markup=False
        )
        why = why_this_prompt(args.embedder_config or self.encoder.folder, args.system_prompt)
        self.console.print(f"system prompt: {self.encoder.settings.prompt_line()} ({why})", markup=False)
        for note in (note for task in tasks if isinstance(task, LocalTask) for note in task.notes):
            self.console.print(note, markup=False)
        rate = self._measured_rate()
        if rate is None:
            self.console.print("no plan: the sample was in the store already, and its rate is not known")
            return
        costs = plan_costs(tasks, rate, thinks)
        self.console.print(plan_table(costs, rate))
        hours = sum(cost.hours for cost in costs)
        if hours > ASK_ABOVE_HOURS and not args.yes:
            self._ask(hours)

    def run_task(self, task: Any) -> TaskReport:
        """Let mteb run a task, or find its result; a failure becomes the report's error."""
        name = task.metadata.name
        report = TaskReport(name, task.metadata.type, task.metadata.main_score)
        stored = self.cache.load_task_result(name, self.model.mteb_model_meta)
        # mteb also reuses a finished result when the task's data has changed.
        outdated = stored is not None and stored.dataset_revision != task.metadata.revision
        before, start = replace(self.encoder.usage), time.perf_counter()
        result = mteb.evaluate(
            self.model, task, cache=self.cache, raise_error=False, co2_tracker=False,
            overwrite_strategy="always" if outdated or self.args.overwrite else "only-missing",
            encode_kwargs={"batch_size": _LOADER_ROWS, "show_progress_bar": False}, show_progress_bar=False,
        )  # fmt: skip
        spent = self.encoder.usage - before
        if result.exceptions:
            report.error = result.exceptions[0].exception or "no message"
        elif not math.isfinite(result.task_results[0].get_score()):
            report.error = f"{report.metric} is {result.task_results[0].get_score()}: are all similarities equal?"
        if report.error:
            # When a part of an aggregated task failed, mteb keeps a result without a score.
            self.cache.get_task_result_path(name, self.model.mteb_model_meta).unlink(missing_ok=True)
            return report
        ran = spent.texts > 0
        if not ran and name in self.earlier:
            return self.earlier[name]
        (task_result,) = result.task_results
        report.score = 100 * task_result.get_score()
        report.seconds = time.perf_counter() - start if ran else task_result.evaluation_time
        report.usage = asdict(spent) if ran else None
        return report

    def _earlier_reports(self) -> dict[str, TaskReport]:
        """By task, the reports of an earlier run with the same weights and settings."""
        earlier = Summary.read(self.folder)
        if earlier is None or earlier.model["revision"] != self.encoder.revision:
            return {}
        if earlier.settings != self.summary.settings:
            return {}
        return {task.name: task for task in earlier.tasks}

    def _measured_rate(self) -> Rate | None:
        """The rate on a sample, or that of an earlier run by the same settings whose vectors are in the store; None =
        not known."""
        file = self.folder / "rate.json"
        before = replace(self.encoder.usage)
        texts = sample_texts(self.selection.tasks, SAMPLE_FILE)
        rate = measure_rate(self.encoder, texts, self.options, self.args.batch_size)
        self.summary.sample_usage = asdict(self.encoder.usage - before)
        if rate:
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, json.dumps({"settings": self.summary.settings, "rate": asdict(rate)}) + "\n")
        elif file.is_file() and (earlier := json.loads(file.read_text())).get("settings") == self.summary.settings:
            rate = Rate(**earlier["rate"])
        return rate

    def _ask(self, hours: float) -> None:
        if not sys.stdin.isatty():
            raise UserError(
                f"this takes about {hours:.0f} hours; give --yes to run it, or --suite quick, --no_thinking, or a "
                "smaller --thinking_max_length"
            )
        answer = self.console.input(f"This takes about {hours:.0f} hours. Continue? [y/N] ")
        if answer.strip().lower() not in ("y", "yes"):
            raise UserError("not started")


def run_program(args: argparse.Namespace) -> int:
    """Evaluate as the arguments of `eval_mteb.py` ask for; the exit code."""
    quiet_libraries()
    datasets.disable_progress_bars()
    # Wide enough that no table is wrapped in a file or a pipe.
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
    try:
        check_options(args.temperature, args.batch_size)
        base = score_base(args, console) if args.base_model else None
        evaluation = Evaluation(args, console)
        with evaluation.encoder as encoder:
            summary = evaluation.run(base)
            report(evaluation, base)
            shown = show_rationales(encoder, evaluation, args.show)
    except (UserError, StoreError, ValueError, OSError) as error:
        return complain("eval_mteb", error)
    except RolloutError as error:  # not in a task, whose failure is its report: in the sample of the plan
        complain("eval_mteb: the engine failed before any task was run", error)
        return EXIT_TASK_FAILED
    console.print("\n".join(shown), markup=False, end="\n" if shown else "")
    return EXIT_TASK_FAILED if summary.missing else 0


def score_base(args: argparse.Namespace, console: Console) -> Summary:
    """Run this program on the base model, in another process: two models may not fit a GPU's memory together.

    A task that fails there only lacks its difference.

    Raises:
        UserError: the base model could not be evaluated to its end, or has no centre where the settings want one.
        ValueError: there is no model under test.
    """
    if name_of(args.base_model) == (args.model_name or name_of(args.model_path)):
        raise UserError(
            f"--base_model {args.base_model} has the name of --model_path {args.model_path}; give --model_name"
        )
    settings = args.embedder_config or model_folder(args.model_path)
    _check_centre_of_base(args, settings)
    folder = summary_folder(args.output_dir, name_of(args.base_model), args.no_thinking)
    before = Summary.written_at(folder)
    console.print(f"first the base model {args.base_model}", markup=False)
    code = subprocess.run(_base_command(args, settings), check=False).returncode
    # A crash has the exit code of a failed task. It leaves an earlier process's summary, or one without the last tasks.
    summary = None if Summary.written_at(folder) == before else Summary.read(folder)
    if code not in (0, EXIT_TASK_FAILED) or summary is None or len(summary.tasks) < len(summary.wanted):
        raise UserError(
            f"--base_model {args.base_model} could not be evaluated (exit code {code}, see above); put that right and "
            "start the command again, or leave --base_model out"
        )
    return summary


def _base_command(args: argparse.Namespace, settings: Path) -> list[str]:
    """The command that evaluates the base model on the same tasks, with the same options and with `settings`."""
    drop = {"model_path", "base_model", "model_name", "timing_log", "forward_model_path", "embedder_config"}
    command = [sys.executable, str(_CHECKOUT / "eval_mteb.py"), "--model_path", args.base_model]
    for name, value in vars(args).items():
        # `is`, because a temperature of 0 equals False.
        if name in drop or value is None or value is False or value == []:
            continue
        values = [] if value is True else [str(v) for v in (value if isinstance(value, list) else [value])]
        command += [f"--{name}", *values]
    return [*command, "--embedder_config", str(settings)]


def _check_centre_of_base(args: argparse.Namespace, settings: Path) -> None:
    """Raise `UserError` if the base model has no centre and the settings, those of the other model, want one."""
    if args.no_centre or not EmbedderSettings.read(settings).centre:
        return
    if not (model_folder(args.base_model) / CENTRE_FILE).is_file():
        raise UserError(
            f"--base_model {args.base_model} is scored by the settings of {settings}, which take the mean vector out "
            f"(centre), and has none; compare both without it (--no_centre), or make one with python3 -m verl.centre "
            f"--model {args.base_model} --input FILE --output FOLDER, and give --base_model FOLDER"
        )


def report(evaluation: Evaluation, base: Summary | None) -> None:
    """Print the final table and the paths of the results, add the scores to the model card, write the timing log."""
    console, summary, usage = evaluation.console, evaluation.summary, evaluation.encoder.usage
    console.print(summary.table(base))
    for note in summary.notes():
        console.print(note, markup=False)
    console.print(
        f"{usage.generated_tokens:,} rationale tokens; {usage.hit_rate:.0%} of the vectors were stored or used a "
        f"stored rationale; {usage.shortened:,} texts were cut to fit, {usage.empty_texts:,} were empty"
    )
    other = _not_its_own(evaluation)
    title, card = f"{summary.title}; {other}" if other else summary.title, evaluation.encoder.folder / CARD
    try:
        if put_scores(evaluation.encoder.folder, title, [*summary.score_lines(base), "", *summary.notes()]):
            console.print(f"scores added to {card}", markup=False)
    except OSError as error:  # a folder that may not be written to; the summary has the scores too
        console.print(f"the scores could not be added to {card}: {error}", markup=False)
    console.print(f"summary: {evaluation.folder}/summary.md   results: {evaluation.args.output_dir}/results")
    if evaluation.args.timing_log:
        evaluation.args.timing_log.write_text("\n".join([*timing_lines(summary), ""]))


def _not_its_own(evaluation: Evaluation) -> str:
    """Which setting is not that of the model's folder, for the title in its card; an empty string = none."""
    encoder = evaluation.encoder
    try:
        own = Own.read(encoder.folder, encoder.tokenizer)
    except UserError as error:  # given settings or --no_centre take the place of what cannot be read
        return f"its own settings cannot be read ({error})"
    return difference_from(own, evaluation.summary.settings)


def show_rationales(encoder: GraceEncoder, evaluation: Evaluation, count: int) -> list[str]:
    """`count` texts with their rationales, for people to read; none without rationales."""
    texts = sample_texts(evaluation.selection.tasks, SAMPLE_FILE)[:count]
    if not texts or not has_rationales(encoder, evaluation.options):
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

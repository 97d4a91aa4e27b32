"""Exact match of a model and its base model on questions: the work of `verl.eval_generation`."""

import argparse
import json
import math
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from verl.checkpoint.model_folder import model_folder, weights_revision
from verl.embedding.prompts import PromptRenderer
from verl.embedding.settings import EmbedderSettings
from verl.encoder.arguments import check_batch_size
from verl.encoder.backend import Backend, ModelSpec
from verl.errors import UserError
from verl.evaluation.exact_match import Judged, Question, compare, judge, read_questions, score
from verl.evaluation.records import name_of
from verl.models.lora import whole_model_of
from verl.models.policy import context_of
from verl.utils.answers import MARK
from verl.utils.console import complain
from verl.utils.files import replace_file
from verl.utils.logging import quiet_libraries
from verl.utils.progress import count_bar
from verl.utils.tokenizer import load_tokenizer
from verl.utils.versions import installed_versions
from verl.workers.rollout.base import Response, Responses, RolloutError, row_seeds
from verl.workers.rollout.choose import choose_device_and_engine

EXIT_ENGINE_FAILED = 1
EXIT_USER_ERROR = 2
# The smallest value of each numeric option.
LEAST = {"num_examples": 1, "max_new_tokens": 1, "max_prompt_length": 1, "temperature": 0, "seed": 0}
# The rows of the table by key of the record: title, format, and whether the difference to the base model is shown.
SHOWN = {
    "exact_match": ("exact match, %", ".2f", True),
    "standard_error": ("standard error, %", ".2f", False),
    "truncated": ("hit the token limit, %", ".1f", True),
    "no_number": ("no number, %", ".1f", True),
    "read_after_mark": (f"answers read after {MARK}", "d", True),
    "read_last_number": ("answers read as last number", "d", True),
    "mean_tokens": ("mean tokens", ".1f", True),
    "tokens_per_s": ("tokens/s", ".1f", False),
}


def run_program(args: argparse.Namespace) -> int:
    """Evaluate as the arguments of `verl.eval_generation` ask for; the exit code."""
    quiet_libraries()
    # Wide enough that no table is wrapped in a file or a pipe.
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
    try:
        run(args, console)
    except RolloutError as error:
        complain("eval_generation", error)
        return EXIT_ENGINE_FAILED
    except (ValueError, OSError) as error:
        complain("eval_generation", error)
        return EXIT_USER_ERROR
    return 0


def run(args: argparse.Namespace, console: Console) -> None:
    """Check what can be checked without loading weights, run the base model, then the model.

    Raises:
        UserError, ValueError, OSError: an argument or a file is wrong.
        RolloutError: the engine failed.
    """
    check_args(args)
    questions = read_questions(args.data, args.num_examples)
    device, engine, reason = choose_device_and_engine(args.device, args.engine)
    folder = model_folder(args.model_path)
    tokenizer = load_tokenizer(str(folder))
    prompts = render(tokenizer, questions, args, EmbedderSettings.read(folder))
    spec = ModelSpec(str(folder), engine, device, fit_context(folder, prompts, args.max_new_tokens))
    target = args.output_dir / name_of(args.model_path)
    target.mkdir(parents=True, exist_ok=True)
    base = run_base(args, console) if args.base_model else None
    console.print(f"{len(prompts)} questions for {args.model_path} with {engine} ({reason})", markup=False)
    responses, seconds = generate(Backend(spec), prompts, args)
    texts = tokenizer.batch_decode([response.ids for response in responses], skip_special_tokens=True)
    rows = [
        judge(question, text, len(response.ids), response.truncated)
        for question, text, response in zip(questions, texts, responses, strict=True)
    ]
    record = score(rows, seconds) | describe(args, spec, target.name)
    if base:
        record["base"] = {
            "model": base[0]["model"],
            "exact_match": base[0]["exact_match"],
            "difference": record["exact_match"] - base[0]["exact_match"],
            **compare(base[1], rows),
        }
    replace_file(target / "generations.jsonl", "".join(json.dumps(asdict(row)) + "\n" for row in rows))
    replace_file(target / "generation.json", json.dumps(record, indent=1) + "\n")
    console.print(result_table(record, base[0] if base else None))
    if base:
        console.print("only {} right: {only_base_right}   only {} right: {only_model_right}".format(
            base[0]["model"]["name"], target.name, **record["base"]), markup=False)  # fmt: skip
    console.print(f"results: {target}", markup=False)


def check_args(args: argparse.Namespace) -> None:
    check_batch_size(args.batch_size)
    for name, least in LEAST.items():
        value = getattr(args, name)
        if not least <= value < math.inf:
            raise UserError(f"--{name} is {value}; give {least} or more")
    if args.base_model and name_of(args.base_model) == name_of(args.model_path):
        raise UserError(
            f"--base_model {args.base_model} has the name of --model_path {args.model_path}, and the results of one "
            "would replace the other's; rename a folder, or run each alone with an --output_dir of its own"
        )


def render(
    tokenizer: Any, questions: Sequence[Question], args: argparse.Namespace, settings: EmbedderSettings
) -> list[list[int]]:
    """Token ids of each question in the model's chat template, dated as in the model's settings.

    Raises:
        ValueError: the tokenizer has no template or one that fails, or a prompt is longer than the limit.
    """
    renderer = PromptRenderer(tokenizer, template_date=settings.template_date)
    turns = [f"{question.text}\n\n{args.instruction}".strip() for question in questions]
    chats = [[{"role": "user", "content": turn}] for turn in turns]
    prompts = [prompt.ids for prompt in renderer.render(chats)]
    for question, ids in zip(questions, prompts, strict=True):
        if len(ids) > args.max_prompt_length:
            raise UserError(
                f"{question.where}: the prompt has {len(ids)} tokens, more than --max_prompt_length "
                f"{args.max_prompt_length}; raise it, or remove the row"
            )
    return prompts


def fit_context(folder: Path, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    """Tokens of the longest prompt and response together.

    Raises:
        UserError: more than the model's context, beyond which its output is meaningless.
    """
    wanted = max(map(len, prompts)) + max_new_tokens
    context = context_of(AutoConfig.from_pretrained(whole_model_of(str(folder))))
    if context is not None and wanted > context:
        raise UserError(
            f"--max_new_tokens {max_new_tokens} after the longest prompt makes {wanted} tokens, beyond the model's "
            f"context of {context}; lower it by {wanted - context}"
        )
    return wanted


def generate(
    backend: Backend, prompts: Sequence[Sequence[int]], args: argparse.Namespace
) -> tuple[list[Response], float]:
    """The responses in the order of their prompts, and the seconds of generating them without the engine's start.

    Raises:
        RolloutError: the engine failed, or left a question without a response.
    """
    seeds = row_seeds(args.seed, len(prompts))
    parts = backend.generate(prompts, args.temperature, args.max_new_tokens, seeds, args.batch_size)
    responses: Responses = {}
    start = time.perf_counter()
    with count_bar(len(prompts), "answering") as advance:
        for ended in parts:
            responses |= ended
            advance(len(ended))
    if len(responses) != len(prompts):
        raise RolloutError(f"the engine answered {len(responses)} of {len(prompts)} questions")
    return [responses[row] for row in range(len(prompts))], time.perf_counter() - start


def describe(args: argparse.Namespace, spec: ModelSpec, name: str) -> dict[str, Any]:
    """Model, settings and versions that the results belong to."""
    settings = {key: value for key, value in vars(args).items() if key in (*LEAST, "batch_size", "instruction")}
    return {
        "model": {"name": name, "path": args.model_path, "revision": weights_revision(Path(spec.folder))},
        "settings": {"data": str(args.data), **settings, "engine": spec.engine, "device": spec.device},
        "versions": installed_versions(),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
    }


def run_base(args: argparse.Namespace, console: Console) -> tuple[dict[str, Any], list[Judged]]:
    """Run this program on the base model, in another process: two models may not fit a GPU's memory together.

    Raises:
        UserError: an argument is wrong for the base model.
        RolloutError: its engine failed.
    """
    given = {**vars(args), "model_path": args.base_model, "base_model": None}
    options = [f"--{name}={value}" for name, value in given.items() if value is not None]
    console.print(f"first the base model {args.base_model}", markup=False)
    code = subprocess.run([sys.executable, "-m", "verl.eval_generation", *options], check=False).returncode
    if code:
        kind = UserError if code == EXIT_USER_ERROR else RolloutError
        raise kind(f"--base_model {args.base_model} could not be evaluated (exit code {code}, see above)")
    folder = args.output_dir / name_of(args.base_model)
    with (folder / "generations.jsonl").open() as lines:
        rows = [Judged(**json.loads(line)) for line in lines]
    return json.loads((folder / "generation.json").read_text()), rows


def result_table(record: dict[str, Any], base: dict[str, Any] | None) -> Table:
    name, data = record["model"]["name"], Path(record["settings"]["data"]).name
    table = Table(title=f"{name}: {record['count']} questions of {data}", title_justify="left")
    for column in ["", *(["base", "model", "difference"] if base else ["model"])]:
        table.add_column(column, justify="right" if column else "left")
    for key, (title, form, comparable) in SHOWN.items():
        cells = [f"{one[key]:{form}}" for one in (base, record) if one]
        if base and comparable:
            cells.append(f"{record[key] - base[key]:+{form}}")
        table.add_row(title, *cells)
    return table

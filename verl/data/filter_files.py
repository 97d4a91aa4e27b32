"""Filtering the training and validation file by length: the work of `offline_filter_data.py`."""

import argparse
import importlib
import tempfile
from dataclasses import asdict
from pathlib import Path

import orjson
import pyarrow.parquet as pq

from verl.data.length_filter import FilterReport, FilterSettings, filter_file, load_renderer, open_prompts
from verl.data.parallel import build_mapper
from verl.data.publish import move_into
from verl.errors import UserError
from verl.utils.console import complain, say
from verl.utils.cpus import usable_cpus
from verl.utils.versions import installed_versions

ROWS_WORTH_A_PROCESS = 50_000
"""Starting a process takes about as long as measuring this many rows."""


def run_program(args: argparse.Namespace) -> int:
    """Filter as the arguments of `offline_filter_data.py` ask for; the exit code."""
    importlib.import_module(_preload(args.trust_remote_code))
    try:
        run(args)
    except (UserError, OSError) as error:
        return complain("offline_filter_data", error)
    return 0


def open_inputs(args: argparse.Namespace) -> dict[str, pq.ParquetFile]:
    """The inputs by the name of their split, once it is sure that all can be used."""
    paths = {"train": args.train_parquet} | ({"test": args.val_parquet} if args.val_parquet else {})
    for path in paths.values():
        if path.resolve() in {(args.out_dir / f"{split}.parquet").resolve() for split in ("train", "test")}:
            raise UserError(f"{path} would be overwritten or removed; give another --out_dir")
    files = {split: open_prompts(path, args.prompt_key) for split, path in paths.items()}
    if files["train"].metadata.num_rows == 0:
        raise UserError(f"{args.train_parquet} has no rows")
    return files


def load_settings(args: argparse.Namespace) -> FilterSettings:
    if args.max_len < 1:
        raise UserError(f"--max_len is {args.max_len}; give 1 or more")
    settings = FilterSettings(
        args.tokenizer_path, args.max_len, args.prompt_key, args.trust_remote_code,
        args.system_prompt_in or "system", args.template_date,
    )  # fmt: skip
    try:
        load_renderer(settings)
    except ValueError as error:
        raise UserError(f"--tokenizer_path: {error}") from error
    return settings


def _preload(trust_remote_code: bool) -> str:
    """The module that a tokenizing process starts with."""
    return "transformers.models.auto.tokenization_auto" if trust_remote_code else "verl.data.without_torch"


def filter_inputs(
    files: dict[str, pq.ParquetFile], settings: FilterSettings, num_proc: int, folder: Path
) -> dict[str, FilterReport]:
    """Filter each input into `folder`, and write filter.json there."""
    num_rows = sum(file.metadata.num_rows for file in files.values())
    num_proc = min(num_proc, num_rows // ROWS_WORTH_A_PROCESS)
    reports: dict[str, FilterReport] = {}
    with build_mapper(num_proc, _preload(settings.trust_remote_code)) as mapper:
        for split, file in files.items():
            try:
                reports[split] = filter_file(file, folder / f"{split}.parquet", settings, mapper)
            except UserError as error:
                raise UserError(f"the {split} file cannot be filtered: {error}") from error
    if reports["train"].kept == 0:
        longest = ", ".join(f"{name} {length}" for name, length in reports["train"].longest.items())
        raise UserError(
            f"no training row is left: each has a text over --max_len {settings.max_len} tokens (longest: {longest})"
        )
    write_record(settings, reports, folder / "filter.json")
    return reports


def write_record(settings: FilterSettings, reports: dict[str, FilterReport], path: Path) -> None:
    renderer = load_renderer(settings)
    record = {
        **asdict(settings),
        "tokenizer_hash": renderer.fingerprint(),
        "splits": {
            split: {**asdict(report), "percent_kept": round(report.percent_kept, 3)}
            for split, report in reports.items()
        },
        "versions": installed_versions(),
    }
    path.write_bytes(orjson.dumps(record, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def summarise(reports: dict[str, FilterReport], args: argparse.Namespace) -> None:
    for split, report in reports.items():
        dropped = report.rows - report.kept
        say(
            f"{split}: kept {report.kept:,} of {report.rows:,} rows ({report.percent_kept:.1f}%), "
            f"dropped {dropped:,}, in {args.out_dir / split}.parquet"
        )
        for name, over_long in report.over_long.items():
            say(f"  {name}: {over_long:,} over {args.max_len} tokens, longest {report.longest[name]:,}")


def remove_earlier_test(path: Path) -> None:
    """Remove the validation file of an earlier run, whose samples may be among the training samples now."""
    if path.is_file():
        path.unlink()
        say(f"{path}, of an earlier run, is removed; give --val_parquet to write a new one")


def run(args: argparse.Namespace) -> None:
    files = open_inputs(args)
    settings = load_settings(args)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    # On the same file system as the outputs, so that moving them into place is a rename.
    with tempfile.TemporaryDirectory(prefix=".offline_filter-", dir=args.out_dir) as scratch:
        reports = filter_inputs(files, settings, args.num_proc or usable_cpus(), Path(scratch))
        if "test" not in files:
            remove_earlier_test(args.out_dir / "test.parquet")
        move_into(args.out_dir, sorted(Path(scratch).iterdir(), key=lambda path: path.suffix == ".json"))
    summarise(reports, args)

"""Drop rows whose prompts are too long for training, and store every prompt's length beside its row.

    python3 offline_filter_data.py --train_parquet data/mine/train.parquet \\
        --val_parquet data/mine/test.parquet --out_dir data/mine_filtered \\
        --tokenizer_path models/SmolLM2-135M-Instruct

A row is kept if all its texts fit: the prompt, and of a triplet the query and the negative too. The outputs
(train.parquet, test.parquet, filter.json) appear together at the end.
"""

import argparse
import importlib
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import orjson
import pyarrow.parquet as pq

from verl.data.length_filter import FilterReport, FilterSettings, filter_file, load_renderer, open_parquet
from verl.data.parallel import build_mapper
from verl.data.publish import move_into
from verl.errors import UserError
from verl.prompt_options import add_template_flags
from verl.utils.console import complain, say
from verl.utils.versions import installed_versions

ROWS_WORTH_A_PROCESS = 50_000
"""Starting a process takes about as long as measuring this many rows."""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="offline_filter_data.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # whether torch is loaded depends on one flag, in full, before this runs
    )
    num_cpus = len(os.sched_getaffinity(0))
    add = parser.add_argument
    add("--train_parquet", type=Path, required=True)
    add("--val_parquet", type=Path, help="written as test.parquet, whatever its name")
    add("--out_dir", type=Path, required=True)
    add("--tokenizer_path", required=True, help="folder or hub name of the model that will be trained")
    add("--max_len", type=int, default=1024, help="most tokens a prompt may have (data.max_prompt_length)")
    add("--num_proc", type=int, default=num_cpus, help="most processes to measure with; default: all CPUs")
    add("--prompt_key", default="prompt", help="the column of chat messages")
    add_template_flags(parser, "as in training without data.system_prompt_in and data.template_date")
    add("--trust_remote_code", action="store_true", help="run Python code that the tokenizer's folder brings")
    return parser.parse_args(argv)


def open_inputs(args: argparse.Namespace) -> dict[str, pq.ParquetFile]:
    """The inputs by the name of their split, once it is sure that all can be used."""
    paths = {"train": args.train_parquet} | ({"test": args.val_parquet} if args.val_parquet else {})
    for path in paths.values():
        if path.resolve() in {(args.out_dir / f"{split}.parquet").resolve() for split in paths}:
            raise UserError(f"{path} would be overwritten; give another --out_dir")
    files = {split: open_parquet(path, args.prompt_key) for split, path in paths.items()}
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


def run(args: argparse.Namespace) -> None:
    files = open_inputs(args)
    settings = load_settings(args)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    # On the same file system as the outputs, so that moving them into place is a rename.
    with tempfile.TemporaryDirectory(prefix=".offline_filter-", dir=args.out_dir) as scratch:
        reports = filter_inputs(files, settings, args.num_proc, Path(scratch))
        move_into(args.out_dir, sorted(Path(scratch).iterdir(), key=lambda path: path.suffix == ".json"))
    summarise(reports, args)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        run(args)
    except (UserError, OSError) as error:
        return complain("offline_filter_data", error)
    return 0


if __name__ == "__main__":
    importlib.import_module(_preload("--trust_remote_code" in sys.argv))
    sys.exit(main())

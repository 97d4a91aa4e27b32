"""Turn raw texts or triplets into the parquet files that training reads.

    python3 process_data.py --mode supervised --input_file triplets.jsonl --local_dir data/mine

Streams: memory does not grow with the input, but for 8 bytes a sample to count duplicates. All outputs
appear together at the end; a run that fails leaves the folder's earlier outputs alone, and
rejected.jsonl as evidence. Imports neither torch nor ray nor transformers.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

from verl.data.ingest import Counts, RejectLog, Spool, ingest
from verl.data.publish import copy_to, describe_file, move_into
from verl.data.readers import open_source
from verl.data.samples import INSTRUCTION, MODES, describe_need
from verl.data.schema import REPEATING_COLUMNS, SCHEMAS, build_rows
from verl.data.split import DuplicateCounter, build_splitter
from verl.data.writer import JsonArraySink, ParquetSink
from verl.embedding.prompts import SYSTEM_PROMPT
from verl.errors import UserError
from verl.prompt_options import add_system_prompt_flag, read_system_prompt
from verl.utils.console import complain, say, track
from verl.utils.versions import installed_versions

SPLITS = ("train", "test")
PARQUET = ("train.parquet", "test.parquet")
JSON = ("train.json", "test.json")
ODD_LINES = 0.1
"""Share of bad lines above which the form of the file is wrong, and --max_rejected no remedy."""
REJECTED, MANIFEST = "rejected.jsonl", "manifest.json"


@dataclass
class Totals:
    """What the two splits hold."""

    train: int = 0
    test: int = 0
    duplicates: int = 0
    """Samples whose texts equal an earlier sample's."""
    test_also_in_train: int = 0
    """Test samples whose texts are in the training split too."""
    example: str = ""
    """Beginning of the first training prompt's text."""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="process_data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--mode", choices=MODES, required=True, help="supervised: triplets; unsupervised: texts")
    add(
        "--input_file",
        type=Path,
        required=True,
        help="JSON lines, a JSON array, CSV, TSV, parquet, or .txt; also compressed (gzip, zstd, bzip2)",
    )
    add(
        "--columns",
        type=_names,
        default=[],
        help="query,positive,negative: the columns of a table without a header, or of JSON lists",
    )
    add("--local_dir", type=Path, required=True, help="output folder, made if it is not there")
    add("--hdfs_dir", help="also copy the outputs here: a folder or a URI (hdfs://, s3://, file://, ...)")
    add("--test_ratio", type=float, default=0.01, help="share of the samples that form the test split")
    add("--max_samples", type=int, help="stop after this many good samples")
    add_system_prompt_flag(parser, "this project's own")
    add("--seed", type=int, help="draw the test split at random; else it is the leading samples")
    add("--max_rejected", type=float, default=0.01, help="largest share of bad lines that is put up with")
    add("--write_json", action="store_true", help="also write train.json and test.json")
    return parser.parse_args(argv)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def check_args(args: argparse.Namespace) -> None:
    if not 0 <= args.test_ratio < 1:
        raise UserError(f"--test_ratio is {args.test_ratio}; give a share of at least 0 and less than 1")
    if not 0 <= args.max_rejected <= 1:
        raise UserError(f"--max_rejected is {args.max_rejected}; give a share between 0 and 1")
    if args.max_samples is not None and args.max_samples < 1:
        raise UserError(f"--max_samples is {args.max_samples}; give 1 or more")
    if args.local_dir.exists() and not args.local_dir.is_dir():
        raise UserError(f"--local_dir {args.local_dir} is not a folder")
    outputs = {(args.local_dir / name).resolve() for name in (*PARQUET, *JSON, REJECTED, MANIFEST)}
    if args.input_file.resolve() in outputs:
        raise UserError(f"--input_file {args.input_file} would be overwritten; give another --local_dir")


def check_counts(args: argparse.Namespace, counts: Counts, first_rejects: list[str]) -> None:
    """Raise a UserError if too little of the input could be used."""
    if counts.accepted == 0 and counts.lacking_field == counts.rejected > 0:
        raise UserError(
            f"no line of {args.input_file} has the fields of a sample: found "
            f"{', '.join(counts.names_found) or '(none)'}; {describe_need(args.mode, counts.names_found)}"
        )
    share = counts.rejected / max(counts.rejected + counts.accepted, 1)
    if share > args.max_rejected:
        way_out = "mend them, or raise --max_rejected"
        if share > ODD_LINES:
            way_out = "give the file the form that the reasons ask for; raising --max_rejected would leave little of it"
        raise UserError(
            f"{counts.rejected:,} of {counts.lines:,} lines of {args.input_file} were rejected ({share:.1%}, "
            f"more than --max_rejected {args.max_rejected}): {'; '.join(first_rejects)}. "
            f"All are in {args.local_dir / REJECTED}; {way_out}"
        )
    if instruction := counts.positives.find_instruction():
        raise UserError(
            f"every list of positives in {args.input_file} begins with {instruction[:60]!r}, like an instruction; "
            "write [instruction, text] as one text"
        )
    if counts.accepted == 0:
        raise UserError(
            f"{args.input_file} has no sample: {counts.blank:,} lines are blank, {counts.rejected:,} rejected"
        )


def write_splits(args: argparse.Namespace, spool: Spool, num_samples: int, folder: Path) -> Totals:
    """Second pass: divide the spooled samples and write every file of each split into `folder`."""
    is_test = build_splitter(num_samples, args.test_ratio, args.seed)
    duplicates, totals = DuplicateCounter(), Totals()
    with ExitStack() as stack:
        sinks: dict[str, ParquetSink] = {}
        arrays: dict[str, JsonArraySink] = {}
        for split in SPLITS:
            path = folder / f"{split}.parquet"
            sinks[split] = stack.enter_context(ParquetSink(path, SCHEMAS[args.mode], REPEATING_COLUMNS))
            if args.write_json:
                arrays[split] = stack.enter_context(JsonArraySink(folder / f"{split}.json"))
        for batch in spool.batches():
            mask = is_test(len(batch))
            for split, chosen in (("train", ~mask), ("test", mask)):
                samples = batch.filter(chosen)
                rows = build_rows(args.mode, samples, split, sinks[split].num_rows, args.system_prompt or None)
                sinks[split].add(rows)
                duplicates.add(split, samples["hash"].to_numpy())
                if args.write_json:
                    arrays[split].add(rows)
                if split == "train" and not totals.example and len(rows):
                    totals.example = rows["prompt"][0].as_py()[-1]["content"][:200]
    totals.train, totals.test = sinks["train"].num_rows, sinks["test"].num_rows
    totals.duplicates, totals.test_also_in_train = duplicates.count()
    return totals


def write_manifest(args: argparse.Namespace, counts: Counts, totals: Totals, folder: Path) -> None:
    """Describe the run and every file in `folder`, in `folder`/manifest.json."""
    manifest = {
        "arguments": vars(args),
        "counts": {
            **{name: getattr(counts, name) for name in ("lines", "blank", "accepted", "rejected")},
            **{name: value for name, value in asdict(totals).items() if name != "example"},
        },
        "input": {"path": str(args.input_file), **describe_file(args.input_file)},
        "outputs": {path.name: describe_file(path) for path in sorted(folder.iterdir())},
        "versions": installed_versions(),
    }
    layout = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE
    (folder / MANIFEST).write_bytes(orjson.dumps(manifest, default=str, option=layout))


def prepare(args: argparse.Namespace, spool_path: Path, folder: Path) -> tuple[Counts, Totals]:
    """Write every output into `folder`."""
    with (
        open_source(args.input_file, args.mode, args.columns) as source,
        RejectLog(folder / REJECTED) as rejects,
        Spool(spool_path, args.mode) as spool,
    ):
        records = track(source.records, "reading", source.position, source.size)
        counts = ingest(records, args.mode, spool, rejects, args.max_samples)
    try:
        check_counts(args, counts, rejects.first)
    except UserError:
        move_into(args.local_dir, [folder / REJECTED])
        raise
    totals = write_splits(args, spool, counts.accepted, folder)
    spool_path.unlink()
    write_manifest(args, counts, totals, folder)
    return counts, totals


def publish(args: argparse.Namespace, folder: Path) -> None:
    """Move the files of `folder` to --local_dir, the manifest last, and copy them to --hdfs_dir."""
    names = sorted((path.name for path in folder.iterdir()), key=lambda name: name == MANIFEST)
    move_into(args.local_dir, [folder / name for name in names])
    if not args.write_json:
        for name in JSON:  # an earlier run's, about other samples
            (args.local_dir / name).unlink(missing_ok=True)
    if args.hdfs_dir:
        copy_to(args.hdfs_dir, [args.local_dir / name for name in names])


def summarise(args: argparse.Namespace, counts: Counts, totals: Totals) -> None:
    where = f"{args.local_dir}" + (f" and {args.hdfs_dir}" if args.hdfs_dir else "")
    say(
        f"{args.input_file}: {counts.lines:,} lines, {counts.accepted:,} accepted, {counts.blank:,} blank, "
        f"{counts.rejected:,} rejected\n"
        f"train {totals.train:,} rows, test {totals.test:,} rows, in {where}\n"
        f"{totals.duplicates:,} samples repeat an earlier one; {totals.test_also_in_train:,} test samples "
        f"are also in train\n"
        f"first training prompt: {totals.example!r}" + _unread_instructions(counts)
    )


def _unread_instructions(counts: Counts) -> str:
    if not counts.instructions:
        return ""
    return (
        f"\nthe column {INSTRUCTION} of {counts.instructions:,} samples is not read; where it is an instruction that "
        "the model is to see, write it into the query"
    )


def run(args: argparse.Namespace) -> None:
    check_args(args)
    # Its text, so that the manifest has it too.
    args.system_prompt = SYSTEM_PROMPT if args.system_prompt is None else read_system_prompt(args.system_prompt)
    with open_source(args.input_file, args.mode, args.columns):
        pass  # a missing or empty input is told before the output folder is made
    args.local_dir.mkdir(parents=True, exist_ok=True)
    # On the same file system as the outputs, so that moving them into place is a rename.
    with tempfile.TemporaryDirectory(prefix=".process_data-", dir=args.local_dir) as scratch:
        folder = Path(scratch) / "outputs"
        folder.mkdir()
        counts, totals = prepare(args, Path(scratch) / "spool.arrow", folder)
        publish(args, folder)
    summarise(args, counts, totals)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        run(args)
    except (UserError, OSError) as error:
        return complain("process_data", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())

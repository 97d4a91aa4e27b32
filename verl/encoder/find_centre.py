"""Finding the centre of a model's vectors: the work of `python3 -m verl.centre`."""

import argparse
import random
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from verl.checkpoint.model_card import put_settings
from verl.checkpoint.model_folder import model_folder
from verl.data.parquet import is_text, open_parquet
from verl.data.prompt_rows import TRIPLET, TRIPLET_FIELDS
from verl.data.readers import open_source, read_samples
from verl.data.rows import read_rows
from verl.data.samples import Mode, has_fields
from verl.embedding.centre import FILE_NAME, Centre
from verl.embedding.chat_template import last_user_turn
from verl.embedding.settings import EmbedderSettings
from verl.encoder.arguments import whole_number
from verl.encoder.grace_encoder import GraceEncoder
from verl.errors import UserError
from verl.utils.console import exit_code_of, say
from verl.utils.files import is_taken, new_folder
from verl.utils.logging import quiet_libraries
from verl.workers.rollout.base import RolloutError

PROGRAM = "centre"
# The centre of one text would be its whole vector.
_LEAST_TEXTS = 2


def run_program(args: argparse.Namespace) -> int:
    """Find and write a centre as the arguments of `verl.centre` ask for; the exit code."""
    quiet_libraries()
    return exit_code_of(PROGRAM, partial(run, args), failures=(RolloutError,))


def run(args: argparse.Namespace) -> None:
    most = whole_number("--max_texts", args.max_texts, _LEAST_TEXTS)
    folder = _source(args.model, args.output)
    texts = list(dict.fromkeys(read_texts(args.input)))
    if len(texts) < _LEAST_TEXTS:
        raise UserError(f"--input={args.input} has {len(texts)} different texts; give {_LEAST_TEXTS} or more")
    chosen = random.Random(args.seed).sample(texts, min(most, len(texts)))
    with GraceEncoder(folder, engine=args.engine, device=args.device, centre=False) as encoder:
        settings = encoder.settings
        centre = centre_of(
            encoder, chosen, batch_size=args.batch_size, seed=args.seed, max_new_tokens=args.max_new_tokens
        )
    target = folder if args.output is None else args.output
    if args.output is None:
        _write(centre, settings, folder)
    else:
        with new_folder(target) as making:
            shutil.copytree(folder, making, ignore=shutil.ignore_patterns(making.name), dirs_exist_ok=True)
            _write(centre, settings, making)
    say(f"{PROGRAM}: wrote {target / FILE_NAME}: the mean of {len(chosen):,} of {len(texts):,} texts")


def centre_of(encoder: GraceEncoder, texts: list[str], **options: Any) -> Centre:
    """The means of the unit vectors of N texts, each of which counts the same.

    Args:
        encoder: without a centre.
        options: of `GraceEncoder.encode`.
    """
    settings = encoder.settings
    with_rationale = encoder.encode(texts, think=True, **options).mean(0) if settings.think else None
    without = None if settings.span == "rationale" else encoder.encode(texts, think=False, **options).mean(0)
    return Centre(with_rationale, without)


def read_texts(path: Path) -> Iterator[str]:
    """The texts of a file that process_data.py wrote, or of one that it reads: of triplets or of plain texts.

    Raises:
        UserError: the file is missing, of no format that is read, or holds a line that is no sample.
    """
    if path.suffix == ".parquet" and path.is_file() and _holds_chats(open_parquet(path).schema_arrow):
        for _, row in read_rows(path):
            triplet = row.get(TRIPLET) or {}
            yield row["prompt"][last_user_turn(row["prompt"])]["content"]
            yield from (triplet[name] for name in TRIPLET_FIELDS.values() if triplet.get(name))
        return
    for sample in read_samples(path, _mode_of(path)):
        yield from sample.texts


def _holds_chats(schema: pa.Schema) -> bool:
    """Whether a file is of process_data.py; FlagEmbedding's files have a `prompt` too, which is a text."""
    return "prompt" in schema.names and not is_text(schema.field("prompt").type)


def _mode_of(path: Path) -> Mode:
    """Supervised where the first record has the fields of a triplet."""
    try:
        with open_source(path, "supervised") as source:
            first = next((record.fields for record in source.records if record.fields is not None), {})
    except UserError:
        return "unsupervised"
    return "supervised" if has_fields(first, "supervised") else "unsupervised"


def _source(model: str, output: Path | None) -> Path:
    """The folder of a model, after checking where the centre is to be written."""
    if output is None and not Path(model).expanduser().is_dir():
        raise UserError(f"--model={model} is not a folder; give --output, a new folder for the model and its centre")
    if output is not None and is_taken(output):
        raise UserError(f"--output={output} exists and is not an empty folder; give another, or remove it")
    return model_folder(model)


def _write(centre: Centre, settings: EmbedderSettings, folder: Path) -> None:
    # The settings come last: a folder never says that it has a centre before it has one.
    centre.write(folder, settings)
    settings = settings.changed(centre=True)
    settings.write(folder)
    put_settings(folder, settings)

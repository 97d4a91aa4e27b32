"""Embedding the texts of a file: the work of `python3 -m verl.encoder`."""

import argparse
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from verl.data.readers import Source, open_source, samples_of
from verl.embedding.settings import why_this_prompt
from verl.encoder.arguments import check_options, whole_number
from verl.encoder.grace_encoder import GraceEncoder
from verl.encoder.parquet_parts import Part, write_file
from verl.encoder.store import StoreError, store_beside
from verl.utils.console import exit_code_of, say
from verl.utils.logging import quiet_libraries
from verl.workers.rollout.base import RolloutError

# Texts of an output of one file that are read, embedded and written at a time.
_CHUNK = 10_000


def run_program(args: argparse.Namespace) -> int:
    """Embed as the arguments of `verl.encoder` ask for; the exit code."""
    quiet_libraries()
    return exit_code_of("encode", partial(run, args), failures=(RolloutError,), wrong=(StoreError, ValueError, OSError))


def run(args: argparse.Namespace) -> None:
    check_texts(args.input)
    check_options(args.temperature, args.batch_size)
    if args.shard_rows is None:
        embed_to_file(args)
    else:
        whole_number("--shard_rows", args.shard_rows, 1)
        embed_to_folder(args)


def check_texts(path: Path) -> None:
    """Read a file to its end, so that a wrong line of it is an error before a model is loaded.

    Raises:
        UserError: see `samples_of`.
    """
    with open_texts(path) as (texts, _):
        for _ in texts:
            pass


def embed_to_file(args: argparse.Namespace) -> None:
    """Write --output, one file; a store beside it has what a killed run leaves."""
    args.output.parent.mkdir(parents=True, exist_ok=True)
    store = args.store or store_beside(args.output)
    with open_encoder(args, store) as encoder, open_texts(args.input) as (texts, _):
        options = encode_options(args)
        write_file(
            texts, args.output, _CHUNK, encoder.embedding_dim,
            lambda some: encoder.encode(some, return_rationales=True, **options),
        )  # fmt: skip
    if args.store is None:
        shutil.rmtree(store)
    say(f"{args.output}: {encoder.usage.texts:,} texts, {usage_line(encoder)}")


def embed_to_folder(args: argparse.Namespace) -> None:
    """Write --output, a folder of files of --shard_rows texts, whose finished files are what a killed run leaves."""
    with open_encoder(args, args.store) as encoder, open_texts(args.input) as (texts, source):
        try:
            total = encoder.encode_to_parquet(
                texts, args.output, shard_rows=args.shard_rows, on_part=part_teller(source), **encode_options(args)
            )
        except (OSError, StoreError, RolloutError):
            say(f"the finished files stay in {args.output}; the same command continues after them")
            raise
    say(f"{args.output}: {total:,} texts, of which {encoder.usage.texts:,} were embedded now, {usage_line(encoder)}")


def open_encoder(args: argparse.Namespace, store: Path | None) -> GraceEncoder:
    encoder = GraceEncoder(
        args.model, engine=args.engine, device=args.device, num_processes=args.num_processes,
        pooling=args.pooling, span=args.span, store=store,
        text_share=args.text_share, no_rationale_weight=args.no_rationale_weight,
        centre=False if args.no_centre else None,
        max_prompt_length=args.max_prompt_length, max_new_tokens=args.max_new_tokens,
        system_prompt=args.system_prompt, system_prompt_in=args.system_prompt_in, template_date=args.template_date,
    )  # fmt: skip
    say(f"system prompt: {encoder.settings.prompt_line()} ({why_this_prompt(encoder.folder, args.system_prompt)})")
    return encoder


def encode_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `GraceEncoder.encode`."""
    return {
        "batch_size": args.batch_size, "role": args.role, "task": args.task,
        "think": False if args.no_thinking else None, "temperature": args.temperature,
        "seed": args.seed, "normalize_embeddings": not args.not_normalized,
    }  # fmt: skip


@contextmanager
def open_texts(path: Path) -> Iterator[tuple[Iterator[str], Source]]:
    """The texts of a file, read as they are asked for."""
    with open_source(path, "unsupervised") as source:
        yield (sample.texts[0] for sample in samples_of(source, path, "unsupervised")), source


def part_teller(source: Source) -> Callable[[Part], None]:
    """Of what is called with each part: a line for a new one, and one before them for those that were there."""
    earlier = 0

    def tell(part: Part) -> None:
        nonlocal earlier
        if not part.is_new:
            earlier += part.rows
            return
        if earlier:
            say(f"{earlier:,} texts were embedded earlier, and are kept")
            earlier = 0
        say(f"{part.file}: {part.rows:,} texts; {source.position() / source.size:.0%} of the input is read")

    return tell


def usage_line(encoder: GraceEncoder) -> str:
    usage = encoder.usage
    return (
        f"{usage.generated_tokens:,} rationale tokens generated; {usage.hit_rate:.0%} came from the store; "
        f"{usage.shortened:,} texts were cut to fit, {usage.truncated:,} rationales hit the limit"
    )

"""Embedding the texts of a file: the work of `python3 -m verl.encoder`."""

import argparse
import shutil
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from verl.data.readers import open_source, read_samples
from verl.embedding.settings import why_this_prompt
from verl.encoder.arguments import check_options
from verl.encoder.grace_encoder import GraceEncoder
from verl.encoder.store import StoreError
from verl.errors import UserError
from verl.utils.console import complain, say
from verl.utils.logging import quiet_libraries
from verl.workers.rollout.base import RolloutError

# Texts read, embedded and written at a time.
_CHUNK = 10_000


def run_program(args: argparse.Namespace) -> int:
    """Embed as the arguments of `verl.encoder` ask for; the exit code."""
    quiet_libraries()
    try:
        run(args)
    except (UserError, StoreError, ValueError, OSError) as error:
        return complain("encode", error)
    except RolloutError as error:
        complain("encode", error)
        return 1
    return 0


def run(args: argparse.Namespace) -> None:
    with open_source(args.input, "unsupervised"):
        pass  # so that a missing or empty input is an error before a model is loaded
    check_options(args.temperature, args.batch_size)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    store = args.store or args.output.with_suffix(".store")
    written = args.output.with_name(f".{args.output.name}.writing")
    with GraceEncoder(
        args.model, engine=args.engine, device=args.device, pooling=args.pooling, span=args.span, store=store,
        text_share=args.text_share, no_rationale_weight=args.no_rationale_weight,
        centre=False if args.no_centre else None,
        max_prompt_length=args.max_prompt_length, max_new_tokens=args.max_new_tokens,
        system_prompt=args.system_prompt, system_prompt_in=args.system_prompt_in, template_date=args.template_date,
    ) as encoder:  # fmt: skip
        say(f"system prompt: {encoder.settings.prompt_line()} ({why_this_prompt(encoder.folder, args.system_prompt)})")
        write_vectors(args, encoder, written)
        usage = encoder.usage
    written.replace(args.output)
    if args.store is None:
        shutil.rmtree(store)
    say(
        f"{args.output}: {usage.texts:,} texts, {usage.generated_tokens:,} rationale tokens generated; "
        f"{usage.hit_rate:.0%} came from the store; {usage.shortened:,} texts were cut to fit, {usage.truncated:,} "
        "rationales hit the limit"
    )


def write_vectors(args: argparse.Namespace, encoder: GraceEncoder, path: Path) -> None:
    """Embed the input in chunks, and write each as a row group."""
    vector = pa.list_(pa.float32(), encoder.embedding_dim)
    schema = pa.schema([("text", pa.large_string()), ("rationale", pa.large_string()), ("vector", vector)])
    with pq.ParquetWriter(path, schema) as writer:
        texts_left = (sample.texts[0] for sample in read_samples(args.input, "unsupervised"))
        while texts := list(islice(texts_left, _CHUNK)):
            vectors, rationales = encoder.encode(
                texts, batch_size=args.batch_size, think=not args.no_thinking, temperature=args.temperature,
                seed=args.seed, normalize_embeddings=not args.not_normalized, return_rationales=True,
            )  # fmt: skip
            cells = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), encoder.embedding_dim)
            writer.write_table(pa.table([pa.array(texts), pa.array(rationales), cells], schema=schema))

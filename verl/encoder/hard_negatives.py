"""Finding hard negatives for the pairs of a file: the work of `python3 -m verl.mine_negatives`."""

import argparse
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import mine_hard_negatives
from torch import Tensor

from verl.checkpoint.model_folder import model_folder
from verl.data.readers import read_samples
from verl.data.samples import Sample
from verl.embedding.settings import FILE_NAME
from verl.encoder.arguments import check_batch_size, whole_number
from verl.encoder.grace_encoder import GraceEncoder
from verl.encoder.store import store_beside
from verl.errors import UserError
from verl.utils.console import exit_code_of, say
from verl.utils.files import replace_file
from verl.utils.logging import quiet_libraries
from verl.workers.rollout.base import RolloutError

PROGRAM = "mine_negatives"
_MODULES = "modules.json"
"""What the folder of a model of sentence-transformers has."""
_QUERY, _POSITIVE = "query", "positive"
# In memory at once: 256 MiB.
_SIMILARITIES = 2**26


class Miner:
    """What `mine_hard_negatives` asks of a model, by a `GraceEncoder`.

    Args:
        options: of `GraceEncoder.encode`.
    """

    device = "cpu"

    def __init__(self, encoder: GraceEncoder, **options: Any) -> None:
        self._encoder, self._options = encoder, options

    def encode_query(self, texts: Sequence[str], **_: Any) -> np.ndarray:
        """[N,H] float32 of unit length."""
        return self._encoder.encode_query(texts, **self._options)

    def encode_document(self, texts: Sequence[str], **_: Any) -> np.ndarray:
        """[N,H] float32 of unit length."""
        return self._encoder.encode_document(texts, **self._options)

    def similarity(self, first: np.ndarray | Tensor, second: np.ndarray | Tensor) -> Tensor:
        """[N,M] cosines of [N,H] and [M,H]."""
        return self._encoder.similarity(first, second)

    def similarity_pairwise(self, first: np.ndarray | Tensor, second: np.ndarray | Tensor) -> Tensor:
        """[N] cosines of [N,H] and [N,H], which have unit length."""
        return (torch.as_tensor(first) * torch.as_tensor(second)).sum(1)


def run_program(args: argparse.Namespace) -> int:
    """Find negatives as the arguments of `verl.mine_negatives` ask for; the exit code."""
    quiet_libraries()
    return exit_code_of(PROGRAM, partial(run, args), failures=(RolloutError,))


def run(args: argparse.Namespace) -> None:
    _check_args(args)
    samples = list(read_samples(args.input, "pairs"))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    # What a run that is killed has embedded.
    store = store_beside(args.output)
    with _load(args, store) as model:
        negatives = find_negatives(
            samples, model, num_negatives=args.num_negatives, relative_margin=args.margin, range_min=args.range_min,
            range_max=args.range_max, batch_size=args.batch_size or 32,
        )  # fmt: skip
    found = [(sample, negatives[sample.texts[0]]) for sample in samples if negatives.get(sample.texts[0])]
    if not found:
        raise UserError(
            f"no text of {args.input} is a negative of any query; lower --margin={args.margin} or raise --range_max "
            "(what was embedded is kept for the next try)"
        )
    replace_file(args.output, b"".join(_line(sample, texts) for sample, texts in found))
    shutil.rmtree(store, ignore_errors=True)
    count = sum(len(texts) for _, texts in found)
    say(
        f"{args.output}: {len(found):,} samples with {count / len(found):.1f} negatives each; "
        f"{len(samples) - len(found):,} samples have none within the margin and the range, and are left out"
    )


def find_negatives(samples: Sequence[Sample], model: Any, **options: Any) -> dict[str, list[str]]:
    """The negatives of each query that has any, the most similar first.

    Args:
        samples: of pairs; what is negative in some of them is a candidate like any other text.
        model: a `SentenceTransformer` or a `Miner`.
        options: of `mine_hard_negatives`.
    """
    pairs = [(sample.texts[0], text) for sample in samples for text in _positives(sample)]
    dataset = Dataset.from_dict({_QUERY: [pair[0] for pair in pairs], _POSITIVE: [pair[1] for pair in pairs]})
    candidates = [text for sample in samples for text in sample.lists.get("negative", ())]
    # Similarities of so many queries with all texts are in memory at once. Its statistics have a limit of their own.
    queries = max(1, _SIMILARITIES // (len(pairs) + len(candidates)))
    mined = mine_hard_negatives(
        dataset, model, anchor_column_name=_QUERY, positive_column_name=_POSITIVE, corpus=candidates,
        output_format="labeled-list", faiss_batch_size=queries, verbose=False, **options,
    )  # fmt: skip
    # Of a query every positive has a row, and in each the same negatives follow the positive.
    return {row[_QUERY]: [text for text in row[_POSITIVE][1:] if text != row[_QUERY]] for row in mined}


def _positives(sample: Sample) -> tuple[str, ...]:
    return sample.lists.get("positive", sample.texts[1:])


def _line(sample: Sample, negatives: list[str]) -> bytes:
    row: dict[str, Any] = {"query": sample.texts[0], "pos": _positives(sample), "neg": negatives}
    if sample.source is not None:
        row["source"] = sample.source
    return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)


def _check_args(args: argparse.Namespace) -> None:
    whole_number("--num_negatives", args.num_negatives, 1)
    whole_number("--range_min", args.range_min, 0)
    if args.range_max is not None:
        whole_number("--range_max", args.range_max, args.range_min + args.num_negatives)
    if not (math.isfinite(args.margin) and args.margin >= 0):
        raise UserError(f"--margin={args.margin} must be a number of 0 or more")
    check_batch_size(args.batch_size)


@contextmanager
def _load(args: argparse.Namespace, store: Path) -> Iterator[Any]:
    """The model, as `find_negatives` takes it.

    Args:
        store: of a model of this project; one of sentence-transformers writes nothing, and keeps nothing.
    """
    given = Path(args.model).expanduser()
    folder = given if (given / _MODULES).is_file() else model_folder(args.model)
    if (folder / _MODULES).is_file() and not (folder / FILE_NAME).is_file():
        unread = {"--no_thinking": args.no_thinking, "--max_new_tokens": args.max_new_tokens, "--seed": args.seed,
                  "--engine": None if args.engine == "auto" else args.engine}  # fmt: skip
        if wrong := [flag for flag, value in unread.items() if value]:
            raise UserError(f"{wrong[0]} has no effect: --model={args.model} is of sentence-transformers; leave it out")
        yield SentenceTransformer(args.model, device=None if args.device == "auto" else args.device)
        return
    with GraceEncoder(
        folder, engine=args.engine, device=args.device, max_new_tokens=args.max_new_tokens, store=store
    ) as encoder:
        yield Miner(encoder, think=False if args.no_thinking else None, seed=args.seed, batch_size=args.batch_size)

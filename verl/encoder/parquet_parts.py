"""Embedded texts as parquet, a row per text: text, rationale, vector; and folders of such files, made part by part.

    <folder>/part-00000.parquet      the first texts, in order; there once it is complete
    <folder>/_encode.json            what made the vectors
    <folder>/.lock                   held while a process writes into the folder

Readers of a folder of parquet (pyarrow, pandas, Spark) pass over names that begin with "_" or ".".
"""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from verl.errors import UserError
from verl.utils.files import replace_file, replacing
from verl.utils.locks import HeldError, NoLocksError, hold

RECORD = "_encode.json"
LOCK = ".lock"
# With more digits than their names have, parts would be read in another order than that of their texts.
_MOST_PARTS = 100_000

Embed = Callable[[list[str]], tuple[np.ndarray, list[str]]]
"""From N texts to [N,H] float32 vectors and N rationales."""


class Part(NamedTuple):
    """A file of a folder."""

    file: Path
    rows: int
    is_new: bool
    """False: it was there, and its texts were not embedded again."""


def write_file(texts: Iterator[str], file: Path, rows: int, dim: int, embed: Embed) -> None:
    """Write one file; an error leaves none.

    Args:
        rows: most texts that are embedded together; they become a row group.
        dim: of the vectors.
    """
    with replacing(file) as written, pq.ParquetWriter(written, _schema(dim)) as writer:
        while some := list(islice(texts, rows)):
            writer.write_table(_table(some, embed))


def write_parts(
    texts: Iterator[str], folder: Path, shard_rows: int, made_by: Mapping[str, Any], embed: Embed
) -> Iterator[Part]:
    """Write a folder of files of `shard_rows` texts each; yield each when it is on the disk.

    Files that are there already are compared with the texts and kept. At most `shard_rows` texts are taken from `texts`
    before they are on the disk.

    Args:
        made_by: everything besides the texts that decides the vectors, by name, as JSON can hold it.

    Raises:
        UserError: another process writes the folder; it holds something else, vectors that were made otherwise, or
            those of other texts; or there are no texts.
        OSError: it cannot be written; the finished files stay.
    """
    _check_is_ours(folder)
    with _owned(folder):
        _check_made_by(folder, {**made_by, "shard_rows": shard_rows})
        done = 0
        for number in count():
            file = folder / f"part-{number:05}.parquet"
            some = list(islice(texts, shard_rows))
            if not some:
                break
            if number == _MOST_PARTS:
                raise UserError(f"shard_rows={shard_rows} makes more than {number:,} files; give a larger one")
            is_new = not file.exists()
            if is_new:
                table = _table(some, embed)
                with replacing(file, durable=True) as written:
                    pq.write_table(table, written)
                del table
            else:
                _check_texts(file, some, done)
            done += len(some)
            yield Part(file, len(some), is_new)
        if file.exists():
            raise UserError(f"the input ends after {done:,} texts, and {file} holds more: {_OTHER_TEXTS}")
        if not done:
            raise UserError("there are no texts; give at least one")


_OTHER_TEXTS = "the folder was made from other texts; give the same input, or another folder"


def _table(texts: list[str], embed: Embed) -> pa.Table:
    vectors, rationales = embed(texts)
    dim = vectors.shape[1]
    cells = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), dim)
    return pa.table([pa.array(texts), pa.array(rationales), cells], schema=_schema(dim))


def _schema(dim: int) -> pa.Schema:
    vector = pa.list_(pa.float32(), dim)
    return pa.schema([("text", pa.large_string()), ("rationale", pa.large_string()), ("vector", vector)])


def _check_is_ours(folder: Path) -> None:
    """Raise `UserError` if a folder holds something and was not made here."""
    if folder.is_dir() and not (folder / RECORD).is_file():
        if others := sorted(path.name for path in folder.iterdir() if path.name != LOCK):
            raise UserError(f"{folder} holds {others[0]} and no {RECORD}; give a folder that is empty or not there")


@contextmanager
def _owned(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(hold(folder / LOCK))
        except HeldError as error:
            raise UserError(
                f"{folder} is being written by another process ({error}); wait until it has ended, or give another "
                "folder"
            ) from None
        except NoLocksError as error:
            warnings.warn(f"cannot be locked ({error}): make sure that no other process writes it", stacklevel=2)
        yield


def _check_made_by(folder: Path, made_by: Mapping[str, Any]) -> None:
    """Compare what makes the vectors with what made those of the folder; write it down in a new folder."""
    file, new = folder / RECORD, json.dumps(made_by, indent=1, ensure_ascii=False) + "\n"
    if not file.is_file():
        replace_file(file, new, durable=True)
        return
    earlier, now = json.loads(file.read_text()), json.loads(new)
    # An option that is off may have no entry.
    differences = [
        f"{name} was {earlier.get(name)!r} and is {now.get(name)!r}"
        for name in {**earlier, **now}
        if earlier.get(name) != now.get(name)
    ]
    if differences:
        raise UserError(
            f"the vectors in {folder} were made otherwise: {'; '.join(differences)}; give what they were made with, or "
            "another folder"
        )


def _check_texts(file: Path, texts: list[str], done: int) -> None:
    """Raise `UserError` unless a part holds just these texts, which come after `done` others."""
    kept = pq.read_table(file, columns=["text"])["text"].to_pylist()
    if kept == texts:
        return
    same = next((row for row, pair in enumerate(zip(kept, texts, strict=False)) if pair[0] != pair[1]), None)
    what = f"ends after {done + len(kept):,} texts" if same is None else f"has another text {done + same + 1:,}"
    raise UserError(f"{file} {what}: {_OTHER_TEXTS}")

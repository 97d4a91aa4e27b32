"""First pass: records are checked once; good ones go to a spool on disk, bad ones to rejected.jsonl.

The spool exists because the split needs the number of samples, and holding them would cost memory that
grows with the file. It also carries one 8-byte hash per sample, for counting duplicates.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson
import pyarrow as pa

from verl.data.lines import Record
from verl.data.samples import FIELDS, BadSample, MissingField, Mode, Sample, read_sample

_EXCERPT = 120
_BATCH_ROWS = 8_192
_BATCH_CHARS = 4 * 2**20


@dataclass
class _Lists:
    """The lists of several texts of one field."""

    first: str
    second: str
    count: int = 0
    same_first: bool = True
    same_second: bool = True


class ListBeginnings:
    """Finds fields whose lists are [instruction, text] where lists of alternatives are expected.

    They all begin with the same text, and samples would be made of that.
    """

    def __init__(self) -> None:
        self._lists: dict[str, _Lists] = {}

    def add(self, sample: Sample, fields: Iterable[str]) -> None:
        for name, first in zip(fields, sample.texts, strict=True):
            if second := sample.second.get(name):
                lists = self._lists.setdefault(name, _Lists(first, second))
                lists.count += 1
                lists.same_first &= first == lists.first
                lists.same_second &= second == lists.second

    def find_instruction(self) -> tuple[str, str] | None:
        """A field with three such lists or more, and the text that all of them begin with."""
        for name, lists in self._lists.items():
            if lists.count >= 3 and lists.same_first and not lists.same_second:
                return name, lists.first
        return None


@dataclass
class Counts:
    """What became of the records; `lines` is the sum of the next three."""

    lines: int = 0
    blank: int = 0
    accepted: int = 0
    rejected: int = 0
    lacking_field: int = 0
    """Rejected records that have none of a field's accepted names."""
    names_found: list[str] = field(default_factory=list)
    """The names in the first of those."""
    lists: ListBeginnings = field(default_factory=ListBeginnings)


class Spool:
    """Samples on disk, as an Arrow stream with the mode's texts, `source`, `line_idx` and `hash`."""

    def __init__(self, path: Path, mode: Mode) -> None:
        texts = dict.fromkeys(FIELDS[mode], pa.string())
        self._schema = pa.schema({**texts, "source": pa.string(), "line_idx": pa.int64(), "hash": pa.int64()})
        self._path = path
        self._writer = pa.ipc.new_stream(str(path), self._schema)
        self._rows: list[tuple[Any, ...]] = []
        self._num_chars = 0

    def add(self, sample: Sample, line_idx: int) -> None:
        self._rows.append((*sample.texts, sample.source, line_idx, hash(sample.texts)))
        self._num_chars += sum(map(len, sample.texts))
        if len(self._rows) >= _BATCH_ROWS or self._num_chars >= _BATCH_CHARS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            columns = zip(*self._rows, strict=True)
            arrays = [pa.array(column, type_) for column, type_ in zip(columns, self._schema.types, strict=True)]
            self._writer.write_batch(pa.record_batch(arrays, schema=self._schema))
            self._rows, self._num_chars = [], 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self._flush()
        self._writer.close()

    def batches(self) -> Iterator[pa.RecordBatch]:
        with pa.OSFile(str(self._path)) as file, pa.ipc.open_stream(file) as reader:
            yield from reader


class RejectLog:
    """rejected.jsonl, and the first few entries for the message."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self.first: list[str] = []

    def add(self, record: Record, reason: str) -> None:
        entry = {"line": record.line_idx + 1, "reason": reason, "excerpt": record.raw.strip()[:_EXCERPT]}
        self._file.write(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))
        if len(self.first) < 3:
            self.first.append(f"line {record.line_idx + 1}: {reason}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()


def ingest(records: Iterable[Record], mode: Mode, spool: Spool, rejects: RejectLog, max_samples: int | None) -> Counts:
    """Read `records` up to the `max_samples`-th good one, and sort them into `spool` and `rejects`."""
    counts = Counts()
    for record in records:
        counts.lines += 1
        if record.fields is None and record.problem is None:
            counts.blank += 1
            continue
        try:
            if record.fields is None:
                raise BadSample(record.problem)
            sample = read_sample(record.fields, mode)
        except BadSample as problem:
            counts.rejected += 1
            if isinstance(problem, MissingField):
                counts.lacking_field += 1
                counts.names_found = counts.names_found or list(record.fields or ())
            rejects.add(record, str(problem))
            continue
        spool.add(sample, record.line_idx)
        if sample.second:
            counts.lists.add(sample, FIELDS[mode])
        counts.accepted += 1
        if counts.accepted == max_samples:
            break
    return counts

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
from verl.data.samples import FIELDS, INSTRUCTION, LISTS, BadSample, MissingField, Mode, Sample, read_sample

_EXCERPT = 120
_BATCH_ROWS = 8_192
_BATCH_CHARS = 4 * 2**20


@dataclass
class PositiveLists:
    """Finds out whether the lists of several positives are [instruction, text] rather than alternatives.

    Then they are pairs that all begin with the same text, on which samples would train. Lists of negatives are not
    looked at: one text may be the hardest negative of every query.
    """

    count: int = 0
    first: str = ""
    second: str = ""
    alike: bool = True
    """All are pairs with the same first text."""
    same_second: bool = True

    def add(self, texts: tuple[str, ...]) -> None:
        """Look at the positives of a sample that has several."""
        if self.count == 0:
            self.first, self.second = texts[:2]
        self.count += 1
        self.alike &= len(texts) == 2 and texts[0] == self.first
        self.same_second &= texts[1] == self.second

    def find_instruction(self) -> str | None:
        """The text that three such lists or more, and all of them, begin with."""
        return self.first if self.count >= 3 and self.alike and not self.same_second else None


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
    instructions: int = 0
    """Accepted records with an instruction for the query, which is not read."""
    positives: PositiveLists = field(default_factory=PositiveLists)


class Spool:
    """Samples on disk, as an Arrow stream with the mode's texts and lists, `source`, `line_idx` and `hash`."""

    def __init__(self, path: Path, mode: Mode) -> None:
        texts = dict.fromkeys(FIELDS[mode], pa.string())
        self._lists = [field for field in FIELDS[mode] if field in LISTS]
        lists = dict.fromkeys((LISTS[field] for field in self._lists), pa.list_(pa.string()))
        self._schema = pa.schema({**texts, **lists, "source": pa.string(), "line_idx": pa.int64(), "hash": pa.int64()})
        self._path = path
        self._writer = pa.ipc.new_stream(str(path), self._schema)
        self._rows: list[tuple[Any, ...]] = []
        self._num_chars = 0

    def add(self, sample: Sample, line_idx: int) -> None:
        lists = tuple(sample.lists.get(field) for field in self._lists)
        self._rows.append((*sample.texts, *lists, sample.source, line_idx, hash((*sample.texts, *lists))))
        self._num_chars += sum(map(len, sample.texts))
        self._num_chars += sum(len(text) for texts in sample.lists.values() for text in texts)
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
        if positives := sample.lists.get("positive"):
            counts.positives.add(positives)
        counts.accepted += 1
        instruction = record.fields.get(INSTRUCTION)
        counts.instructions += isinstance(instruction, str) and bool(instruction)
        if counts.accepted == max_samples:
            break
    return counts

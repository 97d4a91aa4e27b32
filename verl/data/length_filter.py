"""Prompt lengths of the rows of a parquet file, and the rows that fit, a batch at a time.

Every text that training will template is measured: the row's prompt, and of a triplet also the query and
the negative under the same system message. The lengths stay beside the rows, with a hash of the tokenizer
and template they hold for, so that training need not tokenize to know them. Of a sample's further positives and
negatives those that are too long are left out.
"""

import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from verl.data.alternatives import POSITIVES, kept_texts, with_positive
from verl.data.parallel import Mapper
from verl.data.parquet import open_parquet
from verl.data.prompt_rows import TRIPLET, TRIPLET_FIELDS, check_types, find_bad_row, list_columns
from verl.data.writer import ParquetSink
from verl.embedding.chat_template import Message, system_prompt_of
from verl.embedding.prompts import PromptRenderer, rationale_messages
from verl.errors import UserError
from verl.prompt_options import SystemPromptPlace
from verl.utils.tokenizer import load_tokenizer

LENGTHS = "prompt_lengths"

_BATCH_ROWS = 1_000
_STALE_METADATA = b"huggingface"
"""Describes the columns of the input, without the lengths; readers of it would refuse the output."""


@dataclass(frozen=True)
class FilterSettings:
    """What decides a length and whether it fits."""

    tokenizer_path: str
    max_len: int
    prompt_key: str
    trust_remote_code: bool
    system_prompt_in: SystemPromptPlace = "system"
    template_date: str | None = None


@dataclass
class FilterReport:
    """What the filter did to one file. A row that is over-long in two fields counts in both; of several positives or
    negatives every text counts."""

    rows: int = 0
    kept: int = 0
    over_long: dict[str, int] = field(default_factory=dict)
    longest: dict[str, int] = field(default_factory=dict)

    @property
    def percent_kept(self) -> float:
        return 100 * self.kept / self.rows if self.rows else 100.0

    def add(self, lengths: dict[str, np.ndarray], fits: np.ndarray, max_len: int) -> None:
        self.rows += len(fits)
        self.kept += int(np.count_nonzero(fits))
        for name, values in lengths.items():
            if not len(values):
                continue
            self.over_long[name] = self.over_long.get(name, 0) + int(np.count_nonzero(values > max_len))
            self.longest[name] = max(self.longest.get(name, 0), int(values.max()))


@lru_cache(maxsize=1)
def load_renderer(settings: FilterSettings) -> PromptRenderer:
    """The renderer of a tokenizer, loaded once per process."""
    tokenizer = load_tokenizer(settings.tokenizer_path, settings.trust_remote_code)
    tokenizer.model_max_length = sys.maxsize  # long texts are expected here: no warning about them
    return PromptRenderer(tokenizer, system_prompt_in=settings.system_prompt_in, template_date=settings.template_date)


def open_prompts(path: Path, prompt_key: str) -> pq.ParquetFile:
    """Open the parquet file of prompts at `path`.

    Raises:
        UserError: it is missing, is not a parquet file, or lacks a column of the right type.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist or is not a file")
    file = open_parquet(path)
    schema = file.schema_arrow
    if prompt_key not in schema.names:
        raise UserError(
            f"{path} has no column {prompt_key!r}; found {', '.join(schema.names)}. "
            "Make it with process_data.py, or name its column of chat messages with --prompt_key"
        )
    check_types(schema, str(path), prompt_key, TRIPLET in schema.names)
    return file


def filter_file(file: pq.ParquetFile, target: Path, settings: FilterSettings, mapper: Mapper) -> FilterReport:
    """Write to `target` the rows of `file` whose every length is at most `max_len`, with their lengths, and of their
    lists the texts that fit.

    Raises:
        UserError: a row is no prompt or cannot be rendered, or the file is damaged.
    """
    schema = _schema_with_lengths(file.schema_arrow, settings)
    report, lists = FilterReport(), (list_columns(file.schema_arrow) if TRIPLET in schema.names else [])
    with ParquetSink(target, schema) as sink:
        try:
            for batch, lengths in _measured(file, settings, mapper):
                of_rows = {name: values for name, values in lengths.items() if name not in lists}
                fits = np.all([values <= settings.max_len for values in of_rows.values()], axis=0)
                report.add(lengths, fits, settings.max_len)
                columns = {name: batch[name] for name in schema.names if name != LENGTHS}
                for name in lists:
                    columns[name] = kept_texts(
                        batch[name].to_pylist(), lengths[name] <= settings.max_len, batch[name].type
                    )
                measured = pa.StructArray.from_arrays([pa.array(values) for values in of_rows.values()], list(of_rows))
                sink.add(pa.record_batch([*columns.values(), measured], schema=schema).filter(pa.array(fits)))
        except UserError:
            raise
        except (ValueError, pa.ArrowException) as error:
            first = report.rows + 1
            raise UserError(f"rows {first:,} to {first + _BATCH_ROWS - 1:,}: {error}") from error
    return report


def measure_prompts(settings: FilterSettings, batch: pa.RecordBatch) -> dict[str, np.ndarray]:
    """Token counts of every text of `batch` as training will template it, by field [rows], and by column of several
    positives or negatives [all their texts].
    """
    renderer = load_renderer(settings)
    prompts = batch[settings.prompt_key].to_pylist()
    if TRIPLET not in batch.schema.names:
        return {"text": np.array(renderer.lengths(prompts), np.int32)}
    conversations = {"positive": prompts}
    for name, child in TRIPLET_FIELDS.items():
        texts = batch[TRIPLET].field(child)
        systems = map(system_prompt_of, prompts)
        conversations[name] = list(map(rationale_messages, texts.to_pylist(), systems))
    for name in list_columns(batch.schema):
        conversations[name] = list(_chats_of_lists(batch, name, settings.prompt_key))
    return {name: np.array(renderer.lengths(chats), np.int32) for name, chats in conversations.items()}


def _chats_of_lists(batch: pa.RecordBatch, column: str, prompt_key: str) -> Iterator[list[Message]]:
    """The chat of each text in the lists of a column."""
    if batch[column].null_count == len(batch):
        return
    for row in batch.select([prompt_key, column]).to_pylist():
        for text in row[column] or ():
            if column == POSITIVES:
                yield with_positive(row, text, prompt_key)[prompt_key]
            else:
                yield rationale_messages(text, system_prompt_of(row[prompt_key]))


def _schema_with_lengths(schema: pa.Schema, settings: FilterSettings) -> pa.Schema:
    fields = ("positive", *TRIPLET_FIELDS) if TRIPLET in schema.names else ("text",)
    fingerprint = load_renderer(settings).fingerprint()
    metadata = {key: value for key, value in (schema.metadata or {}).items() if key != _STALE_METADATA}
    metadata |= {
        b"grace.tokenizer_hash": fingerprint.encode(),
        b"grace.tokenizer_path": settings.tokenizer_path.encode(),
        b"grace.max_len": str(settings.max_len).encode(),
    }
    kept = [column for column in schema if column.name != LENGTHS]
    lengths = pa.field(LENGTHS, pa.struct(dict.fromkeys(fields, pa.int32())))
    return pa.schema([*kept, lengths], metadata)


def _measured(
    file: pq.ParquetFile, settings: FilterSettings, mapper: Mapper
) -> Iterator[tuple[pa.RecordBatch, dict[str, np.ndarray]]]:
    """Batches with their lengths, in order; only as many are held as the mapper has under way."""
    has_triplets = TRIPLET in file.schema_arrow.names
    texts_of_triplets = [TRIPLET, *list_columns(file.schema_arrow)] if has_triplets else []
    columns = [settings.prompt_key, *texts_of_triplets]
    waiting: deque[pa.RecordBatch] = deque()

    def texts() -> Iterator[pa.RecordBatch]:
        first_row = 1
        for batch in file.iter_batches(_BATCH_ROWS):
            if fault := find_bad_row(batch, first_row, settings.prompt_key, has_triplets):
                raise UserError(fault)
            first_row += len(batch)
            waiting.append(batch)
            yield batch.select(columns)

    for lengths in mapper(partial(measure_prompts, settings), texts()):
        yield waiting.popleft(), lengths

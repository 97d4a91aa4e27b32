"""The training data: rows of parquet files of process_data.py as samples, whose texts are chats by role."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch.utils.data import Dataset

from verl.config import DataConfig
from verl.data.alternatives import NEGATIVES, POSITIVES, kept_texts, rows_of_pass, with_negative, with_positive
from verl.data.collator import Sample, around_text
from verl.data.parquet import open_parquet
from verl.data.prompt_rows import (
    TRIPLET,
    TRIPLET_FIELDS,
    check_types,
    find_bad_row,
    first_of_each_form,
    list_columns,
)
from verl.embedding.chat_template import Message, system_prompt_of, with_system_prompt
from verl.embedding.prompts import PromptRenderer, rationale_messages
from verl.embedding.settings import EmbedderSettings
from verl.errors import UserError
from verl.text_roles import TRIPLET_ROLES, Role
from verl.utils.files import sha256_of_all

_MEASURED = 2_000
"""Samples whose lengths say how many of all are over-long."""
_BLOCK = 1_000
"""Samples that are measured in one call."""


def text_settings(config: DataConfig) -> dict[str, Any]:
    """The part of an encoder's settings that says what stands around a text, and how long its rationale may be."""
    names = ("template", "instructions", "think", "query", "document")
    return {**{name: getattr(config, name) for name in names}, "max_new_tokens": config.max_response_length}


class PromptDataset(Dataset):
    """Samples with their texts as chats, by role.

    Args:
        files: parquet files.
        roles: which texts a sample gives: `positive` alone, or anchors too; the trained one first.
        renderer: finds rows that cannot be rendered, and over-long ones.

    Raises:
        UserError: a file is not parquet, lacks a column, or has a row that cannot be rendered; a text is over-long and
            data.truncation=error; or no sample is left.
    """

    def __init__(
        self, files: Sequence[str], config: DataConfig, roles: Sequence[str], renderer: PromptRenderer
    ) -> None:
        self.config = config
        self.roles = roles
        self.supervised = config.mode == "supervised"
        self.text_roles: dict[str, Role] = TRIPLET_ROLES if self.supervised and "query" in roles else {}
        """As what each text is embedded; without an entry as neither query nor document."""
        self.settings = EmbedderSettings(**text_settings(config))
        """Whose templates, instructions and roles hold for the texts."""
        tables = [self._read(name, renderer) for name in files]
        try:
            self.table = pa.concat_tables(tables, promote_options="permissive")
        except pa.ArrowException as error:
            raise UserError(f"{', '.join(files)} have columns of different types: {error}") from error
        self.sha256 = sha256_of_all(map(Path, files))
        """Hex, over the training files."""
        self.num_dropped = 0
        self.share_cut = 0.0
        """Estimated share of the samples that have a text which is cut."""
        self._treat_overlong(renderer)
        if not len(self):
            raise UserError(f"{', '.join(files)}: {self._why_empty()}")

    def __len__(self) -> int:
        return self.table.num_rows

    def _why_empty(self) -> str:
        """Why there is no sample, and the way out."""
        if self.num_dropped:
            return (
                f"no sample is left: each of the {self.num_dropped} has a text beyond data.max_prompt_length="
                f"{self.config.max_prompt_length}. Raise it, or set data.filter_overlong_prompts=False."
            )
        return (
            "there are no samples. Name another file; of few lines, process_data.py puts some into test.parquet with a "
            "larger --test_ratio."
        )

    @property
    def num_system_prompts(self) -> int:
        """How many different system texts the rows have, or 1 where data.system_prompt replaces them."""
        if self.config.system_prompt is not None:
            return 1
        turns = pc.list_flatten(self.table[self.config.prompt_key])
        is_system = pc.equal(pc.struct_field(turns, "role"), "system")
        return len(pc.unique(pc.struct_field(turns, "content").filter(is_system)))

    def __getitem__(self, place: int | tuple[int, int]) -> Sample:
        """A sample by its position, with the texts of the first pass over the data; or by (pass, position)."""
        epoch, index = place if isinstance(place, tuple) else (0, place)
        row, key = _row(self.table, index), self.config.prompt_key
        rows = rows_of_pass(row, epoch, self.config.negatives_per_query, key)
        chats = [self._chats(drawn) for drawn in rows]
        positives = self._chats_of_list(row, POSITIVES)
        return {
            **rows[0], "uid": index, "chats": chats[0], "more_negatives": [more["negative"] for more in chats[1:]],
            "other_positives": [chat for chat in positives if chat != chats[0]["positive"]],
            "text_roles": self.text_roles,
        }  # fmt: skip

    def length_lines(self) -> Iterator[tuple[str, str]]:
        """What happens to over-long samples, as (what, how much) lines; none where there are no such samples."""
        limit = f"data.max_prompt_length={self.config.max_prompt_length} tokens"
        if self.num_dropped:
            yield "over-long samples", f"{self.num_dropped:,} dropped, {len(self):,} left ({limit})"
        if self.share_cut:
            measured = f" of {_MEASURED:,} that were measured" if len(self) > _MEASURED else ""
            yield "over-long samples", f"WARNING: {self.share_cut:.2%} of the samples{measured} have a text beyond"
            yield "", f"{limit}, which data.truncation={self.config.truncation} cuts;"
            yield "", "raise it, or drop them: data.filter_overlong_prompts=True"

    def _read(self, name: str, renderer: PromptRenderer) -> pa.Table:
        prompt_key = self.config.prompt_key
        has_triplets = self.supervised and "query" in self.roles
        wanted = [prompt_key, self.config.reward_fn_key, "reward_model", "extra_info"]
        wanted += [TRIPLET] if has_triplets else []
        try:
            with open_parquet(Path(name)) as file:
                schema = file.schema_arrow
                _check_columns(schema.names, wanted, name)
                check_types(schema, name, prompt_key, has_triplets)
                table = file.read(columns=wanted + (list_columns(schema) if has_triplets else []))
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{name} cannot be read to its end: {error}") from None
        first_row = 1
        for batch in table.to_batches():
            if fault := find_bad_row(batch, first_row, prompt_key, has_triplets):
                raise UserError(f"{name}, {fault}")
            for index in first_of_each_form(batch[prompt_key]):
                self._check_turns(_row(batch, index), f"{name}, row {first_row + index:,}", renderer)
            first_row += len(batch)
        return table

    def _check_turns(self, row: Sample, place: str, renderer: PromptRenderer) -> None:
        """Raise unless the chat template takes the turns of a row."""
        try:
            for chat in self._chats(row).values():
                renderer.frame(chat)
        except ValueError as error:
            raise UserError(f"{error} (met in {place})") from error

    def _chats(self, row: Sample) -> dict[str, list[Message]]:
        """The chat of each role; anchors get the system turn of the sample's own prompt."""
        prompt: list[Message] = row[self.config.prompt_key]
        if self.config.system_prompt is not None:
            prompt = with_system_prompt(prompt, self.config.system_prompt or None)
        if not self.text_roles:
            return dict.fromkeys(self.roles, prompt)
        system = system_prompt_of(prompt)
        others = {role: rationale_messages(row[TRIPLET][column], system) for role, column in TRIPLET_FIELDS.items()}
        return {role: {"positive": prompt, **others}[role] for role in self.roles}

    def _treat_overlong(self, renderer: PromptRenderer) -> None:
        """Drop over-long samples, refuse them, or estimate how many there are."""
        if self.config.filter_overlong_prompts:
            for column in list_columns(self.table.schema):
                self._drop_overlong_texts(column, renderer)
            fits = ~self._are_overlong(np.arange(len(self)), renderer)
            self.num_dropped = int(np.count_nonzero(~fits))
            self.table = self.table.filter(pa.array(fits))
        elif self.config.truncation == "error":
            found = np.flatnonzero(self._are_overlong(np.arange(len(self)), renderer))
            if len(found):
                text = self[int(found[0])]["chats"]["positive"][-1]["content"]
                raise UserError(
                    f"{len(found):,} of {len(self):,} samples have a text of more tokens than "
                    f"data.max_prompt_length={self.config.max_prompt_length}, the first one with {text[:60]!r}...; "
                    "drop them with data.filter_overlong_prompts=True, raise data.max_prompt_length, or set "
                    "data.truncation=right"
                )
        elif len(self):
            spread = np.unique(np.linspace(0, len(self) - 1, min(_MEASURED, len(self)), dtype=np.int64))
            self.share_cut = float(self._are_overlong(spread, renderer).mean())

    def _drop_overlong_texts(self, column: str, renderer: PromptRenderer) -> None:
        """Leave over-long texts out of the lists of a column."""
        lists, fits = [], []
        for start in range(0, len(self), _BLOCK):
            rows = [_row(self.table, index) for index in range(start, min(start + _BLOCK, len(self)))]
            lists += [row[column] for row in rows]
            role = "positive" if column == POSITIVES else "negative"
            texts = [(row, role, chat) for row in rows for chat in self._chats_of_list(row, column)]
            lengths = self._lengths(texts, renderer)
            fits += [length <= self.config.max_prompt_length for length in lengths]
        field = self.table.schema.field(column)
        place = self.table.schema.get_field_index(column)
        self.table = self.table.set_column(place, field, kept_texts(lists, fits, field.type))

    def _chats_of_list(self, row: Sample, column: str) -> list[list[Message]]:
        """The chat of each text in a list of positives or negatives."""
        texts = row.get(column) or ()
        if column == POSITIVES:
            return [self._chats(with_positive(row, text, self.config.prompt_key))["positive"] for text in texts]
        return [self._chats(with_negative(row, text))["negative"] for text in texts]

    def _are_overlong(self, indices: np.ndarray, renderer: PromptRenderer) -> np.ndarray:
        """[len(indices)] bool: which samples have a text with more than data.max_prompt_length tokens."""
        overlong: list[bool] = []
        for start in range(0, len(indices), _BLOCK):
            rows = [_row(self.table, int(index)) for index in indices[start : start + _BLOCK]]
            texts = [self._all_texts(row) for row in rows]
            owned = [(row, *text) for row, own in zip(rows, texts, strict=True) for text in own]
            lengths = iter(self._lengths(owned, renderer))
            overlong += [max([next(lengths) for _ in own]) > self.config.max_prompt_length for own in texts]
        return np.array(overlong, bool)

    def _all_texts(self, row: Sample) -> list[tuple[str, list[Message]]]:
        """Role and chat of all texts of a row, in whatever pass they are taken."""
        lists = [
            (role, chat)
            for role, column in (("positive", POSITIVES), ("negative", NEGATIVES))
            for chat in self._chats_of_list(row, column)
        ]
        return [*self._chats(row).items(), *lists]

    def _lengths(self, texts: Sequence[tuple[Sample, str, list[Message]]], renderer: PromptRenderer) -> list[int]:
        """Tokens of the prompt of each text, of which row, role and chat are given."""
        around = [around_text(row, self.text_roles.get(role), self.settings) for row, role, _ in texts]
        return renderer.lengths([chat for _, _, chat in texts], around)


def _row(table: pa.Table | pa.RecordBatch, index: int) -> Sample:
    return table.slice(index, 1).to_pylist()[0]


def _check_columns(names: Sequence[str], wanted: Sequence[str], file: str) -> None:
    missing = [column for column in wanted if column not in names]
    if missing:
        hint = "; for plain texts set +data.train_mode=unsupervised" if missing == [TRIPLET] else ""
        raise UserError(
            f"{file} lacks the column {', '.join(missing)} (it has {', '.join(names)}); "
            f"make it with process_data.py{hint}."
        )

"""What the rows of a file of prompts must hold, checked for all of them at once, by column.

A row that cannot be rendered would otherwise end a run when its step comes, after hours.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from verl.data.parquet import is_list, is_text
from verl.data.samples import LISTS
from verl.errors import UserError

TRIPLET = "multi_input"
TRIPLET_FIELDS = {"query": "query", "negative": "negative_document"}
"""The triplet's texts beside the prompt's, and their names in the column TRIPLET."""

_ROLE, _CONTENT = "role", "content"
_WAY_OUT = "make the file with process_data.py"


class _Fault(NamedTuple):
    rows: np.ndarray
    """[N] bool: the rows that have it."""
    what: str
    """What is wrong, after the column's name."""


def check_types(schema: pa.Schema, file: str, prompt_key: str, has_triplets: bool) -> None:
    """Check the types of the columns, which are there.

    Args:
        has_triplets: the column TRIPLET is needed too, and those of LISTS are read where they are there.

    Raises:
        UserError: a column cannot hold what it must.
    """
    type_ = schema.field(prompt_key).type
    message = type_.value_type if is_list(type_) else pa.null()
    _check_texts(message, (_ROLE, _CONTENT), f"{file}: column {prompt_key!r} is {type_} instead of a list of messages")
    if has_triplets:
        type_ = schema.field(TRIPLET).type
        _check_texts(type_, tuple(TRIPLET_FIELDS.values()), f"{file}: column {TRIPLET!r} is {type_}")
        for name in list_columns(schema):
            type_ = schema.field(name).type
            if not (pa.types.is_null(type_) or (is_list(type_) and is_text(type_.value_type))):
                raise UserError(f"{file}: column {name!r} is {type_} instead of a list of texts; {_WAY_OUT}")


def list_columns(schema: pa.Schema) -> list[str]:
    """The columns of LISTS that a file has; those of earlier versions have none."""
    return [name for name in LISTS.values() if name in schema.names]


def find_bad_row(rows: pa.RecordBatch, first_row: int, prompt_key: str, has_triplets: bool) -> str | None:
    """What is wrong with the first row that has a text that is null, empty or not UTF-8, or no user turn.

    Args:
        rows: columns whose types are checked.
        first_row: the number in the file of the first of `rows`, from 1.
    """
    faults = _prompt_faults(rows[prompt_key], prompt_key)
    for name in TRIPLET_FIELDS.values() if has_triplets else ():
        texts = pc.struct_field(rows[TRIPLET], name)
        faults += _text_faults(texts, np.arange(len(rows)), len(rows), f"{TRIPLET}.{name}")
        faults.append(_Fault(_is_blank(texts), f"{TRIPLET}.{name} is empty"))
    for name in list_columns(rows.schema) if has_triplets else ():
        faults += _list_faults(rows[name], name)
    found = [(int(np.argmax(fault.rows)), fault.what) for fault in faults if fault.rows.any()]
    if not found:
        return None
    index, what = min(found, key=lambda each: each[0])
    return f"row {first_row + index:,}: {what}; {_WAY_OUT}"


def first_of_each_form(prompts: pa.Array) -> list[int]:
    """Index of the first chat with each sequence of roles; the chats are checked."""
    offsets = np.concatenate([[0], np.cumsum(pc.list_value_length(prompts))])
    roles = pc.struct_field(pc.list_flatten(prompts), _ROLE).cast(pa.string())
    forms = pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), roles), "\n")
    return sorted(np.unique(np.asarray(forms.dictionary_encode().indices), return_index=True)[1].tolist())


def _check_texts(type_: pa.DataType, names: tuple[str, ...], what: str) -> None:
    children = {child.name: child.type for child in type_} if pa.types.is_struct(type_) else {}
    missing = [name for name in names if not is_text(children.get(name, pa.null()))]
    if missing:
        raise UserError(f"{what}, without the text {', '.join(map(repr, missing))}; {_WAY_OUT}")


def _prompt_faults(prompts: pa.Array, column: str) -> list[_Fault]:
    num_rows, owners = len(prompts), np.asarray(pc.list_parent_indices(prompts))
    messages = pc.list_flatten(prompts)
    roles, contents = pc.struct_field(messages, _ROLE), pc.struct_field(messages, _CONTENT)
    is_user = np.asarray(pc.equal(_as_texts(roles), "user").fill_null(False))
    user_rows = np.zeros(num_rows, bool)
    user_rows[owners[is_user]] = True
    # Of several assignments to one place the last one stays.
    last_user = np.zeros(num_rows, np.int64)
    last_user[owners[is_user]] = np.flatnonzero(is_user)
    blank = user_rows.copy()
    blank[user_rows] = _is_blank(contents)[last_user[user_rows]]
    return [
        _Fault(np.asarray(prompts.is_null()), f"{column} is null"),
        *_text_faults(roles, owners, num_rows, f"{column}.{_ROLE}"),
        *_text_faults(contents, owners, num_rows, f"{column}.{_CONTENT}"),
        _Fault(~user_rows, f"{column} has no message of the role 'user'"),
        _Fault(blank, f"{column} has an empty user text, of which nothing can be embedded"),
    ]


def _list_faults(lists: pa.Array, column: str) -> list[_Fault]:
    if lists.null_count == len(lists):
        return []
    owners, texts = np.asarray(pc.list_parent_indices(lists)), pc.list_flatten(lists)
    blank = np.zeros(len(lists), bool)
    blank[owners[_is_blank(texts)]] = True
    return [*_text_faults(texts, owners, len(lists), column), _Fault(blank, f"{column} has an empty text")]


def _text_faults(texts: pa.Array, owners: np.ndarray, num_rows: int, column: str) -> list[_Fault]:
    """Null texts and broken ones; `owners` [len(texts)] are the rows that they stand in."""
    faults = []
    for bad, what in ((np.asarray(texts.is_null()), "is null"), (~_is_utf8(texts), "is not UTF-8")):
        rows = np.zeros(num_rows, bool)
        rows[owners[bad]] = True
        faults.append(_Fault(rows, f"{column} {what}"))
    return faults


def _is_blank(texts: pa.Array) -> np.ndarray:
    texts = _as_texts(texts)
    texts = pc.if_else(pa.array(_is_utf8(texts)), texts, "not blank")
    return np.asarray(pc.equal(pc.utf8_trim_whitespace(texts), "").fill_null(False))


def _is_utf8(texts: pa.Array) -> np.ndarray:
    """Whether each text is UTF-8, which parquet does not promise; nulls are."""
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid:
        return np.array([_decodes(text) for text in _as_texts(texts).cast(pa.large_binary()).to_pylist()], bool)
    return np.ones(len(texts), bool)


def _decodes(text: bytes | None) -> bool:
    try:
        return text is None or text.decode() is not None
    except UnicodeDecodeError:
        return False


def _as_texts(texts: pa.Array) -> pa.Array:
    return texts.cast(pa.large_string())

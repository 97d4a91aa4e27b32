"""The positives and negatives of a sample that has several, and which of them a pass over the data takes.

Beside the first ones, which every row has, a row may hold all of them in the columns of `LISTS`.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

from verl.data.prompt_rows import TRIPLET, TRIPLET_FIELDS
from verl.data.samples import LISTS
from verl.embedding.chat_template import last_user_turn

Row = dict[str, Any]

POSITIVES, NEGATIVES = LISTS["positive"], LISTS["negative"]


def rows_of_pass(row: Row, epoch: int, num_negatives: int, prompt_key: str) -> list[Row]:
    """The row with the texts that it has in a pass over the data: one for each negative, all with one positive.

    Pass e takes positive number e, and the negatives from number e x num_negatives on, counting in a circle; so the
    first pass takes the first ones.

    Args:
        num_negatives: how many; a row that has fewer gives all of them.
    """
    if positives := row.get(POSITIVES):
        row = with_positive(row, positives[epoch % len(positives)], prompt_key)
    negatives = row.get(NEGATIVES)
    if not negatives:
        return [row]
    first, count = epoch * num_negatives, min(num_negatives, len(negatives))
    return [with_negative(row, negatives[number % len(negatives)]) for number in range(first, first + count)]


def with_positive(row: Row, text: str, prompt_key: str) -> Row:
    """The row with another text in place of its prompt's."""
    messages = list(row[prompt_key])
    place = last_user_turn(messages)
    messages[place] = {**messages[place], "content": text}
    return {**row, prompt_key: messages}


def with_negative(row: Row, text: str) -> Row:
    """The row with another negative."""
    return {**row, TRIPLET: {**row[TRIPLET], TRIPLET_FIELDS["negative"]: text}}


def kept_texts(lists: Sequence[Sequence[str] | None], keep: Iterable[bool], type_: pa.DataType) -> pa.Array:
    """The lists without some of their texts.

    Args:
        keep: of every text of all lists, in their order.
        type_: of the column.
    """
    flags = iter(keep)
    return pa.array([texts and [text for text in texts if next(flags)] for texts in lists], type_)

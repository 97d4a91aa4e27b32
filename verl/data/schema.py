"""The parquet schema of each mode, and the conversion of spooled samples to it, a batch at a time.

One explicit schema per mode serves both splits, so that a column that happens to be all null in one of
them keeps its type.
"""

import numpy as np
import pyarrow as pa

from verl.data.samples import LISTS, Mode
from verl.embedding.prompts import SYSTEM_PROMPT, rationale_messages

ABILITY = "natural_language_inference"

_MESSAGE = pa.struct({"role": pa.string(), "content": pa.string()})
_COMMON: dict[str, pa.DataType] = {
    "data_source": pa.string(),
    "prompt": pa.list_(_MESSAGE),
    "ability": pa.string(),
    "reward_model": pa.struct({"style": pa.string(), "ground_truth": pa.string()}),
}
_TEXTS_IN_EXTRA_INFO: dict[Mode, dict[str, str]] = {
    "supervised": {"original_query": "query", "positive_example": "positive", "negative_example": "negative"},
    "unsupervised": {"text": "text"},
}
"""Per mode, the texts that `extra_info` repeats: their name there and the sample's field."""


def _extra_info(mode: Mode) -> pa.DataType:
    texts = dict.fromkeys(_TEXTS_IN_EXTRA_INFO[mode], pa.string())
    ends = {"source": pa.string(), "line_idx": pa.int64()}
    return pa.struct({"split": pa.string(), "index": pa.int64(), **texts, **ends})


_MULTI_INPUT = pa.struct(dict.fromkeys(("query", "instruction", "negative_document"), pa.string()))
_ALL_TEXTS = dict.fromkeys(LISTS.values(), pa.list_(pa.string()))
"""All positives or negatives of a sample that has several; null where there is one, which the other columns hold."""

SCHEMAS: dict[Mode, pa.Schema] = {
    "supervised": pa.schema(
        {**_COMMON, "extra_info": _extra_info("supervised"), "multi_input": _MULTI_INPUT, **_ALL_TEXTS}
    ),
    "unsupervised": pa.schema({**_COMMON, "extra_info": _extra_info("unsupervised")}),
}

REPEATING_COLUMNS = [
    "data_source",
    "prompt.list.element.role",
    "ability",
    "reward_model.style",
    "extra_info.split",
    "extra_info.source",
]
"""Parquet paths worth a dictionary; on texts one would be built and thrown away."""


def build_rows(
    mode: Mode, samples: pa.RecordBatch, split: str, first_index: int, system_prompt: str | None = SYSTEM_PROMPT
) -> pa.RecordBatch:
    """The training rows of `samples`, numbered from `first_index`; without a system turn if `system_prompt` is None."""
    num_rows = len(samples)
    main = samples["positive" if mode == "supervised" else "text"]
    is_supervised = mode == "supervised"
    style, truth = ("multi_input", main) if is_supervised else ("unsupervised", pa.repeat("", num_rows))
    columns = [
        pa.repeat(mode, num_rows),
        _prompts(main, system_prompt),
        pa.repeat(ABILITY, num_rows),
        _struct(SCHEMAS[mode].field("reward_model").type, [pa.repeat(style, num_rows), truth]),
        _struct(
            SCHEMAS[mode].field("extra_info").type,
            [
                pa.repeat(split, num_rows),
                pa.array(np.arange(first_index, first_index + num_rows)),
                *(samples[field] for field in _TEXTS_IN_EXTRA_INFO[mode].values()),
                samples["source"],
                samples["line_idx"],
            ],
        ),
    ]
    if is_supervised:
        # `instruction` holds the positive text: the name is verl's, the content is the method's.
        columns.append(_struct(_MULTI_INPUT, [samples["query"], main, samples["negative"]]))
        columns += [samples[name] for name in _ALL_TEXTS]
    return pa.record_batch(columns, schema=SCHEMAS[mode])


def _struct(type_: pa.DataType, children: list[pa.Array]) -> pa.StructArray:
    return pa.StructArray.from_arrays(children, fields=list(type_.fields))


def _prompts(texts: pa.Array, system_prompt: str | None) -> pa.ListArray:
    """[rationale_messages(text, system_prompt) for text in texts]; `texts` are stripped."""
    frame = rationale_messages("", system_prompt)
    constants = [message["content"] for message in frame if message["role"] != "user"]
    num_texts, num_messages = len(texts), len(frame)
    # Index of every message's content in texts + constants.
    take = np.empty((num_texts, num_messages), np.int32)
    next_constant = num_texts
    for column, message in enumerate(frame):
        if message["role"] == "user":
            take[:, column] = np.arange(num_texts)
        else:
            take[:, column] = next_constant
            next_constant += 1
    contents = pa.concat_arrays([texts, pa.array(constants, pa.string())]).take(pa.array(take.ravel()))
    roles = pa.array([message["role"] for message in frame], pa.string())
    roles = roles.take(pa.array(np.tile(np.arange(num_messages), num_texts)))
    offsets = np.arange(0, (num_texts + 1) * num_messages, num_messages, dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), _struct(_MESSAGE, [roles, contents]))

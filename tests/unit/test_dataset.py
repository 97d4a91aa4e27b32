"""Samples from parquet: which ones a step gets, their chats by role, and their rows."""

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny import tiny_tokenizer

from verl.config import DataConfig
from verl.data.collator import PromptCollator
from verl.data.dataset import PromptDataset
from verl.data.step_batches import StepBatches
from verl.embedding.prompts import PromptRenderer, rationale_messages
from verl.embedding.settings import EmbedderSettings
from verl.errors import UserError
from verl.step_schedule import StepSchedule

ROLES = ("positive", "query", "negative")


def prompt_rows() -> list[dict[str, Any]]:
    return [
        {
            "data_source": "supervised",
            "prompt": rationale_messages(f"positive {i}" + " long" * (i == 2) * 60, system_prompt="Own system words."),
            "reward_model": {"style": "multi_input", "ground_truth": f"positive {i}"},
            "extra_info": {"index": i},
            "multi_input": {"query": f"query {i}", "instruction": "", "negative_document": f"negative {i}"},
        }
        for i in range(5)
    ]


def write(path: Path, rows: list[dict[str, Any]] | pa.Table) -> str:
    pq.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.fixture
def parquet(tmp_path: Path) -> str:
    return write(tmp_path / "train.parquet", prompt_rows())


def renderer(limit: int | None = None) -> PromptRenderer:
    return PromptRenderer(tiny_tokenizer(), limit)


def collator(limit: int | None = None) -> PromptCollator:
    return PromptCollator(renderer(limit), EmbedderSettings(), "data_source")


def positions(*args, **kwargs) -> list[list[int]]:
    """Of the samples of each step, by the arguments of `StepBatches`."""
    return [[position for _, position in step] for step in StepBatches(*args, **kwargs)]


def test_every_epoch_visits_each_sample_at_most_once_in_an_order_of_its_own():
    batches = positions(StepSchedule(10, 3, 3), first_step=0, num_steps=9, seed=1)
    epochs = [sum(batches[i : i + 3], []) for i in (0, 3, 6)]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert positions(StepSchedule(10, 3, 3), 0, 9, seed=2) != batches


@pytest.mark.parametrize("schedule", [StepSchedule(10, 3, 3), StepSchedule(10, 2, 4, 1, 2)])
@pytest.mark.parametrize("first_step", range(9))
def test_a_resumed_run_sees_the_samples_the_whole_run_saw(first_step, schedule):
    whole = positions(schedule, 0, 9, seed=1)
    assert positions(schedule, first_step, 9, seed=1) == whole[first_step:]


def test_steps_of_two_sizes_take_turns_in_a_pass_and_no_sample_is_twice_in_a_step():
    schedule = StepSchedule(num_samples=10, samples=2, contrastive_samples=4, warm_up_steps=1, steps_between=2)
    in_order = [[0, 1, 2, 3], [4, 5], [6, 7, 8, 9], [0, 1, 2, 3], [4, 5], [6, 7, 8, 9], [0, 1, 2, 3], [4, 5]]
    assert positions(schedule, 0, 8, seed=None) == in_order
    # A pass ends where its rest is too small, by the size of the step that is next.
    schedule = StepSchedule(num_samples=7, samples=2, contrastive_samples=4, steps_between=1)
    in_order = [[0, 1], [2, 3, 4, 5], [0, 1], [2, 3, 4, 5], [0, 1]]
    assert positions(schedule, 0, 5, seed=None) == in_order
    passes = [torch.randperm(7, generator=torch.Generator().manual_seed(5 + epoch)).tolist() for epoch in range(2)]
    shuffled = [passes[0][:2], passes[0][2:6], passes[1][:2], passes[1][2:6]]
    assert positions(schedule, 0, 4, seed=5) == shuffled


@pytest.mark.parametrize("schedule", [StepSchedule(10, 3, 3), StepSchedule(10, 2, 4, 1, 2), StepSchedule(9, 4, 1, 5)])
def test_the_schedule_counts_as_its_steps_do(schedule):
    batches = positions(schedule, 0, 12, seed=None)
    epochs = [place.epoch for place, _ in zip(schedule.places(), batches, strict=False)]
    for steps in range(13):
        assert schedule.samples_seen(steps) == sum(map(len, batches[:steps]))
        assert schedule.steps_with_rationales(steps) == sum(map(schedule.writes_rationales, range(1, steps + 1)))
    # Every pass begins with the file's first sample.
    assert epochs == [sum(batch[0] == 0 for batch in batches[: i + 1]) - 1 for i in range(12)]
    assert [schedule.steps_of(n) for n in (0, 1, 2)] == [epochs.index(n) for n in (0, 1, 2)]


def test_without_a_seed_the_order_is_the_files():
    assert positions(StepSchedule(6, 2, 2), 0, 4, seed=None) == [[0, 1], [2, 3], [4, 5], [0, 1]]


def test_anchors_get_the_system_turn_of_their_own_sample(parquet):
    dataset = PromptDataset([parquet], DataConfig(), ROLES, renderer())
    chats = dataset[3]["chats"]
    assert {role: chat[-1]["content"] for role, chat in chats.items()} == {
        "positive": "positive 3",
        "query": "query 3",
        "negative": "negative 3",
    }
    assert {chat[0]["content"] for chat in chats.values()} == {"Own system words."}


def test_rows_hold_the_rendered_prompts_left_padded(parquet):
    dataset = PromptDataset([parquet], DataConfig(), ROLES, renderer())
    tokenizer = tiny_tokenizer()
    rows = collator()([dataset[0], dataset[1]])
    assert list(rows.non_tensor_batch["role"]) == [*ROLES, *ROLES]
    assert list(rows.non_tensor_batch["uid"]) == [0, 0, 0, 1, 1, 1]
    for i in range(len(rows)):
        length, start = int(rows.batch["prompt_length"][i]), int(rows.batch["text_start"][i])
        assert start == rows.batch["pool_start"][i]
        ids = rows.batch["prompts"][i, -length:]
        assert (rows.batch["prompts"][i, :-length] == tokenizer.pad_token_id).all()
        text = rows.non_tensor_batch["text"][i]
        assert tokenizer.decode(ids[start:]) == f"{text}<|im_end|>\n<|im_start|>assistant\n"


def test_over_long_samples_are_dropped_or_cut(parquet):
    chat = rationale_messages("positive 0", system_prompt="Own system words.")
    limit = renderer().lengths([chat])[0] + 5
    cutting = PromptDataset([parquet], DataConfig(), ROLES, renderer(limit))
    assert len(cutting) == 5
    rows = collator(limit)([cutting[2]])
    assert rows.meta_info["num_shortened"] == 1 and int(rows.batch["prompt_length"].max()) <= limit
    config = DataConfig(filter_overlong_prompts=True, max_prompt_length=limit)
    dropping = PromptDataset([parquet], config, ROLES, renderer(limit))
    assert dropping.num_dropped == 1
    assert [dropping[i]["extra_info"]["index"] for i in range(4)] == [0, 1, 3, 4]


def test_what_stands_around_a_text_counts_in_its_length(parquet):
    limit = renderer().lengths([rationale_messages("positive 0", system_prompt="Own system words.")])[0] + 5
    config = DataConfig(filter_overlong_prompts=True, max_prompt_length=limit, document={"template": "Say: {text}"})
    assert PromptDataset([parquet], config, ROLES, renderer(limit)).num_dropped == 1
    config = DataConfig(filter_overlong_prompts=True, max_prompt_length=limit, document={"template": "Passage: {text}"})
    with pytest.raises(UserError, match=f"each of the 5 has a text beyond data.max_prompt_length={limit}. Raise it"):
        PromptDataset([parquet], config, ROLES, renderer(limit))


def test_the_same_text_is_its_own_anchor_without_triplets(parquet):
    dataset = PromptDataset([parquet], DataConfig(train_mode="unsupervised"), ("positive", "query"), renderer())
    chats = dataset[1]["chats"]
    assert chats["query"] == chats["positive"]


def test_an_empty_file_is_an_error(parquet, tmp_path):
    pq.write_table(pq.read_table(parquet).slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(UserError, match="empty.parquet: there are no samples.*--test_ratio"):
        PromptDataset([str(tmp_path / "empty.parquet")], DataConfig(), ROLES, renderer())


def test_files_are_joined(parquet):
    assert len(PromptDataset([parquet, parquet], DataConfig(), ROLES, renderer())) == 10


def with_row_3(**columns: Any) -> list[dict[str, Any]]:
    rows = prompt_rows()
    rows[2] |= columns
    return rows


def all_rows(prompt: Any) -> list[dict[str, Any]]:
    return [{**row, "prompt": prompt} for row in prompt_rows()]


USER = {"role": "user", "content": "a text"}
BAD_ROWS = {
    "a plain text": (all_rows("a text"), "column 'prompt' is string instead of a list of messages"),
    "a list of texts": (all_rows(["a", "text"]), "column 'prompt' is list<element: string> instead of"),
    "conversations": (all_rows([{"from": "human", "value": "a"}]), "without the text 'role', 'content'"),
    "parts": (all_rows([{"role": "user", "content": [{"type": "text"}]}]), "without the text 'content'"),
    "always null": (all_rows(None), "column 'prompt' is null instead of a list of messages"),
    "null": (with_row_3(prompt=None), "row 3: prompt is null"),
    "no turn": (with_row_3(prompt=[]), "row 3: prompt has no message of the role 'user'"),
    "no user turn": (with_row_3(prompt=[{**USER, "role": "human"}]), "row 3: prompt has no message of the role 'user'"),
    "null content": (with_row_3(prompt=[{**USER, "content": None}]), "row 3: prompt.content is null"),
    "null role": (with_row_3(prompt=[{"role": None, "content": "s"}, USER]), "row 3: prompt.role is null"),
    "no text": (with_row_3(prompt=[USER, {**USER, "content": " \n\u3000"}]), "row 3: prompt has an empty user text"),
    "null negative": (
        with_row_3(multi_input={"query": "q", "negative_document": None}),
        "row 3: multi_input.negative_document is null",
    ),
    "null triplet": (with_row_3(multi_input=None), "row 3: multi_input.query is null"),
    "empty query": (
        with_row_3(multi_input={"query": " ", "negative_document": "n"}),
        "row 3: multi_input.query is empty",
    ),
    "always null negative": (
        [{**row, "multi_input": {"query": "q", "negative_document": None}} for row in prompt_rows()],
        "column 'multi_input' is struct<query: string, negative_document: null>, without the text 'negative_document'",
    ),
    "no negative": (
        [{**row, "multi_input": {"query": "q"}} for row in prompt_rows()],
        "column 'multi_input' is struct<query: string>, without the text 'negative_document'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("rows", "message"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_row_that_cannot_be_rendered_is_refused_by_file_row_and_column(tmp_path, rows, message):
    # The second file: its rows have numbers of their own.
    files = [write(tmp_path / "good.parquet", prompt_rows()), write(tmp_path / "bad.parquet", rows)]
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'bad.parquet'}")) as error:
        PromptDataset(files, DataConfig(), ROLES, renderer())
    assert message in str(error.value)


def test_a_text_that_is_not_utf8_is_refused_by_its_row(tmp_path):
    table = pa.Table.from_pylist(prompt_rows())
    broken = pa.array([b"q", b"q", b"\xff", b"q", b"q"])
    texts = {"query": pa.Array.from_buffers(pa.string(), 5, broken.buffers()), "negative_document": pa.array(["n"] * 5)}
    triplets = pa.StructArray.from_arrays(list(texts.values()), list(texts))
    file = write(tmp_path / "bad.parquet", table.set_column(4, "multi_input", triplets))
    with pytest.raises(UserError, match=r"bad.parquet, row 3: multi_input.query is not UTF-8"):
        PromptDataset([file], DataConfig(), ROLES, renderer())


def test_rows_that_are_not_used_are_not_checked(tmp_path):
    file = write(tmp_path / "texts.parquet", with_row_3(multi_input=None))
    assert len(PromptDataset([file], DataConfig(train_mode="unsupervised"), ("positive", "query"), renderer())) == 5
    assert len(PromptDataset([file], DataConfig(), ("positive",), renderer())) == 5


def test_turns_that_the_template_refuses_are_found_in_any_row(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template += "{% if messages[-1].role == 'assistant' %}{{ messages[0].content }}{% endif %}"
    file = write(tmp_path / "in.parquet", with_row_3(prompt=[USER, {"role": "assistant", "content": "an answer"}]))
    with pytest.raises(UserError, match=r"shows the user's text 2 times .*in.parquet, row 3"):
        PromptDataset([file], DataConfig(), ROLES, PromptRenderer(tokenizer))


def test_files_whose_columns_do_not_fit_together_are_refused(parquet, tmp_path):
    other = write(tmp_path / "other.parquet", [{**row, "extra_info": "none"} for row in prompt_rows()])
    with pytest.raises(UserError, match="columns of different types"):
        PromptDataset([parquet, other], DataConfig(), ROLES, renderer())


def test_a_tokenizer_that_was_saved_with_truncation_and_padding_measures_whole_prompts(parquet):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=2_000)
    limit = renderer().lengths([rationale_messages("positive 0", system_prompt="Own system words.")])[0] + 5
    config = DataConfig(filter_overlong_prompts=True, max_prompt_length=limit)
    dataset = PromptDataset([parquet], config, ROLES, PromptRenderer(tokenizer, limit))
    assert [dataset[i]["extra_info"]["index"] for i in range(len(dataset))] == [0, 1, 3, 4]
    assert list(dataset.length_lines()) == [
        ("over-long samples", f"1 dropped, 4 left (data.max_prompt_length={limit} tokens)")
    ]


@pytest.mark.parametrize("truncation", ["right", "left", "middle"])
def test_the_share_of_samples_that_are_cut_is_told(parquet, truncation):
    limit = renderer().lengths([rationale_messages("positive 0", system_prompt="Own system words.")])[0] + 5
    config = DataConfig(max_prompt_length=limit, truncation=truncation)
    dataset = PromptDataset([parquet, parquet], config, ROLES, renderer(limit))
    told = " ".join(text for _, text in dataset.length_lines())
    assert "WARNING: 20.00% of the samples have a text" in told
    assert f"data.max_prompt_length={limit} tokens, which data.truncation={truncation} cuts" in told
    longer = DataConfig(max_prompt_length=1000, truncation=truncation)
    assert not list(PromptDataset([parquet], longer, ROLES, renderer(1000)).length_lines())


def test_an_over_long_text_anywhere_ends_a_run_before_its_start_with_truncation_error(parquet):
    limit = renderer().lengths([rationale_messages("positive 0", system_prompt="Own system words.")])[0] + 5
    config = DataConfig(max_prompt_length=limit, truncation="error")
    with pytest.raises(UserError, match=r"1 of 5 samples have a text of more tokens .* 'positive 2 long"):
        PromptDataset([parquet], config, ROLES, PromptRenderer(tiny_tokenizer(), limit, "error"))

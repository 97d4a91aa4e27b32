"""Samples from parquet: which ones a step gets, their chats by role, and their rows."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import tiny_tokenizer

from verl.config import DataConfig
from verl.data.dataset import PromptCollator, PromptDataset, StepBatches
from verl.embedding.prompts import PromptRenderer, rationale_messages
from verl.embedding.settings import EmbedderSettings
from verl.errors import UserError

ROLES = ("positive", "query", "negative")


@pytest.fixture
def parquet(tmp_path: Path) -> str:
    rows = [
        {
            "data_source": "supervised",
            "prompt": rationale_messages(f"positive {i}" + " long" * (i == 2) * 60, system_prompt="Own system words."),
            "reward_model": {"style": "multi_input", "ground_truth": f"positive {i}"},
            "extra_info": {"index": i},
            "multi_input": {"query": f"query {i}", "instruction": "", "negative_document": f"negative {i}"},
        }
        for i in range(5)
    ]

    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    return str(tmp_path / "train.parquet")


def renderer(limit: int | None = None) -> PromptRenderer:
    return PromptRenderer(tiny_tokenizer(), limit)


def collator(limit: int | None = None) -> PromptCollator:
    return PromptCollator(renderer(limit), EmbedderSettings(), "data_source")


def test_every_epoch_visits_each_sample_at_most_once_in_an_order_of_its_own():
    batches = list(StepBatches(num_samples=10, batch_size=3, first_step=0, num_steps=9, seed=1))
    epochs = [sum(batches[i : i + 3], []) for i in (0, 3, 6)]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert list(StepBatches(10, 3, 0, 9, seed=2)) != batches


@pytest.mark.parametrize("first_step", range(9))
def test_a_resumed_run_sees_the_samples_the_whole_run_saw(first_step):
    whole = list(StepBatches(10, 3, 0, 9, seed=1))
    assert list(StepBatches(10, 3, first_step, 9, seed=1)) == whole[first_step:]


def test_without_a_seed_the_order_is_the_files():
    assert list(StepBatches(6, 2, 0, 4, seed=None)) == [[0, 1], [2, 3], [4, 5], [0, 1]]


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
        length, start = int(rows.batch["prompt_length"][i]), int(rows.batch["pool_start"][i])
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


def test_the_same_text_is_its_own_anchor_without_triplets(parquet):
    dataset = PromptDataset([parquet], DataConfig(train_mode="unsupervised"), ("positive", "query"), renderer())
    chats = dataset[1]["chats"]
    assert chats["query"] == chats["positive"]


def test_an_empty_file_is_an_error(parquet, tmp_path):
    pq.write_table(pq.read_table(parquet).slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(UserError, match="no samples to train on"):
        PromptDataset([str(tmp_path / "empty.parquet")], DataConfig(), ROLES, renderer())


def test_files_are_joined(parquet):
    assert len(PromptDataset([parquet, parquet], DataConfig(), ROLES, renderer())) == 10

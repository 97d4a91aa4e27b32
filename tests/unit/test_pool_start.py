"""A model is served with the pooling it was rewarded with: training's embeddings against those of GraceEncoder."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from steps import TEMPERATURE
from tiny import tiny_tokenizer

from verl import GraceEncoder
from verl.config import DataConfig, MicroBatchLimit, RunConfig
from verl.data.dataset import PromptDataset
from verl.embedding.prompts import PromptRenderer, rationale_messages
from verl.models.load import load_causal_lm
from verl.models.policy import PolicyModel
from verl.trainer.run import build_collate
from verl.workers.reward_manager.hidden import HiddenRewardManager
from verl.workers.scoring import score

TEXT = "a river under an old bridge"


@pytest.fixture
def dataset(tmp_path) -> PromptDataset:
    row = {"data_source": "unsupervised", "prompt": rationale_messages(TEXT), "reward_model": None, "extra_info": None}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "train.parquet")
    renderer = PromptRenderer(tiny_tokenizer())
    config = DataConfig(train_mode="unsupervised")
    return PromptDataset([str(tmp_path / "train.parquet")], config, ("positive", "query"), renderer)


@pytest.mark.parametrize("exclude_system_prompt", [True, False])
def test_training_and_the_encoder_of_its_checkpoint_pool_the_same_tokens(
    exclude_system_prompt, dataset, tiny_folder, tmp_path
):
    manager = HiddenRewardManager(exclude_system_prompt=exclude_system_prompt)
    collate = build_collate(RunConfig(), dataset, PromptRenderer(tiny_tokenizer()), manager)
    encoder = GraceEncoder(tiny_folder, device="cpu", settings=collate.settings)
    vector = encoder.encode(TEXT, think=False)
    # A row without a rationale: then what is pooled of the prompt decides the whole vector.
    empty = {"responses": torch.zeros(1, 1, dtype=torch.int64), "response_length": torch.tensor([0])}
    rows = collate([dataset[0]])[[0]].with_tensors(**empty)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        policy = PolicyModel(load_causal_lm(str(tiny_folder)))
        scored = score(policy, rows, MicroBatchLimit(None, 1), TEMPERATURE, embed=True, entropy=False)
    finally:
        dist.destroy_process_group()
    np.testing.assert_allclose(scored.batch["embeddings"][0].numpy(), vector, atol=1e-5)

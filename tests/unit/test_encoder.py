"""The encoder's vectors are those that training rewards, however texts are batched."""

import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from verl.config import DataConfig
from verl.embedding.encoder import GraceEncoder
from verl.models.policy import PolicyModel, load_causal_lm
from verl.protocol import DataProto
from verl.utils.dataset import collate
from verl.workers.actor import MicroBatchLimit, score

TEXTS = [
    "a card",
    "the quick brown fox jumps over the lazy dog",
    "where is my parcel?",
    "a card",
    "naïve café",
]
GREEDY = {"max_new_tokens": 12, "temperature": 0.0}


@pytest.fixture(scope="module")
def encoder(tiny_folder):
    return GraceEncoder(str(tiny_folder), device="cpu")


def test_vectors_equal_those_of_the_training_pass(encoder, tiny_folder, tmp_path):
    vectors = encoder.encode(TEXTS, **GREEDY)
    prompts = encoder.renderer.render([[*_chat(encoder, text)] for text in TEXTS])
    responses = encoder._think(prompts, 12, 0.0, seed=0)
    samples = [
        {
            "uid": i,
            "chats": {"positive": _chat(encoder, t)},
            "data_source": "",
            "reward_model": {},
            "extra_info": {},
        }
        for i, t in enumerate(TEXTS)
    ]
    rows = collate(samples, encoder.renderer, pad_id=0, config=DataConfig())
    width = max(map(len, responses))
    padded = torch.tensor([r + [0] * (width - len(r)) for r in responses])
    lengths = torch.tensor([len(r) for r in responses])
    rows = rows.union(DataProto.from_dict({"responses": padded, "response_length": lengths}))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    policy = PolicyModel(load_causal_lm(str(tiny_folder)))
    trained = score(policy, rows, MicroBatchLimit(90, None), 1.0, embed=True, entropy=False)
    dist.destroy_process_group()
    np.testing.assert_allclose(vectors, trained.batch["embeddings"].numpy(), atol=2e-6)


def test_vectors_are_the_mean_of_hidden_states_over_text_and_rationale(encoder, tiny_folder):
    (text, vector), rationale_ids = (TEXTS[1], encoder.encode([TEXTS[1]], **GREEDY)[0]), None
    (prompt,) = encoder.renderer.render([_chat(encoder, text)])
    (rationale_ids,) = encoder._think([prompt], 12, 0.0, seed=0)
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder)
    hidden = plain(torch.tensor([prompt.ids + rationale_ids]), output_hidden_states=True).hidden_states[-1].detach()
    mean = hidden[0, prompt.text_start :].mean(0)
    np.testing.assert_allclose(vector, (mean / mean.norm()).numpy(), atol=1e-5)


@pytest.mark.parametrize("think", [True, False])
def test_batch_size_and_order_do_not_change_a_vector(encoder, think):
    expected = encoder.encode(TEXTS, think=think, **GREEDY)
    one_by_one = encoder.encode(TEXTS, batch_size=1, think=think, **GREEDY)
    backwards = encoder.encode(TEXTS[::-1], batch_size=2, think=think, **GREEDY)[::-1]
    np.testing.assert_allclose(one_by_one, expected, atol=1e-5)
    np.testing.assert_allclose(backwards, expected, atol=1e-5)
    np.testing.assert_array_equal(expected[0], expected[3])
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, atol=1e-5)


def test_thinking_changes_the_vector_and_not_thinking_writes_nothing(encoder):
    thought, rationales = encoder.encode_with_rationales(TEXTS, **GREEDY)
    plain, nothing = encoder.encode_with_rationales(TEXTS, think=False)
    assert all(rationales) and not any(nothing)
    assert np.abs(thought - plain).max() > 0.01


def test_no_texts_give_no_vectors(encoder):
    assert encoder.encode([]).shape == (0, encoder.policy.lm.config.hidden_size)


def test_settings_of_a_trained_folder_are_used(tiny_folder, tmp_path, encoder):
    folder = tmp_path / "trained"
    folder.mkdir()
    for file in tiny_folder.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "embedder_config.json").write_text(json.dumps({"system_prompt": "Other words.", "max_new_tokens": 3}))
    trained = GraceEncoder(str(folder), device="cpu")
    assert trained.settings["max_new_tokens"] == 3
    assert not np.allclose(trained.encode(["a card"], think=False), encoder.encode(["a card"], think=False))


def _chat(encoder, text):
    return [
        {"role": "system", "content": encoder.settings["system_prompt"]},
        {"role": "user", "content": text},
    ]

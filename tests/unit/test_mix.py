"""Shares of text and rationale and the average of two vectors, against loops over a plain transformers forward."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from steps import TEMPERATURE, tiny_policy
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM

from verl import GraceEncoder
from verl.config import DataConfig, MicroBatchLimit, RunConfig
from verl.data.dataset import PromptDataset
from verl.embedding.prompts import PromptRenderer, rationale_messages
from verl.embedding.settings import NO_MIX, EmbedderSettings, Mix
from verl.errors import UserError
from verl.models.load import load_causal_lm
from verl.models.packing import Row, pack
from verl.models.policy import PolicyModel
from verl.protocol import DataProto
from verl.single_controller.dispatch import Dispatch, remote_call
from verl.trainer.run import build_collate
from verl.workers.fsdp_workers import ActorRolloutRefWorker
from verl.workers.reward_manager.checked import CheckedRewardManager
from verl.workers.reward_manager.hidden import HiddenRewardManager
from verl.workers.rollout.base import finish
from verl.workers.scoring import score

TEXTS = ["a card", "where is my parcel?", "naïve café"]
GREEDY = {"max_new_tokens": 7, "temperature": 0.0}
MIXES = [
    {"text_share": 0},
    {"text_share": 0.3},
    {"text_share": 1},
    {"text_share": 0.3, "pool_system_prompt": True},
    {"no_rationale_weight": 0.5},
    {"no_rationale_weight": 0.3, "text_share": 0.7},
    {"no_rationale_weight": 1},
    {"no_rationale_weight": 0.7, "pooling": "last"},
]


@pytest.fixture(scope="module")
def rows(tiny_folder):
    """Prompt and greedy rationale of each text, and the hidden states of both by transformers, as lists."""
    encoder = GraceEncoder(tiny_folder, device="cpu")
    prompts = encoder.renderer.render([rationale_messages(text) for text in TEXTS])
    responses = finish(encoder.backend.generate([p.ids for p in prompts], 0.0, 7, [0] * len(TEXTS), 64))
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder)
    found = []
    for prompt, response in zip(prompts, responses, strict=True):
        with torch.no_grad():
            out = plain(torch.tensor([prompt.ids + response.ids]), output_hidden_states=True)
        found.append((prompt, response.ids, out.hidden_states[-1][0].tolist()))
    return found


def slow_mean(states):
    return [sum(state[k] for state in states) / len(states) for k in range(len(states[0]))]


def slow_unit(vector):
    length = sum(x * x for x in vector) ** 0.5
    return [x / length for x in vector]


def slow_vector(prompt, states, settings):
    """The vector of one row, not normalised."""
    end, last = len(prompt.ids), settings.get("pooling") == "last"
    start = 0 if settings.get("pool_system_prompt") else prompt.text_start
    text = states[end - 1] if last else slow_mean(states[start:end])
    share = settings.get("text_share")
    if last:
        whole = states[-1]
    elif share is None:
        whole = slow_mean(states[start:])
    else:
        whole = [share * t + (1 - share) * r for t, r in zip(text, slow_mean(states[end:]), strict=True)]
    weight = settings.get("no_rationale_weight", 0)
    if not weight:
        return whole
    return [weight * t + (1 - weight) * w for t, w in zip(slow_unit(text), slow_unit(whole), strict=True)]


@pytest.mark.parametrize("settings", MIXES, ids=str)
def test_vectors_equal_loops_while_decoding_and_by_a_forward_over_stored_rationales(
    rows, tiny_folder, tmp_path, settings
):
    expected = np.array([slow_vector(prompt, states, settings) for prompt, _, states in rows])
    chosen = EmbedderSettings(**settings)
    decoding = GraceEncoder(tiny_folder, device="cpu", settings=chosen)
    vectors = decoding.encode(TEXTS, normalize_embeddings=False, batch_size=2, **GREEDY)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert decoding.usage.forward_tokens == 0
    units = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(decoding.encode(TEXTS, **GREEDY), units, atol=1e-5)
    with GraceEncoder(tiny_folder, device="cpu", store=tmp_path) as first:
        by_length = first.encode(TEXTS, **GREEDY)
        alone = first.encode(TEXTS, think=False)
    with GraceEncoder(tiny_folder, device="cpu", store=tmp_path, settings=chosen) as second:
        stored = second.encode(TEXTS, normalize_embeddings=False, **GREEDY)
        # Other vectors of the same rationales, by a forward; the vectors by length are not mistaken for them.
        assert (second.usage.rationales_made, second.usage.vectors_made) == (0, 3)
        assert second.usage.forward_tokens == sum(len(prompt.ids) + len(ids) for prompt, ids, _ in rows)
        np.testing.assert_allclose(stored, expected, atol=1e-5)
        assert np.abs(second.encode(TEXTS, **GREEDY) - by_length).max() > 1e-3
        if settings.keys() <= {"text_share", "no_rationale_weight"}:
            # Without a rationale nothing is mixed: the very vectors that were stored are found again.
            np.testing.assert_array_equal(second.encode(TEXTS, think=False), alone)
            assert second.usage.vectors_made == 3


def test_text_alone_is_the_same_prompt_and_the_limit_of_both_settings(tiny_folder):
    alone = GraceEncoder(tiny_folder, device="cpu").encode(TEXTS, think=False)
    for settings in ({"text_share": 1}, {"no_rationale_weight": 1}):
        encoder = GraceEncoder(tiny_folder, device="cpu", **settings)
        np.testing.assert_allclose(encoder.encode(TEXTS, **GREEDY), alone, atol=1e-5)


@pytest.mark.parametrize("shares", [True, False])
def test_rows_with_and_without_a_mix_share_a_line(rows, shares):
    """Also a row without a rationale, whose share is of nothing; gradients reach the weights through every vector."""
    policy = tiny_policy()
    settings = [{"text_share": 0.3}, {}, {"text_share": 0.2, "no_rationale_weight": 0.6}]
    line = [
        Row(tuple(prompt.ids), tuple(ids), prompt.text_start, False, EmbedderSettings(**own).mix)
        for (prompt, ids, _), own in zip(rows, settings, strict=True)
    ]
    prompt = rows[0][0]
    line.append(Row(tuple(prompt.ids), (), prompt.text_start, False, Mix(0.3, 0.5)))
    expected = [slow_vector(prompt, states, own) for (prompt, _, states), own in zip(rows, settings, strict=True)]
    expected.append(slow_mean(rows[0][2][prompt.text_start : len(prompt.ids)]))
    vectors = policy(pack(line, shares), log_probs=False, embeddings=True).embeddings
    np.testing.assert_allclose(vectors.detach().numpy(), expected, atol=1e-5)
    gradient = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(0))
    (vectors * gradient).sum().backward()
    found = policy.lm.model.norm.weight.grad.clone()
    policy.lm.zero_grad()
    for row, own in zip(line, gradient, strict=True):
        alone = policy(pack([row], shares), log_probs=False, embeddings=True).embeddings[0]
        (alone * own).sum().backward()
    torch.testing.assert_close(found, policy.lm.model.norm.weight.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mix", [{}, {"text_share": 0.3}, {"text_share": 0.2, "no_rationale_weight": 0.6}], ids=str)
def test_training_rewards_the_vectors_of_its_checkpoints_encoder(rows, tiny_folder, tmp_path, process_group, mix):
    text = {"data_source": "", "reward_model": None, "extra_info": None}
    table = [{**text, "prompt": rationale_messages(t)} for t in TEXTS]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "train.parquet")
    renderer = PromptRenderer(tiny_tokenizer())
    config = DataConfig(train_mode="unsupervised")
    dataset = PromptDataset([str(tmp_path / "train.parquet")], config, ("positive",), renderer)
    manager = CheckedRewardManager(HiddenRewardManager(**mix), "hidden")
    collate = build_collate(RunConfig(), dataset, renderer, manager)
    prompts = collate([dataset[i] for i in range(3)])
    assert collate.settings.mix == Mix(**mix) and set(prompts.batch.keys()) & {*Mix._fields} == mix.keys()
    width = max(len(ids) for _, ids, _ in rows)
    responses = {
        "responses": torch.tensor([ids + [0] * (width - len(ids)) for _, ids, _ in rows]),
        "response_length": torch.tensor([len(ids) for _, ids, _ in rows]),
    }
    # What the driver sends to the workers.
    remote = remote_call(ActorRolloutRefWorker.score, Dispatch.DP_COMPUTE_PROTO)
    batch = prompts.union(DataProto.from_dict(responses)).only((*remote.columns, *remote.optional_columns))
    policy = PolicyModel(load_causal_lm(str(tiny_folder)))
    scored = score(policy, batch, MicroBatchLimit(None, 2), TEMPERATURE, embed=True, entropy=False)
    collate.settings.write(tmp_path)
    encoder = GraceEncoder(tiny_folder, device="cpu", settings=EmbedderSettings.read(tmp_path))
    np.testing.assert_allclose(scored.batch["embeddings"].numpy(), encoder.encode(TEXTS, **GREEDY), atol=1e-5)


def test_a_reward_manager_that_knows_no_mix_has_none():
    class Own:
        needs_embeddings = exclude_system_prompt = True

    manager = CheckedRewardManager(Own(), "own.py:Own")
    assert (manager.text_share, manager.no_rationale_weight) == NO_MIX


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_share": 0.3, "pooling": "last"}, "text_share=0.3 needs pooling=mean, and pooling is last"),
        ({"text_share": 0.0, "span": "rationale"}, "text_share=0.0 needs span=input.rationale, and span is rationale"),
        ({"no_rationale_weight": 0.5, "span": "rationale"}, "no_rationale_weight=0.5 needs span=input.rationale"),
        ({"text_share": 1.5}, "text_share=1.5: Input should be less than or equal to 1"),
        ({"text_share": "half"}, "text_share='half': Input should be a valid number"),
        ({"text_share": float("nan")}, "text_share=nan"),
        ({"no_rationale_weight": -0.1}, "no_rationale_weight=-0.1: Input should be greater than or equal to 0"),
    ],
)
def test_what_cannot_be_mixed_names_its_settings(tiny_folder, settings, message):
    with pytest.raises(UserError, match=message):
        GraceEncoder(tiny_folder, device="cpu", **settings)


def test_the_share_by_length_can_be_asked_for_where_the_folder_has_another():
    folder = EmbedderSettings(text_share=0.3)
    assert folder.changed(text_share=None) == folder
    assert folder.changed(text_share="length") == EmbedderSettings()
    assert folder.changed(text_share="length", span="rationale").span == "rationale"
    assert folder.changed(text_share="0.5").text_share == 0.5

"""Thinking queries beside plain documents, from a training step to the encoder of its checkpoint."""

import json

import numpy as np
import pytest
import torch
from runs import main_here, prepare, read_metrics, read_samples, recipe, steps_of, train_here, write_texts
from tiny import tiny_model, tiny_tokenizer

from verl import GraceEncoder
from verl.protocol import DataProto, prompt_ids, response_ids
from verl.workers.group import ActorRolloutRefGroup

ROLES = ["data.trained_text=query", "data.document.think=False", "data.query.template='Query: {text}'"]


@pytest.fixture(scope="module")
def scored() -> list[DataProto]:
    """The rows of each training step with their embeddings, once `run_dir` is there."""
    return []


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, tiny_folder, triplets, scored):
    run_dir = tmp_path_factory.mktemp("runs") / "queries"
    score = ActorRolloutRefGroup.score

    def kept(self, rows: DataProto, *args, for_update: bool, **kwargs) -> DataProto:
        columns = score(self, rows, *args, for_update=for_update, **kwargs)
        if for_update:
            scored.append(rows.union(columns))
        return columns

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ActorRolloutRefGroup, "score", kept)
        done = train_here(
            *recipe(tiny_folder, triplets, run_dir), *ROLES, "trainer.total_training_steps=2", "trainer.save_freq=2",
            "trainer.test_freq=2", "trainer.diag_freq=2", "trainer.diag_texts=6",
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return run_dir


def test_queries_are_trained_and_documents_write_nothing(run_dir):
    for step in (1, 2):
        samples = read_samples(run_dir, step)
        of = {role: [s for s in samples if s["role"] == role] for role in ("query", "positive", "negative")}
        assert {role: len(found) for role, found in of.items()} == {"query": 12, "positive": 4, "negative": 4}
        assert all("reward" in s and s["tokens"] > 0 for s in of["query"])
        assert not any("reward" in s or s["tokens"] or s["rationale"] for s in of["positive"] + of["negative"])
        # A query's text is the user's, without the template.
        assert not any("Query:" in s["text"] for s in samples)
    step = steps_of(run_dir)[0]
    assert step["rationale/trained_tokens_mean"] > 0 == step["rationale/positive_tokens_max"]
    # A query's own negative is not the same for all of its rationales.
    assert step["reward/negative/variance_share"] != pytest.approx(0, abs=1e-3)
    assert step["actor/grad_norm"] > 0 and step["rollout/probs_diff_max"] < 1e-4


def unit_mean(states: np.ndarray) -> np.ndarray:
    return states.mean(0) / np.linalg.norm(states.mean(0))


def test_the_first_steps_vectors_are_those_of_the_encoder_and_of_a_plain_forward(run_dir, scored, tiny_folder):
    """Documents have no rationale, so the encoder's are known without what was drawn; queries have the recorded one."""
    rows, encoder = scored[0], GraceEncoder(tiny_folder, device="cpu", max_prompt_length=220)
    found, roles, texts = rows.batch["embeddings"].numpy(), rows.non_tensor_batch["role"], rows.non_tensor_batch["text"]
    for role in ("positive", "negative"):
        plain = encoder.encode(list(texts[roles == role]), think=False)
        assert len(plain) == 4
        np.testing.assert_allclose(found[roles == role], plain, atol=1e-5)
    lm, tokenizer = tiny_model(), tiny_tokenizer()
    prompts, responses = prompt_ids(rows), response_ids(rows)
    queries = np.flatnonzero(roles == "query")
    assert len(queries) == 12
    for i in queries:
        end = f"{texts[i]}<|im_end|>\n<|im_start|>assistant\n"
        pooled, templated = (tokenizer(words)["input_ids"] for words in (end, f"Query: {end}"))
        assert prompts[i][-len(templated) :] == templated and responses[i]
        # What the template puts before the text is not pooled.
        last = len(pooled) + len(responses[i])
        with torch.no_grad():
            states = lm.model(torch.tensor([prompts[i] + responses[i]])).last_hidden_state[0, -last:]
        np.testing.assert_allclose(found[i], unit_mean(states.numpy()), atol=1e-5)


def test_the_first_steps_rewards_are_those_of_its_vectors(run_dir, scored):
    """The paper's terms pair by pair, with temperature 0.1 and weights of 0.2."""
    rows, samples = scored[0], read_samples(run_dir, 1)
    columns = (rows.non_tensor_batch["uid"], rows.non_tensor_batch["role"], rows.batch["embeddings"].numpy())
    step = list(zip(*columns, strict=True))
    assert [(s["uid"], s["role"]) for s in samples] == [(uid, role) for uid, role, _ in step]
    positive, negative = ({uid: v for uid, role, v in step if role == own} for own in ("positive", "negative"))
    queries = {uid: [v for own, role, v in step if (own, role) == (uid, "query")] for uid in positive}
    for (uid, role, q), sample in zip(step, samples, strict=True):
        if role != "query":
            continue
        # The others of its group: all three less itself, whose cosine is 1.
        clustering = (sum(q @ other for other in queries[uid]) - 1) / 2
        strangers = [max(positive[uid] @ other for other in queries[own]) for own in queries if own != uid]
        parts = {
            "positive": q @ positive[uid] / 0.1,
            "negative": -(q @ negative[uid]) / 0.1,
            "clustering": 0.2 * clustering / 0.1,
            "cross_group": -0.2 * sum(strangers) / 3 / 0.1,
        }
        parts["before_penalty"] = sum(parts.values())
        assert sample["reward_parts"] == pytest.approx(parts, abs=1e-4)
        assert sample["reward"] == pytest.approx(parts["before_penalty"], abs=1e-4)


def test_the_checkpoints_encoder_thinks_about_queries_alone(run_dir):
    folder = run_dir / "global_step_2" / "huggingface"
    settings = json.loads((folder / "embedder_config.json").read_text())
    assert settings["query"]["template"] == "Query: {text}" and settings["document"]["think"] is False
    with GraceEncoder(folder, device="cpu") as encoder:
        texts = ["a river", "a stone"]
        np.testing.assert_array_equal(encoder.encode_document(texts), encoder.encode(texts, think=False))
        assert encoder.usage.rationales_made == 0
        query = encoder.encode_query(texts, return_rationales=True)[1]
        assert all(query) and encoder.usage.rationales_made == 2


def test_diagnoses_judge_rationales_of_texts_that_have_one(run_dir):
    for step in (0, 2):
        lines = [json.loads(line) for line in (run_dir / f"diagnostics/step_{step}.jsonl").read_text().splitlines()]
        probe = json.loads((run_dir / "diagnostics/probe.json").read_text())["texts"]
        for line in lines:
            thinks = probe[line["id"]]["role"] == "query"
            assert (line["tokens"] > 0) is (line["log_likelihood"] is not None) is thinks
            assert thinks or line["cos_without"] == pytest.approx(1, abs=1e-6)
        (told,) = [m for m in read_metrics(run_dir) if m["step"] == step and "diag/texts" in m]
        own = [line for line in lines if line["log_likelihood"] is not None]
        assert told["diag/log_likelihood"] == pytest.approx(np.mean([line["log_likelihood"] for line in own]), abs=1e-5)
        assert told["diag/tokens_mean"] == pytest.approx(np.mean([line["tokens"] for line in own]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.document.think=False"],
            "data.document.think=False, but data.trained_text=positive trains what",
        ),
        (["data.trained_text=query", "data.query.think=False"], "data.query.think=False, but data.trained_text=query"),
        (["data.query.max_new_tokens=11"], "data.query.max_new_tokens=11 is more than data.max_response_length=10"),
        (
            ["data.template='{instruction}: {text}'"],
            "data.template has {instruction}, and data.instructions={} has",
        ),
        (["data.query.template=text"], "data.query.template='text': a template has {text} once"),
    ],
    ids=str,
)
def test_roles_that_cannot_work_end_the_run_before_it_starts(tiny_folder, triplets, tmp_path, overrides, message):
    done = main_here(*recipe(tiny_folder, triplets, tmp_path), *overrides)
    assert done.returncode == 2 and message in done.stderr


def test_plain_texts_have_no_queries_to_train(tiny_folder, tmp_path):
    texts = prepare("unsupervised", write_texts(tmp_path / "raw.txt"), tmp_path / "data")
    done = main_here(*recipe(tiny_folder, texts, tmp_path, "unsupervised"), "data.trained_text=query")
    assert done.returncode == 2 and "data.trained_text=query needs triplets" in done.stderr

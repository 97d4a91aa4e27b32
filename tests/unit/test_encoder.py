"""The encoder's vectors are those that training rewards, whatever the batch, the store and the order of texts."""

import hashlib
import itertools
import json
import os
import re
import shutil
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from tiny import save_tiny
from transformers import AutoModelForCausalLM

from verl import GraceEncoder
from verl.config import MicroBatchLimit
from verl.data.collator import PromptCollator
from verl.embedding.settings import EmbedderSettings
from verl.encoder.backend import Backend, ModelSpec, _group_of_one
from verl.encoder.store import EmbeddingStore
from verl.errors import UserError
from verl.models.load import load_causal_lm
from verl.models.packing import Row
from verl.models.policy import PolicyModel
from verl.protocol import DataProto
from verl.workers.rollout.base import RolloutError, finish
from verl.workers.rollout.decoding import rows_that_fit
from verl.workers.scoring import score

TEXTS = [
    "a card",
    "the quick brown fox jumps over the lazy dog",
    "where is my parcel?",
    "a card",
    "naïve café",
]
GREEDY = {"max_new_tokens": 12, "temperature": 0.0}
PLAIN = {"think": False}
SAMPLED = {"max_new_tokens": 12, "temperature": 1.0}


@pytest.fixture(scope="module")
def encoder(tiny_folder):
    return GraceEncoder(tiny_folder, device="cpu")


def chat(encoder, text):
    return [{"role": "system", "content": encoder.settings.system_prompt}, {"role": "user", "content": text}]


def greedy_responses(encoder, texts):
    prompts = encoder.renderer.render([chat(encoder, text) for text in texts])
    responses = finish(encoder.backend.generate([p.ids for p in prompts], 0.0, 12, [0] * len(texts), 64))
    return prompts, [response.ids for response in responses]


def sha256(content):
    return hashlib.sha256(content).digest()


def hidden_states(folder, ids):
    plain = AutoModelForCausalLM.from_pretrained(folder)
    return plain(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0].detach()


def test_vectors_equal_those_of_the_training_pass(encoder, tiny_folder, tmp_path):
    vectors = encoder.encode(TEXTS, **GREEDY)
    _, responses = greedy_responses(encoder, TEXTS)
    samples = [
        {
            "uid": i,
            "chats": {"positive": chat(encoder, t)},
            "text_roles": {},
            "data_source": "",
            "reward_model": {},
            "extra_info": {},
        }
        for i, t in enumerate(TEXTS)
    ]
    rows = PromptCollator(encoder.renderer, encoder.settings, "data_source")(samples)
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
    (prompt,), (rationale,) = greedy_responses(encoder, TEXTS[1:2])
    mean = hidden_states(tiny_folder, prompt.ids + rationale)[prompt.text_start :].mean(0)
    vector = encoder.encode(TEXTS[1], **GREEDY)
    np.testing.assert_allclose(vector, (mean / mean.norm()).numpy(), atol=1e-5)
    raw = encoder.encode(TEXTS[1], normalize_embeddings=False, **GREEDY)
    np.testing.assert_allclose(raw, mean.numpy(), atol=1e-4)


@pytest.mark.parametrize("pooling", ["last", "eos"])
@pytest.mark.parametrize("think", [True, False])
def test_last_pooling_takes_the_last_token_of_the_row(tiny_folder, encoder, pooling, think):
    (prompt,), (rationale,) = greedy_responses(encoder, TEXTS[1:2])
    last = hidden_states(tiny_folder, prompt.ids + (rationale if think else []))[-1]
    vectors = GraceEncoder(tiny_folder, device="cpu", pooling=pooling).encode(TEXTS, think=think, **GREEDY)
    np.testing.assert_allclose(vectors[1], (last / last.norm()).numpy(), atol=1e-5)


def test_the_span_rationale_does_not_pool_the_text(tiny_folder, encoder):
    (prompt,), (rationale,) = greedy_responses(encoder, TEXTS[1:2])
    mean = hidden_states(tiny_folder, prompt.ids + rationale)[len(prompt.ids) :].mean(0)
    other = GraceEncoder(tiny_folder, device="cpu", span="rationale")
    np.testing.assert_allclose(other.encode(TEXTS[1], **GREEDY), (mean / mean.norm()).numpy(), atol=1e-5)
    with pytest.raises(ValueError, match="span=rationale pools rationales; it needs think=True"):
        other.encode(TEXTS, think=False)


@pytest.mark.parametrize(
    "pooling",
    [{}, {"pool_system_prompt": True}, {"span": "rationale"}, {"pooling": "last"},
     {"pooling": "last", "span": "rationale"}],
)  # fmt: skip
def test_vectors_pooled_while_decoding_are_those_of_a_forward_over_stored_rationales(tiny_folder, tmp_path, pooling):
    settings, options = EmbedderSettings(**pooling), {"normalize_embeddings": False, **SAMPLED}
    decoding = GraceEncoder(tiny_folder, device="cpu", settings=settings)
    vectors = decoding.encode(TEXTS, batch_size=3, **options)
    assert (decoding.usage.vectors_made, decoding.usage.forward_tokens) == (4, 0)
    other = {"pooling": "mean"} if pooling.get("pooling") else {"pooling": "last"}
    with GraceEncoder(tiny_folder, device="cpu", store=tmp_path, **other) as first:
        first.encode(TEXTS, **options)
    with GraceEncoder(tiny_folder, device="cpu", store=tmp_path, settings=settings) as second:
        forwarded = second.encode(TEXTS, **options)
        assert second.usage.rationales_made == 0 and second.usage.forward_tokens > 0
    np.testing.assert_allclose(vectors, forwarded, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [GREEDY, SAMPLED, {"think": False}])
def test_batch_size_order_padding_side_and_other_texts_do_not_change_a_vector(encoder, options):
    texts = [*TEXTS, *(f"text number {n} of several" for n in range(20))]
    expected, rationales = encoder.encode(texts, return_rationales=True, **options)
    for changed in (
        encoder.encode(texts, batch_size=1, **options),
        encoder.encode(texts, batch_size=16, **options),
        encoder.encode(texts[::-1], batch_size=3, **options)[::-1],
        np.stack([encoder.encode(text, **options) for text in texts]),
    ):
        np.testing.assert_allclose(changed, expected, atol=1e-5)
    side = encoder.tokenizer.padding_side
    encoder.tokenizer.padding_side = "left" if side == "right" else "right"
    np.testing.assert_allclose(encoder.encode(texts, **options), expected, atol=1e-5)
    encoder.tokenizer.padding_side = side
    np.testing.assert_array_equal(expected[0], expected[3])
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, atol=1e-5)
    assert encoder.encode(texts, return_rationales=True, batch_size=7, **options)[1] == rationales


@pytest.mark.parametrize(("processes", "at_once"), [(1, 3), (2, 1)])
def test_as_many_rationales_are_written_at_once_as_the_memory_is_enough_for(
    encoder, tiny_folder, monkeypatch, processes, at_once
):
    texts = [f"text number {n}" for n in range(7)]
    prompts = [encoder.renderer.render([chat(encoder, text)])[0].ids for text in texts]
    limited = GraceEncoder(tiny_folder, device="cpu", ignore_eos=True)
    lm = limited.backend.policy.lm
    longest = max(map(len, prompts)) + GREEDY["max_new_tokens"]
    row = next(memory for memory in itertools.count(0, 64) if rows_that_fit(lm, longest, 2 * memory) == 2)
    monkeypatch.setattr("verl.encoder.backend.usable_memory", lambda: 3 * row)
    limited.backend = Backend(limited.backend.spec, processes)
    ended = [len(part) for part in limited.backend.generate(prompts, 0.0, 12, [0] * 7, None)]
    assert ended == [at_once] * (7 // at_once) + [1] * (7 % at_once)
    expected = GraceEncoder(tiny_folder, device="cpu", ignore_eos=True).encode(texts, batch_size=7, **GREEDY)
    np.testing.assert_allclose(limited.encode(texts, **GREEDY), expected, atol=1e-5)


def test_a_repeated_text_is_embedded_once(encoder):
    before = encoder.usage.vectors_made
    encoder.encode(["twice", "once", "twice"], **GREEDY)
    assert encoder.usage.vectors_made - before == 2


def test_seeds_and_temperatures_give_other_rationales(encoder):
    def rationales(**options):
        return encoder.encode(TEXTS, return_rationales=True, **SAMPLED | options)[1]

    assert rationales() == rationales(seed=0) != rationales(seed=1)
    assert rationales(temperature=0.5) != rationales()


def test_a_rationale_changes_the_vector_and_without_thinking_there_is_none(encoder):
    thought, rationales = encoder.encode(TEXTS, return_rationales=True, **GREEDY)
    plain, nothing = encoder.encode(TEXTS, return_rationales=True, think=False)
    assert all(rationales) and not any(nothing)
    assert np.abs(thought - plain).max() > 0.01


def test_a_single_text_gives_a_single_vector(encoder):
    vector, rationale = encoder.encode("a card", return_rationales=True, **GREEDY)
    batch, rationales = encoder.encode(["a card"], return_rationales=True, **GREEDY)
    np.testing.assert_array_equal(vector, batch[0])
    assert rationale == rationales[0]


def test_queries_and_documents_are_embedded_like_any_text(encoder):
    expected = encoder.encode(TEXTS, **GREEDY)
    np.testing.assert_array_equal(encoder.encode_query(TEXTS, **GREEDY), expected)
    np.testing.assert_array_equal(encoder.encode_document(TEXTS, **GREEDY), expected)
    cosine = encoder.similarity(expected, torch.from_numpy(3 * expected[:2]))
    np.testing.assert_allclose(cosine.numpy(), expected @ expected[:2].T, atol=1e-6)


def test_a_truncated_vector_has_unit_length(encoder):
    whole = encoder.encode(TEXTS, normalize_embeddings=False, **GREEDY)
    cut = encoder.encode(TEXTS, truncate_dim=10, **GREEDY)
    np.testing.assert_allclose(cut, whole[:, :10] / np.linalg.norm(whole[:, :10], axis=1, keepdims=True), atol=1e-6)


def test_a_tensor_holds_the_same_vectors(encoder):
    tensor = encoder.encode(TEXTS, convert_to_tensor=True, **GREEDY)
    assert torch.equal(tensor, torch.from_numpy(encoder.encode(TEXTS, **GREEDY)))


class TestInt8:
    """Vectors of different calls have the same ranges, so that they can be compared."""

    @pytest.mark.parametrize("options", [{}, {"normalize_embeddings": False}, {"truncate_dim": 10}])
    def test_a_text_has_one_vector_in_whatever_call(self, encoder, options):
        options = {**PLAIN, **options}
        floats = encoder.encode(TEXTS, **options)
        ranges = np.stack([floats.min(axis=0), floats.max(axis=0)])
        quantized = encoder.encode(TEXTS, precision="int8", int8_ranges=ranges, **options)
        assert quantized.dtype == np.int8 and quantized.shape == floats.shape
        # 256 steps of each dimension's range, counted from -128.
        steps = (ranges[1] - ranges[0]) / 255
        np.testing.assert_array_equal(quantized, np.clip(np.floor((floats - ranges[0]) / steps), 0, 255) - 128)
        for row, text in enumerate(TEXTS):
            alone = encoder.encode(text, precision="int8", int8_ranges=ranges.tolist(), **options)
            # A last bit of a float may move a value over the edge of a step.
            assert np.abs(alone.astype(int) - quantized[row]).max() <= 1
        tensor = encoder.encode(TEXTS, precision="int8", int8_ranges=ranges, convert_to_tensor=True, **options)
        assert torch.equal(tensor, torch.from_numpy(quantized))

    def test_what_lies_outside_the_ranges_is_clipped(self, encoder):
        narrow = np.stack([np.full(64, 10.0), np.full(64, 11.0)])
        assert (encoder.encode("a card", precision="int8", int8_ranges=narrow, **PLAIN) == -128).all()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"precision": "int8"}, r"needs int8_ranges.*np\.stack\(\[v\.min\(axis=0\), v\.max\(axis=0\)\]\)"),
            ({"int8_ranges": np.zeros((2, 64))}, "int8_ranges has no effect with precision=float32"),
            ({"precision": "int8", "int8_ranges": np.zeros((2, 10))}, r"shape \[2, 10\] and must have \[2, 64\]"),
            ({"precision": "int8", "int8_ranges": np.zeros((2, 64)), "truncate_dim": 10}, r"must have \[2, 10\]"),
            ({"precision": "int8", "int8_ranges": np.full((2, 64), np.nan)}, "must be finite"),
            ({"precision": "int8", "int8_ranges": np.array([[1.0] * 64, [0.0] * 64])}, "no least value above"),
            ({"precision": "int8", "int8_ranges": "auto"}, "int8_ranges must hold numbers"),
            ({"precision": "uint8"}, "precision='uint8' must be one of float32, int8"),
        ],
    )
    def test_without_ranges_that_fit_it_is_refused(self, encoder, options, message):
        with pytest.raises(UserError, match=message):
            encoder.encode(TEXTS, **options)


class TestInputs:
    @pytest.mark.parametrize(
        "inputs",
        [
            tuple(TEXTS), iter(TEXTS), (text for text in TEXTS), np.array(TEXTS), np.array(TEXTS, object),
            pd.Series(TEXTS, index=range(5, 10)), dict(enumerate(TEXTS)).values(),
        ],
        ids=["tuple", "iterator", "generator", "array of str", "array of objects", "series", "values of a dict"],
    )  # fmt: skip
    def test_any_sequence_of_strings_is_read(self, tiny_folder, encoder, tmp_path, inputs):
        with GraceEncoder(tiny_folder, device="cpu", store=tmp_path) as stored:
            vectors = stored.encode(inputs, **PLAIN)
        np.testing.assert_allclose(vectors, encoder.encode(TEXTS, **PLAIN), atol=1e-6)

    @pytest.mark.parametrize("nothing", [[], (), iter(()), np.array([], str), pd.Series([], dtype=str)])
    def test_no_texts_give_no_vectors(self, encoder, nothing):
        vectors, rationales = encoder.encode(nothing, return_rationales=True)
        assert vectors.shape == (0, 64) and vectors.dtype == np.float32 and rationales == []

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            (["a", None], r"inputs\[1\] is None, and every text must be a string; leave out or fill in"),
            (pd.Series(["a", float("nan")], dtype=object), r"inputs\[1\] is nan \(float\)"),
            (pd.Series(["a", None]), r"inputs\[1\] is nan \(float\)"),
            (pd.Series(["a", None], dtype="string"), r"inputs\[1\] is <NA> \(NAType\)"),
            (["a", "b", 3], r"inputs\[2\] is 3 \(int\)"),
            ([1.5], r"inputs\[0\] is 1\.5 \(float\)"),
            ([("a", "b")], r"inputs\[0\] is \('a', 'b'\) \(tuple\), .* several texts as several items"),
            ([["instruction", "text"]], r"inputs\[0\] is \['instruction', 'text'\] \(list\)"),
            ([{"text": "a"}], r"inputs\[0\] is \{'text': 'a'\} \(dict\)"),
            ([b"a"], r"inputs\[0\] is b'a' \(bytes\)"),
            (np.array([["a", "b"]]), r"inputs is array\(.* \(ndarray\); give one string, or a list"),
            (np.array("a"), r"inputs is array\("),
            (pd.DataFrame({"text": ["a"]}), r"inputs is .* \(DataFrame\)"),
            (torch.zeros(2, 3), r"inputs is tensor\("),
            ({"text": "a"}, r"inputs is \{'text': 'a'\} \(dict\)"),
            ({"a", "b"}, r"inputs is \{.*\} \(set\)"),
            (b"a", r"inputs is b'a' \(bytes\)"),
            (None, "inputs is None"),
            (5, r"inputs is 5 \(int\)"),
        ],
    )
    def test_what_is_not_a_text_is_named_with_its_place(self, encoder, inputs, message):
        with pytest.raises(UserError, match=message):
            encoder.encode(inputs, **GREEDY)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"temperature": float("nan")}, "temperature=nan: Input should be a finite number"),
            ({"temperature": float("inf")}, "temperature=inf: Input should be a finite number"),
            ({"temperature": -1}, "temperature=-1: Input should be greater than or equal to 0"),
            ({"temperature": "warm"}, "temperature='warm': Input should be a valid number"),
            ({"max_new_tokens": 0}, "max_new_tokens=0: Input should be greater than or equal to 1"),
            ({"max_new_tokens": -5}, "max_new_tokens=-5: Input should be"),
            ({"max_new_tokens": 1.5}, "max_new_tokens=1.5: Input should be a valid integer"),
            ({"batch_size": 0}, "batch_size=0 must be 1 or more"),
            ({"batch_size": 2.0}, "batch_size=2.0 must be a whole number"),
            ({"truncate_dim": 0}, "truncate_dim=0 must be 1 or more"),
            ({"truncate_dim": -3}, "truncate_dim=-3 must be 1 or more"),
            ({"truncate_dim": 65}, "truncate_dim=65 must be at most 64"),
            ({"seed": None}, "seed=None must be a whole number"),
        ],
    )
    def test_an_option_out_of_its_range_is_an_error(self, encoder, options, message):
        with pytest.raises(UserError, match=re.escape(message)):
            encoder.encode(TEXTS, **options)

    def test_numpy_numbers_are_numbers(self, tiny_folder, tmp_path, encoder):
        options = {"max_new_tokens": np.int64(3), "temperature": np.float32(0.5), "seed": np.int64(3)}
        with GraceEncoder(tiny_folder, device="cpu", store=tmp_path) as stored:
            vectors = stored.encode(TEXTS, batch_size=np.int64(2), **options)
        expected = encoder.encode(TEXTS, max_new_tokens=3, temperature=0.5, seed=3)
        np.testing.assert_allclose(vectors, expected, atol=1e-5)

    @pytest.mark.parametrize(
        "options",
        [{"max_prompt_length": 0}, {"max_prompt_length": -1}, {"max_new_tokens": 0}, {"pooling": "max"},
         {"num_processes": 0}, {"tensor_parallel_size": -1}, {"gpu_memory_utilization": float("nan")}],
    )  # fmt: skip
    def test_an_option_of_the_encoder_out_of_its_range_is_an_error(self, tiny_folder, options):
        (name,) = options
        with pytest.raises(UserError, match=f"{name}="):
            GraceEncoder(tiny_folder, device="cpu", **options)

    @pytest.mark.parametrize(("key", "value"), [("temperature", "NaN"), ("temperature", "-1"), ("max_new_tokens", "0")])
    def test_a_folders_setting_out_of_its_range_is_an_error(self, tmp_path, key, value):
        (tmp_path / "embedder_config.json").write_text(f'{{"{key}": {value}}}')
        with pytest.raises(ValueError, match=f"(?s)embedder_config.json: .*{key}"):
            EmbedderSettings.read(tmp_path)


def test_a_text_that_is_too_long_is_cut_before_templating_and_counted(tiny_folder):
    encoder = GraceEncoder(tiny_folder, device="cpu", max_prompt_length=230)
    long = "word " * 200
    vectors = encoder.encode([long, "short"], think=False)
    assert encoder.usage.shortened == 1
    (prompt,) = encoder.renderer.render([chat(encoder, long)])
    assert len(prompt.ids) <= 230 and prompt.text and long.startswith(prompt.text)
    rendered = encoder.tokenizer.decode(prompt.ids)
    assert rendered.endswith("<|im_end|>\n<|im_start|>assistant\n")
    np.testing.assert_allclose(vectors[0], encoder.encode(prompt.text, think=False), atol=1e-6)


def test_rows_beyond_the_models_positions_are_rejected(encoder):
    with pytest.raises(
        ValueError, match="max_prompt_length=1024 and max_new_tokens=4000 are more than the model's 4096"
    ):
        encoder.encode(TEXTS, max_new_tokens=4000)


def test_prompts_beyond_the_models_positions_are_rejected_without_rationales_too(tiny_folder):
    encoder = GraceEncoder(tiny_folder, device="cpu", max_prompt_length=4097)
    with pytest.raises(ValueError, match="max_prompt_length=4097 is more than the model's 4096 positions"):
        encoder.encode(TEXTS, think=False)


def test_a_prompt_that_leaves_no_room_names_the_encoders_own_setting(tiny_folder):
    with pytest.raises(ValueError, match="the prompt without the text fills max_prompt_length=20 and"):
        GraceEncoder(tiny_folder, device="cpu", max_prompt_length=20).encode(TEXTS, think=False)


def test_another_chat_template_is_another_description(tiny_folder, tmp_path, encoder):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>", " <|im_end|>"))
    other = GraceEncoder(folder, device="cpu")
    assert other.revision == encoder.revision and other.describe(think=False) != encoder.describe(think=False)
    encoder.encode_to_parquet(TEXTS, tmp_path / "out", think=False)
    with pytest.raises(UserError, match="tokenizer_hash"):
        other.encode_to_parquet(TEXTS, tmp_path / "out", think=False)


def test_an_empty_text_is_embedded_as_an_empty_turn_and_counted(encoder, tiny_folder):
    before = encoder.usage.empty_texts
    vector = encoder.encode(["a card", "  "], think=False)[1]
    assert encoder.usage.empty_texts - before == 1
    (prompt,) = encoder.renderer.render([chat(encoder, "")])
    assert encoder.tokenizer.decode(prompt.ids[prompt.text_start :]) == "<|im_end|>\n<|im_start|>assistant\n"
    mean = hidden_states(tiny_folder, prompt.ids)[prompt.text_start :].mean(0)
    np.testing.assert_allclose(vector, (mean / mean.norm()).numpy(), atol=1e-5)


def test_settings_of_a_trained_folder_are_used(tiny_folder, tmp_path, encoder):
    folder = shutil.copytree(tiny_folder, tmp_path / "trained")
    (folder / "embedder_config.json").write_text(json.dumps({"system_prompt": "Other words.", "max_new_tokens": 3}))
    trained = GraceEncoder.from_pretrained(folder, device="cpu")
    assert trained.settings.max_new_tokens == 3
    assert not np.allclose(trained.encode(["a card"], think=False), encoder.encode(["a card"], think=False))
    (folder / "embedder_config.json").write_text(json.dumps({"poling": "mean"}))
    with pytest.raises(ValueError, match=r"embedder_config\.json: .*\n*poling"):
        GraceEncoder(folder, device="cpu")


def test_settings_are_read_as_they_were_written(tmp_path):
    settings = EmbedderSettings(system_prompt="naïve", pooling="last", temperature=0.3)
    settings.write(tmp_path)
    assert EmbedderSettings.read(tmp_path) == settings


class TestStore:
    """With a store nothing is made twice, and nothing made with other weights or settings is used."""

    def encode(self, folder, store, expect=None, constructor=(), **options):
        with GraceEncoder(folder, device="cpu", store=store, **dict(constructor)) as encoder:
            result = encoder.encode(TEXTS, return_rationales=True, **{**SAMPLED, **options})
            usage = encoder.usage
        if expect is not None:
            assert (usage.rationales_made, usage.vectors_made) == expect
        return result

    def test_a_second_run_makes_nothing(self, tiny_folder, tmp_path):
        vectors, rationales = self.encode(tiny_folder, tmp_path, (4, 4))
        again, same = self.encode(tiny_folder, tmp_path, (0, 0))
        np.testing.assert_array_equal(again, vectors)
        assert same == rationales
        without = GraceEncoder(tiny_folder, device="cpu").encode(TEXTS, **SAMPLED)
        np.testing.assert_allclose(vectors, without, atol=1e-6)

    def test_another_pooling_uses_the_stored_rationales(self, tiny_folder, tmp_path):
        self.encode(tiny_folder, tmp_path, (4, 4))
        for change in ({"pooling": "last"}, {"span": "rationale"}):
            stored, _ = self.encode(tiny_folder, tmp_path, (0, 4), constructor=change)
            fresh = GraceEncoder(tiny_folder, device="cpu", **change).encode(TEXTS, **SAMPLED)
            np.testing.assert_allclose(stored, fresh, atol=1e-6)

    @pytest.mark.parametrize("change", [{"seed": 1}, {"temperature": 0.5}, {"max_new_tokens": 11}])
    def test_other_sampling_makes_other_rationales(self, tiny_folder, tmp_path, change):
        self.encode(tiny_folder, tmp_path, (4, 4))
        self.encode(tiny_folder, tmp_path, (4, 4), **change)

    def test_other_end_tokens_make_other_rationales(self, tiny_folder, tmp_path):
        folder = shutil.copytree(tiny_folder, tmp_path / "model")
        self.encode(folder, tmp_path / "store", (4, 4))
        _, rationales = self.encode(folder, tmp_path / "store", (0, 0))
        ends = list(range(100, 200))  # most rationales have one of these
        config = json.loads((folder / "generation_config.json").read_text())
        (folder / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": ends}))
        _, shorter = self.encode(folder, tmp_path / "store", (4, 4))
        assert shorter != rationales

    def test_not_thinking_shares_nothing_with_thinking(self, tiny_folder, tmp_path):
        self.encode(tiny_folder, tmp_path, (4, 4))
        self.encode(tiny_folder, tmp_path, (0, 4), think=False)
        self.encode(tiny_folder, tmp_path, (0, 0), think=False)

    def test_other_weights_in_the_same_folder_share_nothing(self, tmp_path):
        folder = save_tiny(tmp_path / "model", seed=0)
        first, _ = self.encode(folder, tmp_path / "store", (4, 4))
        save_tiny(folder, seed=1)
        second, _ = self.encode(folder, tmp_path / "store", (4, 4))
        assert np.abs(first - second).max() > 0.01

    def test_another_system_prompt_shares_nothing(self, tmp_path):
        folder = save_tiny(tmp_path / "model")
        self.encode(folder, tmp_path / "store", (4, 4))
        EmbedderSettings(system_prompt="Other words.").write(folder)
        self.encode(folder, tmp_path / "store", (4, 4))

    def test_keys_are_hashes_of_these_settings_and_of_the_prompt(self, tiny_folder, tmp_path):
        """With others, a new version would find nothing that this one stored."""
        with GraceEncoder(tiny_folder, device="cpu", store=tmp_path) as encoder:
            encoder.encode(TEXTS[1], **SAMPLED)
            (prompt,) = encoder.renderer.render([chat(encoder, TEXTS[1])])
            revision = encoder.revision
            stop_ids = [encoder.tokenizer.eos_token_id]
        sampling = (
            f'{{"dtype": "float32", "engine": "hf", "max_new_tokens": 12, "seed": 0, "stop_ids": {stop_ids}, '
            f'"temperature": 1.0, "think": true, "weights": "{revision}"}}'
        )
        pooling = (
            f'{{"forward_dtype": "float32", "pool_system_prompt": false, "pooling": "mean", "rationales": {sampling}, '
            '"span": "input+rationale"}'
        )
        ids, start = (np.array(numbers, "<i4").tobytes() for numbers in (prompt.ids, [prompt.text_start]))
        rationale_key = sha256(sha256(sampling.encode()) + ids)
        vector_key = sha256(sha256(pooling.encode()) + rationale_key + start)
        with EmbeddingStore(tmp_path) as store:
            assert store.find_rationales([rationale_key]).keys() == {rationale_key}
            assert store.find_vectors([vector_key]).keys() == {vector_key}
            assert store.count() == (1, 1)


class TestFailure:
    """When the engine fails, the call raises the cause and returns no vectors."""

    @pytest.fixture
    def broken(self, tiny_folder, tmp_path, monkeypatch):
        encoder = GraceEncoder(tiny_folder, device="cpu", store=tmp_path)
        generate = encoder.backend.generate

        def fail_after_two(*args):
            parts = generate(*args)
            yield next(parts)
            yield next(parts)
            raise RolloutError("the engine ran out of cache blocks")

        monkeypatch.setattr(encoder.backend, "generate", fail_after_two)
        return encoder

    def test_the_cause_is_raised_and_what_was_finished_is_stored(self, broken, tiny_folder, tmp_path):
        with pytest.raises(RolloutError, match="ran out of cache blocks"):
            broken.encode(TEXTS, batch_size=1, **SAMPLED)
        broken.close()
        assert broken.store.file.stat().st_size
        with GraceEncoder(tiny_folder, device="cpu", store=tmp_path) as healthy:
            vectors = healthy.encode(TEXTS, **SAMPLED)
            assert healthy.usage.vectors_stored == 2 and healthy.usage.rationales_made == 2
        expected = GraceEncoder(tiny_folder, device="cpu").encode(TEXTS, **SAMPLED)
        np.testing.assert_allclose(vectors, expected, atol=1e-6)

    def test_a_text_without_a_rationale_is_an_error(self, encoder, monkeypatch):
        generate = encoder.backend.generate
        monkeypatch.setattr(encoder.backend, "generate", lambda *args: iter([next(generate(*args))]))
        with pytest.raises(RolloutError, match="the engine gave no rationale for 3 of 4 texts"):
            encoder.encode(TEXTS, batch_size=1, **SAMPLED)


def test_revisions_follow_the_weights(tmp_path):
    revisions = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        folder = save_tiny(tmp_path / name, seed=seed)
        revisions.append(GraceEncoder(folder, device="cpu").revision)
    first, same, other = revisions
    assert first == same != other
    files = (tmp_path / "a" / "config.json", tmp_path / "a" / "model.safetensors")
    digests = b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)
    assert first == hashlib.sha256(digests).hexdigest()


def test_while_vllm_starts_it_finds_a_group_of_one_and_then_the_environment_is_as_before(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = dict(os.environ)
    with _group_of_one():
        own = dict(os.environ)
    assert (own["RANK"], own["WORLD_SIZE"]) == ("0", "1") and own["MASTER_PORT"] != "1"
    assert dict(os.environ) == before
    monkeypatch.setenv("RANK", "3")  # a launcher has set it
    with _group_of_one():
        assert os.environ["RANK"] == "3" and os.environ["MASTER_PORT"] == "1"


@contextmanager
def lengths_of_forwards(policy):
    """The tokens of each forward meanwhile."""
    lengths = []
    hook = policy.register_forward_pre_hook(lambda _, args: lengths.append(args[0].input_ids.shape[1]))
    try:
        yield lengths
    finally:
        hook.remove()


def test_a_prompt_that_is_computed_for_every_row_counts_for_every_row(encoder, monkeypatch):
    monkeypatch.setattr(PolicyModel, "shares_prompts", False)  # as on a GPU
    rows = [Row(tuple(range(100, 200)) * 5, (), 0, False)] * 9
    with lengths_of_forwards(encoder.backend.policy) as lengths:
        vectors = encoder.backend.embed(rows, None)
    assert max(lengths) <= 2048 and sum(lengths) == 9 * 500
    np.testing.assert_allclose(vectors, vectors[:1].repeat(9, axis=0), atol=1e-5)


class TestVllmsShare:
    """What vllm is started with; in place of a GPU one of 80 GiB, of which torch keeps 1 MiB for a forward's token."""

    @pytest.fixture
    def backend(self, tiny_folder, monkeypatch):
        backend = Backend(ModelSpec(str(tiny_folder), "vllm", "cpu", max_model_len=300))
        monkeypatch.setattr(PolicyModel, "shares_prompts", False)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (self.free_mib * 2**20, 80 * 2**30))
        hook = backend.policy.register_forward_hook(self.keep)
        self.kept = 0
        yield backend
        hook.remove()

    def keep(self, policy, args, output):
        self.kept = max(self.kept, args[0].input_ids.shape[1])

    @property
    def free_mib(self) -> int:
        return self.without_forward - self.kept

    @pytest.mark.parametrize(
        ("free", "share"), [(66 * 1024, 0.9 * (66 * 1024 - 109 * 300) / (80 * 1024)), (110 * 1024, 0.8)]
    )
    def test_the_policy_and_its_largest_forward_have_room(self, backend, free, share):
        self.without_forward = free
        backend.spec = replace(backend.spec, device="cuda")
        assert backend._vllm_share() == pytest.approx(share)
        backend.spec = replace(backend.spec, gpu_memory_utilization=0.3)
        assert backend._vllm_share() == 0.3

    @pytest.mark.parametrize(("processes", "group", "engines"), [(1, 1, 1), (4, 1, 4), (4, 2, 2)])
    def test_engines_of_one_machine_share_it_and_one_that_does_not_start_names_the_encoders_settings(
        self, tiny_folder, monkeypatch, processes, group, engines
    ):
        def start(model, rollout, *_, engines_per_node, **__):
            assert (rollout.gpu_memory_utilization, engines_per_node) == (0.8, engines)
            raise RolloutError("Change actor_rollout_ref.rollout.*") from ValueError("no kernel for this shape")

        monkeypatch.setattr("verl.encoder.backend.load_vllm_adapter", lambda: SimpleNamespace(VLLMRollout=start))
        backend = Backend(
            ModelSpec(str(tiny_folder), "vllm", "cpu", max_model_len=300, tensor_parallel_size=group), processes
        )
        with pytest.raises(RolloutError, match="no kernel for this shape\nGive engine=hf.* which was 0.80") as caught:
            list(backend.generate([[1, 2]], 0.0, 2, [0], None))
        assert "actor_rollout_ref" not in str(caught.value)


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_a_gpu_whose_memory_runs_out_is_an_error_that_names_settings(tiny_folder, monkeypatch, kind):
    def fill(*_, **__):
        raise kind("CUDA out of memory. Tried to allocate 2.00 GiB.")

    encoder = GraceEncoder(tiny_folder, device="cpu")
    monkeypatch.setattr(encoder.backend.policy, "forward", fill)
    with pytest.raises(RolloutError, match=r"a smaller batch_size .* lower gpu_memory_utilization.*2\.00 GiB"):
        encoder.encode(TEXTS, **PLAIN)


@pytest.mark.parametrize("more", [1, 2])
def test_fewer_gpus_than_processes_are_told_before_a_process_starts(tiny_folder, more):
    there = torch.cuda.device_count()
    with pytest.raises(UserError, match=f"num_processes={there + more} needs as many GPUs, and torch finds {there} "):
        GraceEncoder(tiny_folder, device="cuda", engine="hf", num_processes=there + more)

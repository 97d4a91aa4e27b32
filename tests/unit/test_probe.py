"""The probe of a run: which texts are drawn, how many, and how its file is read again."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import tiny_tokenizer

from verl.batch_plan import BatchPlan
from verl.config import DataConfig, RunConfig
from verl.config_fields import nested
from verl.data.dataset import PromptDataset
from verl.embedding.prompts import PromptRenderer, rationale_messages
from verl.errors import UserError
from verl.trainer.ppo.probe import Probe, choose_probe, diagnosed_steps, wanted_texts

TRIPLET = ("positive", "query", "negative")


def triplets_of(folder: Path, *samples: tuple[str, str, str]) -> PromptDataset:
    rows = [
        {
            "data_source": "supervised", "prompt": rationale_messages(positive), "reward_model": None,
            "extra_info": None, "multi_input": {"query": query, "instruction": "", "negative_document": negative},
        }
        for positive, query, negative in samples
    ]  # fmt: skip
    return dataset_of(folder, rows, "supervised", TRIPLET)


def texts_of(folder: Path, *texts: str) -> PromptDataset:
    rows = [
        {"data_source": "plain", "prompt": rationale_messages(text), "reward_model": None, "extra_info": None}
        for text in texts
    ]
    return dataset_of(folder, rows, "unsupervised", ("positive", "query"))


def dataset_of(folder: Path, rows: list[dict], mode: str, roles: tuple[str, ...]) -> PromptDataset:
    file = str(folder / "rows.parquet")
    pq.write_table(pa.Table.from_pylist(rows), file)
    return PromptDataset([file], DataConfig(train_mode=mode), roles, PromptRenderer(tiny_tokenizer()))


def different(count: int) -> list[tuple[str, str, str]]:
    return [(f"positive {i}", f"query {i}", f"negative {i}") for i in range(count)]


@pytest.mark.parametrize(("wanted", "samples"), [(1, 2), (6, 2), (8, 2), (9, 3), (30, 10), (99, 10)])
def test_a_probe_has_whole_samples_up_to_the_wanted_texts_and_two_at_least(wanted, samples, tmp_path):
    probe = choose_probe(triplets_of(tmp_path, *different(10)), "data.val_files=f", wanted, seed=3)
    assert (probe.seed, probe.source, len(probe.texts)) == (3, "data.val_files=f", 3 * samples)
    assert [text.id for text in probe.texts] == list(range(3 * samples)) and probe.texts_per_sample == 3
    drawn = []
    for sample in (probe.texts[i : i + 3] for i in range(0, len(probe.texts), 3)):
        (number,) = {text.sample for text in sample}
        assert [(text.role, text.text) for text in sample] == [(role, f"{role} {number}") for role in TRIPLET]
        drawn.append(number)
    assert len(set(drawn)) == samples
    # Every text borrows the rationale of the same role in another sample, and each lends its own once.
    assert sorted(probe.other_texts()) == list(range(3 * samples))
    for text, other in zip(probe.texts, probe.other_texts(), strict=True):
        assert probe.texts[other].role == text.role and probe.texts[other].sample != text.sample


def test_a_plain_text_is_in_the_probe_once(tmp_path):
    probe = choose_probe(texts_of(tmp_path, *(f" text {i}\n" for i in range(6))), "f", 4, seed=0)
    assert [(text.role, text.text) for text in probe.texts] == [("positive", f"text {t.sample}") for t in probe.texts]
    assert len(probe.texts) == 4 and probe.texts_per_sample == 1 and probe.other_texts() == [1, 2, 3, 0]


def test_the_seed_alone_decides_what_is_drawn(tmp_path):
    dataset = triplets_of(tmp_path, *different(12))
    first, again, other = (choose_probe(dataset, "f", 9, seed).texts for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("seed", range(4))
def test_a_sample_that_repeats_a_drawn_text_is_passed_over(seed, tmp_path):
    """Also in another role, and with other white space around it."""
    repeated = [(f"another {i}", " query 0 ", f"other {i}") for i in range(1, 4)] + [("a", "b", "query 0")]
    probe = choose_probe(triplets_of(tmp_path, *different(2), *repeated), "f", 99, seed)
    texts = [text.text for text in probe.texts]
    # The second sample does not share query 0, of which one of the five others has it.
    assert len(texts) == len(set(texts)) == 6 and "query 0" in texts and 1 in {text.sample for text in probe.texts}


def test_a_file_without_two_different_samples_is_the_users_error(tmp_path):
    words = "data.val_files=few.parquet does not have them; turn them off with trainer.diag_freq=-1"
    for dataset in (
        texts_of(tmp_path, "same", " same", "same\n"), texts_of(tmp_path, "alone"),
        triplets_of(tmp_path, *[("p", f"q{i}", f"n{i}") for i in range(5)]),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            choose_probe(dataset, "data.val_files=few.parquet", 12, seed=0)


def planned(num_samples: int, num_anchors: int, **settings) -> tuple[RunConfig, BatchPlan]:
    """8 samples a step in groups of 5: with 2 anchors 56 rationales a step, with 1 48."""
    given = {
        "data.train_batch_size": 8, "actor_rollout_ref.actor.ppo_mini_batch_size": 8, "actor_rollout_ref.rollout.n": 5,
        **{f"trainer.{name}": value for name, value in settings.items()},
    }  # fmt: skip
    config = RunConfig.model_validate(nested(given))
    return config, BatchPlan.from_config(config, num_samples, num_anchors, world_size=1)


@pytest.mark.parametrize(
    ("steps", "frequency", "more", "diagnosed", "texts"),
    [
        # 3 % of 100 x 56 are 168 rationales; 3 diagnoses of 2 rationales a text: 28.
        (100, 50, {}, [0, 50, 100], 28),
        # The last step is diagnosed out of turn: 3 % of 110 x 56 = 184.8, over 4 x 2.
        (110, 50, {}, [0, 50, 100, 110], 23),
        # Every fourth step writes rationales: 25 of 100, so that 3 % are 42, over 3 x 2: 7, below 3 samples.
        (100, 50, {"contrastive_steps_between": 3}, [0, 50, 100], 9),
        # 100 of 400: 168 over 2 x 2.
        (400, 400, {"contrastive_steps_between": 3}, [0, 400], 42),
        # The first 200 write none, of the 200 after them 50 do: 84 over 2 x 2.
        (400, 400, {"contrastive_steps_between": 3, "contrastive_warmup_steps": 200}, [0, 400], 21),
        (4, 50, {}, [0, 4], 9),
        # 3 % of 560000 over 2 x 2 would be 4200.
        (10_000, 10_000, {}, [0, 10_000], 512),
        (100, 50, {"diag_texts": 4}, [0, 50, 100], 4),
    ],
)  # fmt: skip
def test_the_probe_writes_three_percent_of_the_runs_rationales(steps, frequency, more, diagnosed, texts):
    config, plan = planned(64, 2, total_training_steps=steps, diag_freq=frequency, **more)
    assert diagnosed_steps(config, plan) == diagnosed
    assert wanted_texts(config, plan, texts_per_sample=3) == texts


def test_plain_texts_need_a_third_of_them_at_least():
    config, plan = planned(64, 1, total_training_steps=4)
    assert wanted_texts(config, plan, texts_per_sample=1) == 3
    # 3 % of 100 x 48 = 144 over 3 x 2.
    config, plan = planned(64, 1, total_training_steps=100)
    assert wanted_texts(config, plan, texts_per_sample=1) == 24


def test_no_diagnoses_have_no_steps():
    for off in (-1, 0):
        assert diagnosed_steps(*planned(64, 2, total_training_steps=100, diag_freq=off)) == []


def test_a_probe_is_read_as_it_was_written(tmp_path):
    probe = choose_probe(texts_of(tmp_path, "ein Fluß", '橋 "quoted"', "line\nbreak"), "f", 3, seed=5)
    assert Probe.read(tmp_path / "none") is None
    probe.write(tmp_path / "diagnostics")
    assert Probe.read(tmp_path / "diagnostics") == probe


WHOLE = {"seed": 0, "source": "f", "texts": [{"id": 0, "sample": 0, "role": "positive", "text": "t"}]}


@pytest.mark.parametrize(
    "damaged",
    [
        b"", b'{"seed": 0, "sour', b"\xff\xfe", b"[]", b"null", json.dumps(WHOLE | {"texts": None}).encode(),
        json.dumps({"seed": 0, "source": "f"}).encode(), json.dumps(WHOLE | {"texts": [{"id": 0}]}).encode(),
    ],
)  # fmt: skip
def test_a_damaged_probe_names_its_file_and_the_way_out(damaged, tmp_path):
    folder = tmp_path / "diagnostics"
    folder.mkdir()
    (folder / "probe.json").write_bytes(damaged)
    with pytest.raises(UserError) as caught:
        Probe.read(folder)
    assert f"{folder}/probe.json is damaged" in str(caught.value)
    assert f"remove {folder}, and the run goes on with a new probe" in str(caught.value)

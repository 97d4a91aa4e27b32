"""The parts of bench/worth.py: the split, the metrics, the bootstrap, the vectors, and what is kept."""

import argparse
import json
import math
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise, permutations

import numpy as np
import pytest
import torch
from comparison import answers, baseline, rows, scoring
from comparison.data import Data, PartSize, Sizes, load
from comparison.kept import Kept
from comparison.measured import Measured, difference, interval
from comparison.plan import plan
from comparison.program import SHAPES, _shape, compare_recipes
from comparison.report import DECIDING, Found, choose, differences, points_as_json, table_rows
from comparison.split import same_text, split_by_text
from comparison.states import States, Variant, another_each, lookup, read_states, vectors_of
from comparison.study import BASE, CONTRASTIVE, Shape, Study
from comparison.tasks import Labels, Pairs, Retrieval, Triplets, ranking
from comparison.training import Run, _is_due
from scipy.stats import spearmanr
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from verl import GraceEncoder
from verl.embedding.centre import Centre
from verl.embedding.settings import EmbedderSettings, Mix
from verl.errors import UserError
from verl.trainer.compose import compose_config

TEXTS = ["a card", "the quick brown fox jumps over the lazy dog", "where is my parcel?", "naïve café"]
SMALL = Sizes(PartSize(5, 6, 4, 9, 2, 2, 2), PartSize(9, 12, 8, 12, 3, 3, 2), centre=7, answers=3)


def unit_rows(rng, *shape):
    vectors = rng.normal(size=shape)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# The split


def test_no_text_of_a_held_out_row_is_in_another_row():
    rng = random.Random(0)
    texts = [f"Text {rng.randrange(60)}" for _ in range(300)]
    rows_ = [tuple(texts[i : i + 3]) for i in range(0, 300, 3)]
    parts, train = split_by_text(rows_, (6, 4), seed=1, reserved=["TEXT  7"])
    assert [len(part) for part in parts] == [6, 4] and train
    held = [row for part in parts for row in part]
    for row in held:
        others = {same_text(text) for other in [*held, *train] if other != row for text in rows_[other]}
        assert not {same_text(text) for text in rows_[row]} & (others | {"text 7"})
    assert all(same_text(text) != "text 7" for row in train for text in rows_[row])
    assert split_by_text(rows_, (6, 4), seed=1, reserved=["TEXT  7"]) == (parts, train)
    assert split_by_text(rows_, (6, 4), seed=2)[0] != parts


def write(file, rows_):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows_))


@pytest.fixture
def data_folder(tmp_path):
    """Every file that is read; the first triplets share their sentences with STS17."""
    triplets = [{"query": f"q {i}", "positive": f"p {i % 40}", "negative": f"n {i}"} for i in range(80)]
    triplets[0]["query"] = "First  3"
    write(tmp_path / "nli_triplets.jsonl", triplets)
    pairs = [{"sentence1": f"first {i}", "sentence2": f"second {i}", "score": i % 6} for i in range(30)]
    write(tmp_path / "sts17_en_en_test.jsonl", pairs)
    write(tmp_path / "xquad_en_corpus.jsonl", [{"doc_id": f"d{i}", "text": f"passage {i}"} for i in range(20)])
    queries = [{"text": f"question {i}", "relevant_doc_id": f"d{i % 20}"} for i in range(40)]
    write(tmp_path / "xquad_en_queries.jsonl", queries)
    for part in ("train", "test"):
        texts = [{"text": f"{part} {i}", "label_text": f"label {i % 4}"} for i in range(48)]
        write(tmp_path / f"banking77_{part}.jsonl", texts)
    write(tmp_path / "gsm8k_test.jsonl", [{"question": f"how many {i}?", "answer": f"{i}"} for i in range(9)])
    return tmp_path


def test_the_parts_share_nothing_that_is_asked_and_training_shares_nothing_with_either(data_folder):
    data = load(data_folder, SMALL)
    names = ["triplets", "STS17", "XQuAD", "Banking77", "ExampleSTS", "ExampleRetrieval"]
    assert [task.name for task in data.parts["dev"]] == [task.name for task in data.parts["test"]] == names
    trained = {same_text(text) for row in data.train for text in row}
    assert not trained & {same_text(t) for tasks in data.parts.values() for task in tasks for t in task.texts}
    assert "first 3" not in trained and set(data.centre) <= {text for row in data.train for text in row}
    dev, test = ({task.name: task for task in data.parts[part]} for part in ("dev", "test"))
    assert len(dev["triplets"].rows) == 5 and len(test["triplets"].rows) == 9
    assert not {t for t in dev["triplets"].texts} & {t for t in test["triplets"].texts}
    assert not set(dev["STS17"].texts) & set(test["STS17"].texts)
    assert not {q for q, _ in dev["XQuAD"].queries} & {q for q, _ in test["XQuAD"].queries}
    asked = [{text for text, _ in part["Banking77"].asked} for part in (dev, test)]
    assert not asked[0] & asked[1] and not asked[0] & {text for text, _ in test["Banking77"].labelled}
    for query, relevant in test["XQuAD"].queries:
        number = int(query.split()[1]) % 20
        assert [test["XQuAD"].documents[i] for i in relevant] == [f"passage {number}"]
    assert len(data.answers) == 3 and load(data_folder, SMALL) == data


def test_the_examples_are_enough_and_an_empty_folder_is_an_error(repo, tmp_path):
    data = load(repo / "examples", SMALL)
    assert [task.name for task in data.parts["test"]] == ["triplets", "ExampleSTS", "ExampleRetrieval"]
    with pytest.raises(UserError, match="has neither nli_triplets.jsonl nor triplets.jsonl"):
        load(tmp_path, SMALL)


# Metrics


def test_ranking_is_that_of_plain_loops():
    rng = np.random.default_rng(0)
    similarity = np.round(rng.normal(size=(40, 25)), 1)
    similarity[0, 1] = similarity[0, 2] = similarity[0].max() + 1  # another document as similar as the relevant one
    relevant = [[1], *([int(i) for i in rng.choice(25, size=rng.integers(1, 4), replace=False)] for _ in range(39))]
    found = ranking(similarity, relevant)
    for query, own in enumerate(relevant):
        # The worst order of equal ones, in which the other documents come first.
        order = sorted(range(25), key=lambda d: (-similarity[query, d], d in own))
        ranks = [rank for rank, document in enumerate(order, 1) if document in own]
        ideal = sum(1 / math.log2(k + 2) for k in range(len(own)))
        assert found["R@1"].values[query] == (ranks[0] == 1)
        assert found["MRR"].values[query] == pytest.approx(1 / ranks[0])
        gain = sum(1 / math.log2(rank + 1) for rank in ranks if rank <= 10)
        assert found["nDCG@10"].values[query] == pytest.approx(gain / ideal)
    assert found["R@1"].values[0] == 0


def test_tasks_score_their_items():
    rng = np.random.default_rng(1)
    texts = [f"t{i}" for i in range(30)]
    vectors = unit_rows(rng, 30, 4)
    vector = dict(zip(texts, vectors, strict=True))
    find = lookup(texts, vectors)
    triplets = Triplets("", [tuple(texts[i : i + 3]) for i in range(0, 30, 3)])
    nearer = [vector[q] @ vector[p] > vector[q] @ vector[n] for q, p, n in triplets.rows]
    assert triplets.measure(find)["accuracy"].values.tolist() == nearer
    best = [max(triplets.rows, key=lambda row: vector[q] @ vector[row[1]])[1] == p for q, p, _ in triplets.rows]
    assert triplets.measure(find)["R@1"].values.tolist() == best
    pairs = Pairs("", [(texts[i], texts[i + 1], i % 5) for i in range(0, 30, 2)])
    cosines = [vector[a] @ vector[b] for a, b, _ in pairs.rows]
    assert pairs.measure(find)["Spearman"].figure == pytest.approx(spearmanr(cosines, [r[2] for r in pairs.rows])[0])
    searched = Retrieval("", [("t0", [1]), ("t1", [0, 2])], texts[10:20])
    assert searched.measure(find)["MRR"].values.shape == (2,)


def test_labels_are_those_that_the_nearest_vote_for():
    rng = np.random.default_rng(2)
    texts = [f"t{i}" for i in range(60)]
    vectors = unit_rows(rng, 60, 3)
    task = Labels(
        "", [(t, "abc"[i % 3]) for i, t in enumerate(texts[:30])], [(t, "abc"[i % 3]) for i, t in enumerate(texts[30:])]
    )
    found = task.measure(lookup(texts, vectors))["accuracy"].values
    for i, (_, label) in enumerate(task.asked):
        near = sorted(range(30), key=lambda j: -float(vectors[30 + i] @ vectors[j]))[:5]
        votes = {name: sum(float(vectors[30 + i] @ vectors[j]) for j in near if "abc"[j % 3] == name) for name in "abc"}
        assert found[i] == (max(votes, key=votes.get) == label)
    assert 0 < found.mean() < 1


# The bootstrap


def test_an_interval_is_that_of_a_double_loop():
    rng = np.random.default_rng(3)
    gold = rng.normal(size=20)
    for first, second in (
        ([Measured(rng.normal(size=20)) for _ in range(3)], [Measured(rng.normal(size=20)) for _ in range(3)]),
        ([Measured(gold + rng.normal(size=20), gold)], [Measured(gold + 2 * rng.normal(size=20), gold)] * 2),
    ):
        found = difference(first, second, draws=200, seed=7)
        # The same draws in the same order, one by one.
        same = np.random.default_rng(7)
        items = same.integers(20, size=(200, 20))
        chosen = same.integers(len(second), size=(len(second), 200))
        drawn = np.zeros(200)
        for sign, runs in ((1, first), (-1, second)):
            for draw in range(200):
                for number in chosen[:, draw] if len(runs) > 1 else (0,):
                    run, own = runs[number], items[draw]
                    if run.gold is None:
                        figure = sum(run.values[own]) / 20
                    else:
                        figure = spearmanr(run.values[own], run.gold[own]).statistic
                    drawn[draw] += sign * figure / len(runs)
        low, high = np.percentile(drawn, [2.5, 97.5])
        assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
        mean = [sum(run.figure for run in runs) / len(runs) for runs in (first, second)]
        assert found.value == pytest.approx(mean[0] - mean[1])


def test_pairs_make_an_interval_narrow_and_seeds_make_it_wide():
    rng = np.random.default_rng(4)
    hard = rng.normal(size=300)
    one, other = Measured(hard + 0.1), Measured(hard)
    assert difference([one], [other]).verdict == "above" and difference([other], [one]).verdict == "below"
    assert difference([one], [one]).verdict == "level"
    assert difference([one], [Measured(rng.permutation(hard))]).verdict == "level"
    apart = [Measured(hard - 1), Measured(hard), Measured(hard + 1)]
    assert interval(apart).high - interval(apart).low > 2 * (interval([other]).high - interval([other]).low)
    # What a seed does to both sides is no difference between them.
    better = [Measured(run.values + 0.1) for run in apart]
    assert difference(better, apart) == pytest.approx((0.1, 0.1, 0.1))
    assert difference(better, apart[::-1]).verdict == "level"
    with pytest.raises(ValueError, match="runs of .299, 300. items cannot be paired"):
        difference([one], [Measured(hard[:-1])])
    with pytest.raises(ValueError, match="sides of .2, 3. seeds cannot be paired"):
        difference(apart, apart[:2])


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(5)
    covered = [
        (found := interval([Measured(rng.normal(size=60))], draws=400)).low <= 0 <= found.high for _ in range(300)
    ]
    assert 0.9 <= sum(covered) / 300 <= 0.98


# Vectors


@pytest.fixture(scope="module")
def model(tiny_folder, tmp_path_factory):
    """The tiny model with settings of its own: short rationales that end by themselves at times."""
    folder = tmp_path_factory.mktemp("worth") / "model"
    shutil.copytree(tiny_folder, folder)
    EmbedderSettings(max_new_tokens=12).write(folder)
    return folder


@pytest.fixture(scope="module")
def states(model):
    with GraceEncoder(model, device="cpu") as encoder:
        # Beside another group, whose rationales it may not get.
        return read_states(encoder, [["x", "y"], TEXTS], ("rationale", "shuffled", "echo"))[1]


@pytest.mark.parametrize("mix", [Mix(), Mix(0.0), Mix(0.3), Mix(1.0), Mix(None, 0.4), Mix(0.7, 0.5)])
def test_vectors_are_those_of_the_encoder_with_the_same_settings(model, states, mix):
    with GraceEncoder(
        model, device="cpu", text_share=mix.text_share, no_rationale_weight=mix.no_rationale_weight
    ) as encoder:
        expected = encoder.encode(TEXTS)
    np.testing.assert_allclose(vectors_of(states, Variant("rationale", mix)).numpy(), expected, atol=2e-6)


def test_vectors_without_a_rationale_and_centred_ones_are_the_encoders(model, states, tmp_path):
    with GraceEncoder(model, device="cpu") as encoder:
        np.testing.assert_allclose(vectors_of(states, Variant()).numpy(), encoder.encode(TEXTS, think=False), atol=2e-6)
        others = ["another text", "and one more", "a third"]
        (middle,) = read_states(encoder, [others], ("rationale",))
        centre = Centre(encoder.encode(others).mean(0), encoder.encode(others, think=False).mean(0))
        settings = encoder.settings
    folder = tmp_path / "centred"
    shutil.copytree(model, folder)
    centre.write(folder, settings)
    with GraceEncoder(folder, device="cpu", centre=True) as encoder:
        for variant, think in ((Variant(centre=True), False), (Variant("rationale", centre=True), True)):
            expected = encoder.encode(TEXTS, think=think)
            np.testing.assert_allclose(vectors_of(states, variant, middle).numpy(), expected, atol=2e-6)


def test_what_stands_in_place_of_a_rationale_is_embedded_as_transformers_does(model, states):
    plain = AutoModelForCausalLM.from_pretrained(model)
    with GraceEncoder(model, device="cpu") as encoder:
        _, written = encoder.encode(TEXTS, return_rationales=True)
        chats = [
            [{"role": "system", "content": encoder.settings.system_prompt}, {"role": "user", "content": t}]
            for t in TEXTS
        ]
        prompts = encoder.renderer.render(chats)
        for row, (text, prompt) in enumerate(zip(TEXTS, prompts, strict=True)):
            ids = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
            hidden = plain(torch.tensor([prompt.ids + ids]), output_hidden_states=True).hidden_states[-1][0]
            mean = hidden[prompt.text_start :].mean(0).detach()
            np.testing.assert_allclose(vectors_of(states, Variant("echo"))[row], mean / mean.norm(), atol=1e-5)
    assert len(set(written)) == len(TEXTS)


def test_a_shuffled_rationale_is_never_the_texts_own():
    for count in range(2, 9):
        for seed in range(50):
            other = another_each(count, seed)
            assert sorted(other) == list(range(count)) and all(a != b for a, b in enumerate(other))
    with pytest.raises(ValueError, match="1 rationales cannot be shuffled"):
        another_each(1, 0)


def test_shuffled_vectors_have_the_rationale_of_another_text(model, states):
    lengths = states.answers["rationale"].tokens.tolist()
    assert states.answers["shuffled"].tokens.tolist() == [lengths[other] for other in another_each(len(TEXTS), 0)]
    own, others = (vectors_of(states, Variant(name)) for name in ("rationale", "shuffled"))
    assert ((own - others).norm(dim=1) > 1e-3).all()


def test_scores_are_those_of_the_encoders_vectors(model):
    tasks = [
        Triplets("triplets", [tuple(TEXTS[:3])] * 2),
        Pairs("STS", [(a, b, i) for i, (a, b) in enumerate(pairwise(TEXTS))]),
    ]
    made = json.loads(json.dumps(scoring.score_encoder(model, tasks, ["another text", "and one more"], 5, echo=True)))
    found = scoring.from_json(made["scores"])
    with GraceEncoder(model, device="cpu", max_new_tokens=5, text_share=0.3) as encoder:
        vectors = encoder.encode(TEXTS)
    expected = (vectors[:-1] * vectors[1:]).sum(1)
    name = Variant("rationale", Mix(0.3)).name
    np.testing.assert_allclose(found[name]["STS"]["Spearman"].values, expected, atol=3e-6)
    wanted = {name for pair in scoring.choices().items() for name in pair}
    wanted |= {name for row in table_rows() for name in row.candidates}
    assert wanted <= found.keys()


def test_a_likelihood_is_that_of_transformers(tiny_folder):
    pairs = [("how many?", "it is 12"), ("why?", "because of it")]
    tokenizer, plain = AutoTokenizer.from_pretrained(tiny_folder), AutoModelForCausalLM.from_pretrained(tiny_folder)
    found = answers.likelihood(tiny_folder, pairs).values
    for value, (question, answer) in zip(found, pairs, strict=True):
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        ids = tokenizer(answer)["input_ids"]
        log_probs = plain(torch.tensor([prompt + ids])).logits[0].log_softmax(-1).detach()
        own = [float(log_probs[len(prompt) - 1 + i, token]) for i, token in enumerate(ids)]
        assert value == pytest.approx(sum(own) / len(own), abs=1e-4)


# What is kept


def test_a_part_is_made_once_for_its_settings_and_again_for_others(tmp_path):
    made = []

    def make(folder):
        made.append(folder)
        return {"number": len(made)}

    kept = Kept(tmp_path)
    settings = {"lr": 1e-5, "seed": 0}
    assert kept.get("row", settings, make) == {"number": 1}
    assert Kept(tmp_path).get("row", {"seed": 0, "lr": 1e-5}, make) == {"number": 1}
    assert kept.get("row", {**settings, "seed": 1}, make) == {"number": 2}
    assert kept.get("other", settings, make) == {"number": 3}
    assert kept.find("row", {**settings, "lr": 2e-5}) is None and len(set(made)) == 3

    def fail(folder):
        (folder / "half").write_text("done")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept.get("row", {"seed": 2}, fail)
    assert kept.get("row", {"seed": 2}, lambda folder: {"found": (folder / "half").read_text()}) == {"found": "done"}


def test_training_stops_at_the_step_that_is_nearest_to_the_budget():
    steps = [{"step": number, "time/step_s": 10.0} for number in range(1, 6)]
    due = [seconds for seconds in range(0, 70, 3) if _is_due(steps, resumed_from=3, seconds=seconds)]
    assert due == list(range(0, 56, 3))
    # Right after a resume no step of this process has ended, and it may not listen to signals yet.
    assert not _is_due(steps, resumed_from=5, seconds=1)


@pytest.mark.parametrize("trained", [*rows.ROWS.values(), *rows.RECIPES.values()])
def test_the_overrides_of_every_row_are_valid(trained, tmp_path):
    (tmp_path / "train.parquet").touch()
    given = ["actor_rollout_ref.model.path=model", f"data.train_files={tmp_path}/train.parquet"]
    config = compose_config([*given, f"+data.train_mode={trained.mode}", *trained.overrides])
    assert config.train_mode == trained.mode


def test_a_row_is_trained_for_its_seconds_and_goes_on_from_there(tmp_path, tiny_folder, repo):
    write(
        tmp_path / "texts.jsonl", [{"query": f"q {i}", "positive": f"p {i}", "negative": f"n {i}"} for i in range(24)]
    )
    command = [sys.executable, "process_data.py", "--mode", "supervised", "--test_ratio", "0"]
    subprocess.run(
        [*command, "--input_file", str(tmp_path / "texts.jsonl"), "--local_dir", str(tmp_path)], check=True, cwd=repo
    )
    overrides = [*rows.ROWS["joint"].overrides, "data.max_response_length=4", "data.max_prompt_length=220"]
    run = Run(tmp_path / "run", str(tiny_folder), tmp_path / "train.parquet", "supervised", overrides)
    first = run.train_until(0.5)
    assert first.steps > 0 and first.samples == 12 * first.steps and first.tokens > 0
    assert run.train_until(0.1) == first
    second = run.train_until(first.seconds + 0.5)
    assert second.steps > first.steps and second.seconds > first.seconds
    run.finish()
    with GraceEncoder(run.trained_model, device="cpu") as encoder:
        assert encoder.settings.max_new_tokens == 4
    assert not list(run.folder.glob("global_step_*"))


@pytest.fixture
def recipes(monkeypatch):
    """Two small ones, `none` and `some`."""
    for name, share in (("none", 1), ("some", 0.5)):
        overrides = rows._joint(rows._shape(2, 2, 4), share=share, between=0)
        monkeypatch.setitem(rows.RECIPES, name, rows.Trained(name, (*overrides, "data.max_prompt_length=220")))


@pytest.fixture
def data():
    train = [(f"query {i}", f"positive {i}", f"negative {i}") for i in range(24)]
    tasks = [Triplets("triplets", [tuple(TEXTS[:3]), tuple(TEXTS[1:4])])]
    tested = [Triplets("triplets", list(permutations(TEXTS, 3)))]
    asked = [("how many?", "it is 12"), ("why?", "because of it")]
    return Data(train, 0, {"dev": tasks, "test": tested}, ["a text", "and another"], asked)


def test_a_recipe_that_is_a_row_too_leaves_the_rows_model(tmp_path, tiny_folder, data, recipes, monkeypatch):
    monkeypatch.setitem(rows.ROWS, "some", rows.RECIPES["some"])
    study = Study(tiny_folder, data, Shape(0.1, (1.0,), seeds=1, grid=(), tokens=4), tmp_path, lambda _: None)
    (point,) = study.row("some", 0)
    assert [other.cost for other in study.recipe("some", 0)] == [point.cost]
    assert study.test_row("some", 0).keys() == point.scores.keys()
    # The other way round too.
    (point,) = study.recipe("some", 1)
    assert [other.cost for other in study.row("some", 1)] == [point.cost]
    assert study.test_row("some", 1).keys() == point.scores.keys()


def test_recipes_are_compared_after_the_same_number_of_steps(tmp_path, tiny_folder, data, recipes, capsys):
    tested, asked = data.parts["test"], data.answers
    shape = Shape(1e6, (1.0,), seeds=1, grid=(), tokens=4, recipe_steps=(3,))
    study = Study(tiny_folder, data, shape, tmp_path, lambda _: None)
    compare_recipes(study, ["none", "some"])
    shown = capsys.readouterr().out
    ends = {name: point for name in ("none", "some") for point in study.recipe(name, 0)}
    assert [(end.cost.steps, end.cost.samples) for end in ends.values()] == [(3, 6), (3, 6)]
    assert "| none | " in shown and "| some - none |" in shown
    kept = {name: next(tmp_path.glob(f"runs/{name}-*/model")) for name in ends}
    assert not list(tmp_path.glob("runs/*/global_step_*"))
    scores = {}
    for name, model in kept.items():
        found = scoring.from_json(scoring.score_encoder(model, tested, data.centre, None)["scores"])
        scores[name] = {variant: [by["triplets"]["nDCG@10"]] for variant, by in found.items()}
    best = {name: chosen_on_dev([end.scores]) for name, end in ends.items()}
    expected = {
        ("some", "none", "with rationales"): difference(scores["some"]["with"], scores["none"]["with"]),
        ("some", "none", f"best: {best['some']} - {best['none']}"): difference(
            scores["some"][best["some"]], scores["none"][best["none"]]
        ),
    }
    for name, own in scores.items():
        expected[name, name, "rationales - none"] = difference(own["with"], own["without"])
        expected[name, name, "rationales - each other's"] = difference(own["with"], own["shuffled"])
    written = json.loads((tmp_path / "recipes.json").read_text())
    lines = {(x["first"], x["second"], x["decides"]): x for x in written["differences"] if x["metric"] == "nDCG@10"}
    assert lines.keys() == expected.keys()
    for key, by in expected.items():
        assert (lines[key]["difference"], lines[key]["low"], lines[key]["high"]) == (by.value, by.low, by.high), key
        assert f"{100 * by.value:+.1f} [{100 * by.low:+.1f}, {100 * by.high:+.1f}] {by.verdict}" in shown
    untrained = answers.likelihood(tiny_folder, asked)
    for line, (name, model) in zip(written["generation"], kept.items(), strict=True):
        by_hand = answers.likelihood(model, asked).figure - untrained.figure
        # Kept figures are rounded to six digits.
        assert line["model"] == name and abs(by_hand) > 1e-4
        assert line["difference"] == pytest.approx(by_hand, abs=2e-6)

    # Scored along its training, a recipe ends as it does without.
    along = Study(tiny_folder, data, replace(shape, recipe_steps=(1, 3)), tmp_path, lambda _: None)
    first, last = along.recipe("some", 0)
    assert (first.cost.steps, last.cost.steps) == (1, 3)
    assert scoring.mean_of_main([last.scores], "with") == scoring.mean_of_main([ends["some"].scores], "with")
    once = Study(tiny_folder, data, replace(shape, recipe_steps=(1,)), tmp_path, lambda _: None)
    alone = once.recipe("some", 0)
    written = points_as_json({"some": [[first, last]]})["some"]
    for name in ("with", "shuffled", "without", "best"):
        variant = best["some"] if name == "best" else name
        assert [point["dev"][name] for point in written["seeds"][0]] == [
            scoring.mean_of_main([point.scores], variant) for point in (*alone, ends["some"])
        ]
    assert written["best"] == best["some"]


def chosen_on_dev(runs):
    means = {name: scoring.mean_of_main(runs, name) for name in scoring.choices()}
    return max(means, key=means.get)


def test_the_plan_says_what_recipes_are_scored_on_and_counts_it():
    def triplets(count):
        return [Triplets("triplets", [(f"q {i}", f"p {i}", f"n {i}") for i in range(count)])]

    def planned(test, **shape):
        data = Data([], 0, {"dev": triplets(10), "test": triplets(test)}, [], [])
        return plan(data, Shape(60, (1.0,), seeds=2, grid=(), **shape), ["joint"])

    by_seconds = planned(20)
    assert "of 60 s, scored on dev:" in by_seconds[1].what and planned(200) == by_seconds
    few, many = (planned(test, recipe_steps=(7,)) for test in (20, 200))
    assert "of 7 steps, which are not in the minutes, scored on dev and test:" in few[1].what
    assert planned(20, recipe_steps=(3, 7))[1].seconds > few[1].seconds
    # The untrained model is scored on dev alone.
    assert few[0] == many[0] and few[1].seconds < many[1].seconds


def test_steps_are_of_recipes_alone():
    args = argparse.Namespace(seconds=None, seeds=None, steps=[5], recipes=None, rows=None)
    with pytest.raises(UserError, match="--steps=5 is of --recipes"):
        _shape(args, SHAPES["short"])
    args.recipes = ["joint"]
    shape = _shape(args, SHAPES["full"])
    assert (shape.recipe_steps, shape.seeds) == ((5,), 1)
    args.steps = [5, 9, 9]
    with pytest.raises(UserError, match="--steps: 9 stands after a number that is not smaller"):
        _shape(args, SHAPES["full"])


def test_rows_may_be_chosen_by_name():
    args = argparse.Namespace(seconds=None, seeds=None, steps=None, recipes=None, rows=["joint", "grace"])
    assert list(_shape(args, SHAPES["full"]).rows) == ["grace", "joint"]
    args.rows = ["joint", "best"]
    with pytest.raises(UserError, match="--rows: there is no 'best'; there are 'plain', "):
        _shape(args, SHAPES["full"])
    args.recipes = []
    with pytest.raises(UserError, match="--rows=joint has no effect with --recipes"):
        _shape(args, SHAPES["full"])


def test_differences_are_of_the_rows_that_were_trained():
    def scores(value):
        names = {name for row in table_rows() for name in row.candidates}
        return [{name: {"triplets": {"accuracy": Measured(np.full(3, value))}} for name in names}]

    made = {BASE: scores(0.2), CONTRASTIVE: scores(0.3), "grace": scores(0.5)}
    shown = choose(Found({}, made, made, {}))
    assert {key[0] for key in shown} == set("ACDEG")
    found = {(line["first"], line["second"]): line["difference"] for line in differences(shown)}
    assert found.keys() == {pair[:2] for pair in DECIDING if {key[0] for key in pair[:2]} <= set("ACDEG")}
    assert found["G", "A"] == pytest.approx(0.3)


def test_the_deciding_differences_are_between_rows_of_the_table():
    keys = {row.key for row in table_rows()}
    assert {key for first, second, _ in DECIDING for key in (first, second)} <= keys


def test_the_baselines_vectors_are_means_over_bare_texts(tiny_folder):
    found = baseline.read_states(baseline.load(tiny_folder, 64), TEXTS)
    assert isinstance(found, States)
    tokenizer, plain = AutoTokenizer.from_pretrained(tiny_folder), AutoModel.from_pretrained(tiny_folder)
    for row, text in enumerate(TEXTS):
        mean = plain(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(found.means[row].numpy(), mean.detach().numpy(), atol=1e-5)

"""eval_mteb.py as its users run it, on local tasks of every type with the tiny model."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest
from eval_files import write_beir, write_jsonl, write_tasks
from tiny import TEMPLATE, save_tiny, tiny_tokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))

import eval_mteb
from verl.checkpoint.model_card import write_card
from verl.embedding.settings import EmbedderSettings
from verl.encoder.backend import Backend
from verl.evaluation import evaluate
from verl.evaluation.local_tasks import find_local_tasks
from verl.evaluation.suites import QUICK, select_tasks
from verl.workers.rollout.base import RolloutError

NAMES = ["Classes", "Clusters", "Pairs", "Ranks", "Search", "Sts", "Summaries", "Triples"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def arguments(model: Path, tasks: Path, out: Path, *more: str) -> list[str]:
    return [
        "--model_path", str(model), "--task_dir", str(tasks), "--output_dir", str(out), "--thinking_max_length", "6",
        "--input_max_length", "400", "--device", "cpu", *more,
    ]  # fmt: skip


def summary(out: Path, name: str) -> dict:
    return json.loads((out / name / "summary.json").read_text())


def results(out: Path) -> dict[Path, float]:
    """The main scores in mteb's own result files."""
    found = {}
    for file in (out / "results").rglob("*.json"):
        if file.stem in NAMES:
            found[file] = json.loads(file.read_text())["scores"]["test"][0]["main_score"]
    return found


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, tiny_folder, tasks):
    out = tmp_path_factory.mktemp("out")
    log = out / "timing.txt"
    assert eval_mteb.main(arguments(tiny_folder, tasks, out, "--timing_log", str(log))) == 0
    return out


def test_the_summary_holds_every_task_type_and_mean(whole_run, tasks):
    record = summary(whole_run, "tiny")
    scores = {task["name"]: task["score"] for task in record["tasks"]}
    assert list(scores) == NAMES
    own = {file.stem: 100 * score for file, score in results(whole_run).items()}
    assert scores == pytest.approx(own, abs=1e-3)
    assert record["means"]["Mean(Task)"] == pytest.approx(mean(own.values()), abs=1e-3)
    types = {task["name"]: task["type"] for task in record["tasks"]}
    by_type = [mean(s for n, s in own.items() if types[n] == kind) for kind in set(types.values())]
    assert len(by_type) == 7
    assert record["means"]["Mean(TaskType)"] == pytest.approx(mean(by_type), abs=1e-3)
    assert record["settings"]["max_new_tokens"] == 6 and record["settings"]["engine"] == "hf"
    assert len(record["model"]["revision"]) == 64 and record["versions"]["mteb"]
    spent = [record["sample_usage"], *(task["usage"] for task in record["tasks"])]
    texts = {text for task in find_local_tasks(tasks) for text in task.texts}
    # Each text once, and two for the warm-up.
    assert sum(usage["rationales_made"] for usage in spent) == len(texts) + 2
    assert sum(usage["generated_tokens"] for usage in spent) > 5 * len(texts)
    assert all(task["seconds"] > 0 for task in record["tasks"])
    markdown = (whole_run / "tiny" / "summary.md").read_text()
    assert all(f"| {name} |" in markdown for name in [*NAMES, "Mean(Task)", "Retrieval"])
    timing = (whole_run / "timing.txt").read_text().splitlines()
    assert sorted(line.split()[0] for line in timing) == NAMES


def test_a_second_run_repeats_nothing_and_reports_the_same(whole_run, tiny_folder, tasks, monkeypatch):
    before = summary(whole_run, "tiny")
    monkeypatch.setattr(Backend, "generate", lambda *_: pytest.fail("generated again"))
    monkeypatch.setattr(Backend, "embed", lambda *_: pytest.fail("embedded again"))
    assert eval_mteb.main(arguments(tiny_folder, tasks, whole_run)) == 0
    again = summary(whole_run, "tiny")
    assert again["tasks"] == before["tasks"] and again["means"] == before["means"]


def test_the_rate_of_other_settings_is_not_that_of_a_plan(tiny_folder, tasks, tmp_path, capsys):
    """In the third run all texts are stored, so that nothing is measured; the rate is that of the first run."""
    plans = []
    for tokens in ("20", "2", "20", "2"):
        options = ["--tasks", "Sts", "--thinking_max_length", tokens, "--overwrite"]
        assert eval_mteb.main([*arguments(tiny_folder, tasks, tmp_path), *options]) == 0
        plans.append(capsys.readouterr().out)
    said = [re.search(r"([\d.]+) rationale tokens a text", plan) for plan in plans]
    assert [found and float(found[1]) <= 2 for found in said[:2]] == [False, True]
    assert said[2] is None and "no plan: the sample was in the store already" in plans[2]
    assert said[3] is not None and said[3][0] == said[1][0]


def test_scores_in_the_card_say_by_which_other_settings_they_are(tmp_path, tasks):
    model = save_tiny(tmp_path / "model")
    write_card(model, "model", EmbedderSettings(), {}, "a command", {})
    for more in ([], ["--pooling_method", "last"], ["--no_thinking"]):
        command = ["--model_path", str(model), "--output_dir", str(tmp_path / "out"), "--task_dir", str(tasks)]
        assert eval_mteb.main([*command, "--tasks", "Sts", "--input_max_length", "1024", *more]) == 0
    titles = [line for line in (model / "README.md").read_text().splitlines() if line.startswith("### ")]
    assert len(titles) == 3 and ";" not in titles[0]
    assert titles[1] == f"{titles[0]}; scores with pooling='last', and the model's is 'mean'"
    assert titles[2] == f"{titles[0]}; scores with think=False, and the model's is True"


def test_what_stands_in_for_settings_that_cannot_be_read_is_enough_to_the_end(tmp_path, tasks):
    model = save_tiny(tmp_path / "model")
    write_card(model, "model", EmbedderSettings(), {}, "a command", {})
    EmbedderSettings(centre=True).write(model)  # which is missing
    command = arguments(model, tasks, tmp_path / "out", "--tasks", "Sts", "--no_thinking", "--no_centre")
    assert eval_mteb.main(command) == 0
    assert "; its own settings cannot be read (centre=True, and " in (model / "README.md").read_text()


def test_other_settings_do_not_share_results(whole_run, tiny_folder, tasks):
    before = set(results(whole_run))
    for change in (["--seed", "1"], ["--pooling_method", "eos"], ["--no_thinking"]):
        assert eval_mteb.main(arguments(tiny_folder, tasks, whole_run, "--tasks", "Sts", *change)) == 0
    new = set(results(whole_run)) - before
    assert len(new) == 3 and {file.stem for file in new} == {"Sts"}
    assert summary(whole_run, "tiny_no_thinking")["tasks"][0]["usage"]["generated_tokens"] == 0


def test_settings_of_a_role_belong_to_a_result_and_are_shown(tmp_path, tasks):
    model = save_tiny(tmp_path / "model")
    found = []
    for template in ("Query: {text}", "Ask: {text}", "Query: {text}"):
        (model / "embedder_config.json").write_text(json.dumps({"query": {"template": template}}))
        assert eval_mteb.main(arguments(model, tasks, tmp_path / "out", "--no_thinking", "--tasks", "Search")) == 0
        found.append(summary(tmp_path / "out", "model_no_thinking"))
    first, second, third = found
    assert first["settings"] == third["settings"] != second["settings"]
    # The third is what mteb keeps of the first, and not the report of the second.
    assert second["tasks"][0]["usage"]["texts"] > 0 and third["tasks"][0]["usage"] is None
    assert third["tasks"][0]["score"] == pytest.approx(first["tasks"][0]["score"], abs=1e-3)
    lines = (tmp_path / "out" / "model_no_thinking" / "summary.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("| query")] == ["| query.template | Query: {text} |"]


def test_new_weights_under_the_same_name_get_fresh_scores(tmp_path, tasks):
    scores = []
    for seed in (0, 1):
        model = save_tiny(tmp_path / "model", seed=seed)
        assert eval_mteb.main(arguments(model, tasks, tmp_path / "out", "--tasks", "Sts", "Search")) == 0
        record = summary(tmp_path / "out", "model")
        scores.append([task["score"] for task in record["tasks"]])
        assert all(task["usage"]["rationales_made"] for task in record["tasks"])
    assert scores[0] != scores[1]


def test_other_data_under_the_same_name_is_scored_again(tmp_path, tiny_folder):
    rows = [{"sentence1": f"text {i}", "sentence2": f"word {i * i}", "score": i} for i in range(6)]
    scores = []
    for grades in (rows, [{**row, "score": -row["score"]} for row in rows]):
        write_jsonl(tmp_path / "tasks" / "Sts.sts.jsonl", grades)
        assert eval_mteb.main(arguments(tiny_folder, tmp_path / "tasks", tmp_path / "out")) == 0
        scores.append(summary(tmp_path / "out", "tiny")["tasks"][0]["score"])
    assert scores[0] == pytest.approx(-scores[1]) and scores[0] != 0


def test_a_failing_task_is_reported_and_does_not_stop_the_others(tmp_path, tiny_folder, tasks, monkeypatch, capsys):
    generate = Backend.generate

    def fail_on_today(self, prompts, *rest):
        if any("today" in decode(ids) for ids in prompts):
            raise RolloutError("the engine lost its worker")
        return generate(self, prompts, *rest)

    decode = tiny_tokenizer().decode
    monkeypatch.setattr(Backend, "generate", fail_on_today)
    monkeypatch.setattr(evaluate, "sample_texts", lambda *_: ["a sample", "of texts"])
    code = eval_mteb.main(arguments(tiny_folder, tasks, tmp_path, "--tasks", "Classes", "Sts", "BIOSSES"))
    assert code == 1
    record = summary(tmp_path, "tiny")
    classes, sts, biosses = record["tasks"]
    assert classes["score"] is None and classes["error"] == "the engine lost its worker"
    assert sts["score"] is not None and sts["error"] is None
    assert biosses["score"] is None and biosses["error"]
    assert record["means"] == {} and record["missing"] == ["Classes", "BIOSSES"]
    # Sts is finished, but another task of its type is not.
    assert record["type_means"] == {}
    printed = capsys.readouterr().out
    assert "No mean: 1 of 3 tasks are finished (missing: Classes, BIOSSES)." in printed
    assert "Classes failed: the engine lost its worker" in printed


def test_a_score_that_is_no_number_is_a_failure_and_in_no_mean(tmp_path, tiny_folder, capsys):
    rows = [{"sentence1": "one text", "sentence2": "another", "score": score} for score in (1, 2, 3)]
    write_jsonl(tmp_path / "tasks" / "Same.sts.jsonl", rows)
    for _ in range(2):
        assert eval_mteb.main(arguments(tiny_folder, tmp_path / "tasks", tmp_path / "out")) == 1
        assert "Same failed: cosine_spearman is nan: are all similarities equal?" in capsys.readouterr().out
    assert summary(tmp_path / "out", "tiny")["means"] == {}


def test_the_length_of_vectors_is_a_setting_and_what_is_left_out_is_said(tmp_path, tiny_folder, tasks, capsys):
    beir = write_beir(tmp_path / "beir" / "Small", test="q1\td1\t1\n")
    assert eval_mteb.main(arguments(tiny_folder, beir, tmp_path, "--no_thinking")) == 0
    assert "Small: 2 of 3 queries have no judgement, and are left out" in capsys.readouterr().out
    for more in ([], ["--normalize_embeddings"]):
        assert eval_mteb.main(arguments(tiny_folder, tasks, tmp_path, "--no_thinking", "--tasks", "Sts", *more)) == 0
        record = summary(tmp_path, "tiny_no_thinking")
        assert record["settings"]["normalize_embeddings"] == bool(more)
    scores = {file: score for file, score in results(tmp_path).items() if file.stem == "Sts"}
    # A task of cosines: two results, one score.
    first, second = scores.values()
    assert first == pytest.approx(second, abs=1e-6)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--temperature", "nan"], "temperature=nan: Input should be a finite number"),
        (["--batch_size", "0"], "batch_size=0 must be 1 or more"),
        (["--thinking_max_length", "-1"], "max_new_tokens=-1: Input should be greater than or equal to 1"),
    ],
)
def test_a_number_out_of_its_range_is_an_error_before_a_model_is_loaded(
    tmp_path, tiny_folder, tasks, capsys, monkeypatch, more, message
):
    monkeypatch.setattr(Backend, "__init__", lambda *_: pytest.fail("loaded a model"))
    assert eval_mteb.main(arguments(tiny_folder, tasks, tmp_path, *more)) == 2
    assert message in capsys.readouterr().err


def test_an_aggregated_task_whose_parts_failed_is_tried_again(tmp_path, tiny_folder, capsys):
    options = ["--model_path", str(tiny_folder), "--output_dir", str(tmp_path), "--thinking_max_length", "4", "--yes"]
    for _ in range(2):
        assert eval_mteb.main([*options, "--tasks", "CQADupstackRetrieval"]) == 1
        assert "CQADupstackRetrieval failed: Couldn't reach" in capsys.readouterr().out


def test_a_base_model_is_scored_with_the_same_settings_and_compared(tmp_path, tasks):
    trained, base = save_tiny(tmp_path / "trained", seed=1), save_tiny(tmp_path / "base", seed=0)
    (trained / "embedder_config.json").write_text(json.dumps({"system_prompt": "Other words."}))
    options = arguments(trained, tasks, tmp_path / "out", "--tasks", "Sts", "Ranks", "--base_model", str(base),
                        "--temperature", "0")  # fmt: skip
    command = [sys.executable, str(Path(eval_mteb.__file__)), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    own, other = summary(tmp_path / "out", "trained"), summary(tmp_path / "out", "base")
    assert own["settings"]["temperature"] == 0.0
    assert own["settings"] == other["settings"] and own["settings"]["system_prompt"] == "Other words."
    assert own["base"]["scores"] == {task["name"]: task["score"] for task in other["tasks"]}
    markdown = (tmp_path / "out" / "trained" / "summary.md").read_text()
    for task, base_task in zip(own["tasks"], other["tasks"], strict=True):
        assert f"| {base_task['score']:.2f} | {task['score'] - base_task['score']:+.2f} |" in markdown


def test_a_base_model_without_the_centre_that_the_settings_want_is_refused_before_anything_loads(
    tmp_path, tasks, capsys
):
    trained, base = save_tiny(tmp_path / "trained", seed=1), save_tiny(tmp_path / "base", seed=0)
    (trained / "embedder_config.json").write_text(json.dumps({"centre": True}))
    (base / "model.safetensors").write_bytes(b"not read")
    options = arguments(trained, tasks, tmp_path / "out", "--base_model", str(base))
    capsys.readouterr()  # of writing the models
    assert eval_mteb.main(options) == 2
    out, error = capsys.readouterr()
    assert "first the base model" not in out and len(error.splitlines()) == 1
    assert f"--base_model {base} is scored by the settings of {trained}" in error
    assert "(--no_centre)" in error and f"python3 -m verl.centre --model {base} --input FILE --output FOLDER" in error
    # Without it the base model is tried; it is this that cannot be read.
    assert eval_mteb.main([*options, "--no_centre"]) == 2
    assert "first the base model" in capsys.readouterr().out


@pytest.mark.parametrize("given", ["~/trained", "org/trained"])
def test_the_settings_of_a_model_reach_its_base_model_however_it_is_given(tmp_path, tasks, monkeypatch, capsys, given):
    trained, base = save_tiny(tmp_path / "trained", seed=1), save_tiny(tmp_path / "base", seed=0)
    (trained / "embedder_config.json").write_text(json.dumps({"centre": True}))
    monkeypatch.setenv("HOME", str(tmp_path))
    kept = tmp_path / "hub" / "models--org--trained"
    shutil.copytree(trained, kept / "snapshots" / ("a" * 40))
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    capsys.readouterr()  # of writing the models
    assert eval_mteb.main(arguments(Path(given), tasks, tmp_path / "out", "--base_model", str(base))) == 2
    out, error = capsys.readouterr()
    assert f"--base_model {base} is scored by the settings of" in error and "first the base model" not in out


def test_a_base_model_whose_process_crashes_is_not_compared(tmp_path, tasks, monkeypatch, capsys):
    trained, base = save_tiny(tmp_path / "trained", seed=1), save_tiny(tmp_path / "base", seed=0)
    options = ["--no_thinking", "--tasks", "Sts", "Ranks"]
    assert eval_mteb.main(arguments(base, tasks, tmp_path / "out", *options)) == 0
    file = tmp_path / "out" / "base_no_thinking" / "summary.json"
    record = json.loads(file.read_text())
    (tmp_path / "part.json").write_text(json.dumps(record | {"tasks": record["tasks"][:1]}))
    crashing = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(crashing))
    # It leaves the summary of the process before, or writes one without the last task.
    for work in ("", f"cp '{tmp_path}/part.json' '{file}'\n"):
        crashing.write_text(f"#!/bin/sh\n{work}exit 1\n")
        crashing.chmod(0o755)
        assert eval_mteb.main(arguments(trained, tasks, tmp_path / "out", *options, "--base_model", str(base))) == 2
        message = f"--base_model {base} could not be evaluated (exit code 1, see above)"
        assert message in capsys.readouterr().err


def test_a_card_that_cannot_be_written_takes_nothing_else_with_it(tmp_path, tasks, capsys):
    model, log = save_tiny(tmp_path / "model"), tmp_path / "timing.txt"
    write_card(model, "model", EmbedderSettings(), {}, "a command", {})
    # What the card is written to first; permissions would not stop every user.
    (model / ".README.md.writing").mkdir()
    capsys.readouterr()
    options = ["--tasks", "Sts", "--timing_log", str(log), "--show", "1"]
    assert eval_mteb.main(arguments(model, tasks, tmp_path / "out", *options)) == 0
    printed = capsys.readouterr().out
    assert f"the scores could not be added to {model}/README.md: " in printed and "\n    -> " in printed
    assert log.read_text().startswith("Sts ")


def test_an_engine_that_does_not_start_is_an_error_before_any_task(tmp_path, tiny_folder, tasks, monkeypatch, capsys):
    def fail(*_):
        raise RolloutError("vllm cannot run this model here")

    monkeypatch.setattr(Backend, "generate", fail)
    assert eval_mteb.main(arguments(tiny_folder, tasks, tmp_path)) == 1
    message = "eval_mteb: the engine failed before any task was run: vllm cannot run this model here"
    assert message in capsys.readouterr().err
    assert not results(tmp_path)


def test_many_hours_need_confirmation(tmp_path, tiny_folder, tasks, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "ASK_ABOVE_HOURS", 0.0)
    assert eval_mteb.main(arguments(tiny_folder, tasks, tmp_path)) == 2
    assert "give --yes to run it" in capsys.readouterr().err
    assert not results(tmp_path)
    assert eval_mteb.main(arguments(tiny_folder, tasks, tmp_path, "--tasks", "Sts", "--yes")) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tasks", "STS177"], "there is no task 'STS177'; the nearest names are STS17"),
        (["--tasks", "Bank77"], "Banking77Classification"),
        (["--suite", "quick"], "give one of --benchmark, --suite, and --tasks or --task_dir"),
    ],
)
def test_a_wrong_selection_is_an_error_that_helps(tmp_path, tiny_folder, tasks, capsys, more, message):
    assert eval_mteb.main(arguments(tiny_folder, tasks, tmp_path, *more)) == 2
    assert message in capsys.readouterr().err


def test_a_wrong_benchmark_or_model_is_an_error_that_helps(tmp_path, tiny_folder, tasks, capsys):
    wrong = ["--model_path", str(tiny_folder), "--benchmark", "MTEB(engg, v1)", "--output_dir", str(tmp_path)]
    assert eval_mteb.main(wrong) == 2
    assert "Did you mean: MTEB(eng, v1)?" in capsys.readouterr().err
    assert eval_mteb.main(arguments(tmp_path / "nothing", tasks, tmp_path)) == 2
    assert "does not exist" in capsys.readouterr().err


def test_the_prompt_is_shown_and_a_template_that_refuses_it_is_one_line(tmp_path, tasks, capsys):
    model = save_tiny(tmp_path / "model")
    (model / "chat_template.jinja").write_text("{{ messages[0].role == 'user' or raise_exception('no') }}" + TEMPLATE)
    options = arguments(model, tasks, tmp_path / "out", "--tasks", "Sts")
    capsys.readouterr()
    assert eval_mteb.main(options) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "takes no system turn" in error and "--system_prompt_in user" in error
    assert eval_mteb.main([*options, "--system_prompt_in", "user"]) == 0
    printed = capsys.readouterr().out
    assert f"in the user turn (this project's own, because {model} has no embedder_config.json" in printed
    first = summary(tmp_path / "out", "model")
    assert eval_mteb.main([*options, "--system_prompt_in", "user", "--system_prompt", "Own words."]) == 0
    assert "system prompt: 'Own words.' in the user turn (--system_prompt)" in capsys.readouterr().out
    second = summary(tmp_path / "out", "model")
    assert second["settings"] == first["settings"] | {"system_prompt": "Own words."}
    assert second["tasks"][0]["score"] != first["tasks"][0]["score"]


def test_suites_are_the_benchmarks_tasks_in_english():
    def subsets(selection):
        return {task.metadata.name: task.hf_subsets for task in selection.tasks}

    whole = select_tasks(None, "eng-v1", [], None)
    assert len(whole.tasks) == 56 and whole.comparable
    names = subsets(whole)
    assert {"StackExchangeClusteringP2P", "TweetSentimentExtractionClassification", "MSMARCO"} <= names.keys()
    assert names["STS17"] == ["en-en"] and names["AmazonCounterfactualClassification"] == ["en"]
    (msmarco,) = (task for task in whole.tasks if task.metadata.name == "MSMARCO")
    assert list(msmarco.eval_splits) == ["dev"]
    quick = select_tasks(None, "quick", [], None)
    assert tuple(subsets(quick)) == QUICK and not quick.comparable and subsets(quick)["STS17"] == ["en-en"]
    assert len(select_tasks(None, "nano", [], None).tasks) == 13
    assert len(select_tasks(None, "eng-v2", [], None).tasks) == 41

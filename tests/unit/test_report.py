"""What the report reads of a run folder, and what it makes of it. The page itself: tests/e2e/test_report_page.py."""

import base64
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from run_folders import ROLES, unit, write_lines, write_run, write_summary

from verl.errors import UserError
from verl.report import __main__ as program
from verl.report.curves import curve_groups, summary, time_by_phase
from verl.report.facts import flat_settings, what_was_run
from verl.report.groups import best_and_worst
from verl.report.page import distinct_names, page_of, report_data
from verl.report.probe import followed_rationales, neighbours, probe_map, project
from verl.report.read import Alert, Series, read_lines, read_run
from verl.report.scores import score_table
from verl.report.thin import fit_texts, in_page, spread_choice, thin
from verl.utils.run_files import METRICS, RECORD


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("report") / "run")


def test_a_thinned_curve_is_the_mean_and_the_range_of_neighbouring_steps():
    steps, values = np.arange(1, 1004), np.random.default_rng(0).normal(size=1003)
    values[500] = 99.0
    curve = thin(steps, values, most=100)
    assert len(curve.steps) == 100 and curve.steps == sorted(set(curve.steps))
    starts = [i * 1003 // 100 for i in range(101)]
    for i, (first, end) in enumerate(zip(starts, starts[1:], strict=False)):
        part = [float(v) for v in values[first:end]]
        assert steps[first] <= curve.steps[i] <= steps[end - 1]
        assert curve.values[i] == pytest.approx(sum(part) / len(part), rel=1e-4)
        assert (curve.low[i], curve.high[i]) == pytest.approx((min(part), max(part)), rel=1e-4)
    assert max(curve.high) == 99.0


def test_a_short_curve_is_drawn_as_it_is():
    curve = thin(np.array([0, 50, 100]), np.array([0.25, 1 / 3, 2.0]))
    assert (curve.steps, curve.values, curve.low, curve.high) == ([0, 50, 100], [0.25, 0.33333, 2.0], None, None)


def test_a_choice_of_steps_holds_the_first_and_the_last():
    assert spread_choice(list(range(201)), 8) == [0, 29, 57, 86, 114, 143, 171, 200]
    assert spread_choice([0, 10], 8) == [0, 10]


@pytest.mark.parametrize("letter", ["a", "<", "字", "\n"])
def test_texts_are_cut_to_the_bytes_that_they_take_in_the_page(letter):
    texts = [letter * n for n in (10, 4000, 20, 9000, 300)]
    fitted = fit_texts(texts, 5000)
    assert fitted[0] == texts[0] and fitted[2] == texts[2]
    assert [("[cut here" in text) for text in fitted] == [t != o for t, o in zip(fitted, texts, strict=True)]
    assert "9,000 characters" in fitted[3] and fitted[3].startswith(letter)
    assert sum(len(in_page(text)) for text in fitted) <= 5000 + 5 * len(
        "  [cut here; 9,000 characters in the run folder]…"
    )
    assert fit_texts(texts, 10**6) == texts


@pytest.mark.parametrize(("count", "size"), [(12, 40), (50, 6)])
def test_the_map_is_a_principal_component_analysis_of_all_vectors_together(count, size):
    rng = np.random.default_rng(0)
    sets = [unit(rng.normal(size=(count, size)) + np.eye(size)[k]) for k in (0, 1)]
    (before, after), explained = project([s.astype(np.float32) for s in sets])
    rows = np.concatenate(sets) - np.concatenate(sets).mean(0)
    u, s, _ = np.linalg.svd(rows, full_matrices=False)
    expected = u[:, :2] * s[:2]
    got = np.concatenate([before, after])
    assert np.abs(got) == pytest.approx(np.abs(expected), abs=1e-4)
    assert explained == pytest.approx((s[:2] ** 2).sum() / (s**2).sum(), rel=1e-4)


def test_vectors_that_are_all_equal_lie_on_one_point():
    (places,), explained = project([np.ones((20, 8), np.float32) / 8**0.5])
    assert explained == 0 and not places.any()


def test_neighbours_are_the_most_similar_other_texts():
    rng = np.random.default_rng(0)
    thinking, without = unit(rng.normal(size=(15, 6))), unit(rng.normal(size=(15, 6)))
    for i, row in enumerate(neighbours(thinking, without, count=4)):
        cosines = {j: sum(a * b for a, b in zip(thinking[i], thinking[j], strict=True)) for j in range(15) if j != i}
        wanted = sorted(cosines, key=lambda j: -cosines[j])[:4]
        assert [j for j, _, _ in row] == wanted
        assert [c for _, c, _ in row] == pytest.approx([cosines[j] for j in wanted], abs=1e-3)
        assert [p for _, _, p in row] == pytest.approx([float(without[i] @ without[j]) for j in wanted], abs=1e-3)


@pytest.mark.parametrize("count", [1, 2])
def test_few_texts_have_as_many_neighbours_as_there_are(count):
    vectors = np.eye(2, dtype=np.float32)[:count]
    assert [len(row) for row in neighbours(vectors, vectors)] == [count - 1] * count


def test_a_line_that_is_being_written_is_left_out_and_a_broken_one_counted(tmp_path):
    file = tmp_path / "lines.jsonl"
    file.write_bytes(b'{"step": 1}\n{"step": 2, "re\xff\n[3]\n{"step": 3}\n{"step": 4, "reward/me')
    assert read_lines(file) == ([{"step": 1}, {"step": 3}], 2)


def test_lines_of_a_step_are_merged_and_figures_that_were_not_finite_left_out(tmp_path):
    lines = [
        {"step": 2, "reward/mean": 1.5, "actor/grad_norm": None},
        {"step": 2, "val/mrr": 0.5},
        {"step": 1, "reward/mean": 1},
        {"step": 2, "alerts": [{"name": "collapse", "text": "first"}]},
        {"step": 2, "reward/mean": 2.5},
        {"step": 6, "alerts": [{"name": "no_signal", "text": "flat"}, {"name": "collapse", "text": "again"}]},
    ]
    write_lines(tmp_path / METRICS, lines)
    run = read_run(tmp_path)
    assert {name: (s.steps.tolist(), s.values.tolist()) for name, s in run.series.items()} == {
        "reward/mean": ([1, 2], [1.0, 2.5]), "val/mrr": ([2], [0.5]),
    }  # fmt: skip
    assert run.alerts == [Alert("collapse", "again", 2, 6), Alert("no_signal", "flat", 6, 6)]


def test_what_is_missing_is_said_with_the_setting_that_writes_it(tmp_path):
    write_lines(tmp_path / METRICS, [{"step": 1, "reward/mean": 0.5}])
    data = report_data([read_run(tmp_path)])
    said = json.dumps(data)
    for setting in ("run.json", "trainer.diag_freq", "trainer.samples_per_step", "bash eval.sh"):
        assert setting in said
    assert data["rationales"]["texts"] == [] and data["groups"][0]["groups"] == [] and "missing" in data["maps"][0]


def test_a_run_without_rationales_misses_none(tmp_path):
    write_lines(tmp_path / METRICS, [{"step": 1, "reward/contrastive/loss": 0.5}])
    settings = {"data": {"think": False, "train_batch_size": 12}, "actor_rollout_ref": {"rollout": {"n": 2}}}
    (tmp_path / RECORD).write_text(json.dumps({"config": settings}))
    data = report_data([read_run(tmp_path)])
    told = "data.think=False: this run writes no rationales."
    assert data["maps"][0]["missing"] == data["groups"][0]["missing"] == told
    assert {"name": "a step", "cells": ["12 samples"]} in data["facts"]["facts"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", b'{"config": '),
        ("diagnostics/probe.json", b"[]"),
        ("diagnostics/vectors_step_40.npz", b"PK half"),
        ("diagnostics/step_40.jsonl", b"{}\nnothing\n"),
        ("samples/step_40.jsonl", b"broken\n"),
        ("evaluation/base/summary.json", b"{}"),
    ],
)
def test_a_broken_file_costs_its_part_of_the_page_alone(tmp_path, name, content):
    folder = write_run(tmp_path / "run")
    (folder / name).write_bytes(content)
    data = report_data([read_run(folder)])
    assert any(Path(name).name in problem for problem in data["runs"][0]["problems"])
    assert data["curves"] and len(page_of(data)) > 100_000


def test_a_folder_that_is_no_run_is_named(tmp_path, capsys):
    assert program.main([str(tmp_path)]) == 2
    assert f"{tmp_path} is not the folder of a run" in capsys.readouterr().err
    with pytest.raises(UserError, match="is not a folder"):
        read_run(tmp_path / "none")


def test_the_settings_shown_are_those_that_are_not_the_defaults(run_folder):
    table = {row["name"]: (row["default"], row["cells"]) for row in what_was_run([read_run(run_folder)])["settings"]}
    assert table == {
        "data.train_files": ("–", ["data/train.parquet"]),
        "data.train_batch_size": ("64", ["6"]),
        "actor_rollout_ref.model.path": ("–", ["models/base"]),
        "actor_rollout_ref.rollout.n": ("8", ["4"]),
        "reward_model.reward_kwargs.temperature": ("0.7", ["0.1"]),
    }


def test_settings_that_an_earlier_version_did_not_have_are_not_shown_as_changed(tmp_path, run_folder):
    folder = write_run(tmp_path / "run", steps=2, texts=6)
    record = json.loads((folder / RECORD).read_text())
    del record["config"]["trainer"]["save_freq"]
    (folder / RECORD).write_text(json.dumps(record))
    runs = [read_run(folder), read_run(run_folder)]
    assert "trainer.save_freq" not in flat_settings(runs[0])
    assert "trainer.save_freq" not in {row["name"] for row in what_was_run(runs)["settings"]}


def test_keys_of_one_value_that_an_earlier_version_recorded_are_not_shown_as_changed(tmp_path):
    folder = write_run(tmp_path / "run", steps=2, texts=6)
    record = json.loads((folder / RECORD).read_text())
    record["config"]["trainer"] |= {"critic_warmup": 0, "balance_batch": True}
    (folder / RECORD).write_text(json.dumps(record))
    assert "trainer.balance_batch" in flat_settings(run := read_run(folder))
    shown = {row["name"] for row in what_was_run([run])["settings"]}
    assert not shown & {"trainer.critic_warmup", "trainer.balance_batch"}


def test_the_record_of_a_run_without_its_own_is_the_newest_checkpoints(tmp_path):
    write_lines(tmp_path / METRICS, [{"step": 1, "reward/mean": 0.5}])
    for step in (5, 10):
        (tmp_path / f"global_step_{step}").mkdir()
        (tmp_path / f"global_step_{step}" / "trainer_state.json").write_text(
            json.dumps(
                {
                    "versions": {"torch": str(step)},
                    "config": {"actor_rollout_ref": {"actor": {"grad_clip": float("inf")}}},
                }
            )
        )
    run = read_run(tmp_path)
    assert run.record["versions"] == {"torch": "10"}
    assert what_was_run([run])["settings"][0]["cells"] == ["Infinity"]


def test_every_recorded_figure_is_drawn_once_or_left_out_on_purpose(run_folder):
    run = read_run(run_folder)
    groups = curve_groups([run])
    lines = [(chart["title"], line) for group in groups for chart in group["charts"] for line in chart["lines"]]
    assert len(lines) == len(run.series) - len({"diag/texts", "diag/samples", "time/step_s"})
    assert [chart["title"] for chart in groups[-1]["charts"]] == ["own/figure"]
    reward = groups[0]["charts"][0]
    assert reward["lines"][0]["label"] == "mean"
    assert reward["lines"][0]["values"] == pytest.approx(run.series["reward/mean"].values, rel=1e-4)
    terms = groups[0]["charts"][1]
    assert {line["label"] for line in terms["lines"]} == {"positive", "negative", "clustering"}


def test_lines_of_several_runs_stand_on_the_steps_of_all(tmp_path, run_folder):
    write_lines(tmp_path / METRICS, [{"step": 2, "reward/mean": 0.5}, {"step": 70, "reward/mean": 0.75}])
    chart = curve_groups([read_run(run_folder), read_run(tmp_path)])[0]["charts"][0]
    assert chart["steps"] == [*range(1, 41), 70]
    (second,) = (line for line in chart["lines"] if line["run"] == 1)
    assert [(s, v) for s, v in zip(chart["steps"], second["values"], strict=True) if v is not None] == [
        (2, 0.5),
        (70, 0.75),
    ]


def test_a_line_in_words_names_its_ends_and_its_extremes():
    words = summary(Series(np.array([1, 2, 9]), np.array([0.5, -1.0, 2.25])))
    assert words == "from 0.5 at step 1 to 2.25 at step 9, lowest -1 at step 2, highest 2.25 at step 9"


def test_time_by_phase_adds_up(run_folder):
    run = read_run(run_folder)
    phases = time_by_phase([run])[0]
    assert [phase["phase"] for phase in phases] == ["update", "gen", "score", "sync", "val", "diag"]
    assert sum(phase["share"] for phase in phases) == pytest.approx(1, abs=1e-3)
    whole = sum(s.values.sum() for n, s in run.series.items() if n.startswith("time/") and n != "time/step_s")
    assert phases[1]["share"] == pytest.approx(run.series["time/gen_s"].values.sum() / whole, abs=1e-4)


def test_scores_of_a_step_stand_beside_those_before_training(tmp_path, run_folder):
    run = read_run(run_folder)
    write_summary(tmp_path / "middle", f"elsewhere/{run.name}/global_step_20/huggingface", 48.0)
    write_summary(tmp_path / "plain", f"merge_models/runs/{run.name}/global_step_20/huggingface", 40.0, think=False)
    write_summary(tmp_path / "stranger", "models/another", 99.0)
    # There is another run of this name.
    (tmp_path / "theirs" / run.name / "global_step_30").mkdir(parents=True)
    write_summary(tmp_path / "namesake", f"{tmp_path}/theirs/{run.name}/global_step_30", 99.0)
    table = score_table([run], [tmp_path])
    assert [column["label"] for column in table["columns"]] == [
        "before training", "step 20", "step 40", "step 20, without rationales",
    ]  # fmt: skip
    retrieval = table["rows"][0]
    assert retrieval["task"] == "Retrieval"
    assert retrieval["cells"] == [
        {"score": "44.96"},
        {"score": "48.00", "change": "+3.04"},
        {"score": "51.28", "change": "+6.32"},
        {"score": "40.00"},
    ]
    assert table["missing"] == []


def test_the_best_and_the_worst_groups_are_those_of_the_newest_steps(run_folder):
    found = best_and_worst(read_run(run_folder))
    means = {}
    for step in range(31, 41):
        for line in (run_folder / "samples" / f"step_{step}.jsonl").read_text().splitlines():
            row = json.loads(line)
            if "reward" in row:
                means.setdefault((step, row["text"]), []).append(row["reward"])
    ordered = sorted((sum(rewards) / 4 for rewards in means.values()), reverse=True)
    assert [group["mean"] for group in found["groups"]] == pytest.approx(ordered[:3] + ordered[:-4:-1])
    group = found["groups"][0]
    assert group["parts"] == ["positive", "negative", "clustering"] and len(group["rationales"]) == 4
    assert [row["reward"] for row in group["rationales"]] == sorted(
        (r["reward"] for r in group["rationales"]), reverse=True
    )
    assert [anchor["role"] for anchor in group["anchors"]] == ["query", "negative"]


def test_the_map_has_each_text_with_its_rationale_of_both_moments(run_folder):
    found = probe_map(read_run(run_folder))
    assert found["roles"] == [ROLES[i % 3] for i in range(30)] and found["samples"] == [i // 3 for i in range(30)]
    assert [moment["step"] for moment in found["moments"]] == [0, 40]
    assert found["moments"][1]["rationales"][7] == "Step 40: this is about cast iron pans, number 7."
    assert 0 < found["explained"] < 1


def test_rationales_are_followed_over_the_steps_by_text_and_not_by_number(tmp_path, run_folder):
    other = write_run(tmp_path / "other", steps=20, seed=1)
    file = other / "diagnostics" / "probe.json"
    probe = json.loads(file.read_text())
    for text in probe["texts"]:
        text["id"] = 29 - text["id"]
    file.write_text(json.dumps(probe))
    found = followed_rationales([read_run(run_folder), read_run(other)])
    first = found["texts"][0]
    assert [row["step"] for row in first["steps"]] == [0, 10, 20, 30, 40]
    assert [cell and cell["rationale"] for cell in first["steps"][1]["cells"]] == [
        "Step 10: this is about lost cards, number 0.", "Step 10: this is about cast iron pans, number 29.",
    ]  # fmt: skip
    assert first["steps"][4]["cells"][1] is None


def test_the_page_lets_its_own_scripts_and_styles_run_and_nothing_else(tmp_path):
    folder = write_run(tmp_path / "run", rationale=lambda *_: "</script><script>alert(1)</script><!--<img onerror=x>")
    page = page_of(report_data([read_run(folder)])).decode()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1]
    directives = dict(part.split(" ", 1) for part in policy.split("; "))
    assert directives["default-src"] == directives["base-uri"] == directives["form-action"] == "'none'"
    for tag in ("script", "style"):
        contents = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        hashes = ["'sha256-" + base64.b64encode(hashlib.sha256(c.encode()).digest()).decode() + "'" for c in contents]
        assert directives[f"{tag}-src"].split() == hashes
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]
    assert "<" not in data and "alert(1)" in json.dumps(json.loads(data))
    assert page.count("<script") == 6
    assert not re.search(
        r"innerHTML|insertAdjacentHTML|outerHTML|document\.write|eval\(",
        "".join(page.split("/*! https")[1].split("</script>")[1:]),
    )


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    runs = [read_run(write_run(tmp_path / part / "run", steps=1, texts=3, every=1)) for part in ("a", "b")]
    assert distinct_names(runs) == ["a/run", "b/run"]
    assert distinct_names(runs[:1]) == ["run"]


def test_several_runs_need_a_name_for_the_page(capsys):
    with pytest.raises(SystemExit) as ended:
        program.main(["a", "b"])
    assert ended.value.code == 2 and "--out is needed" in capsys.readouterr().err

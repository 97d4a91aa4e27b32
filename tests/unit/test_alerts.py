"""Alerts: each follows from the figures, is said once, and is not said of healthy figures."""

import pytest

from verl.trainer.ppo.alerts import AlertWatch

HEALTHY = {
    "reward/mean": 0.5, "group/flat_share": 0.1, "actor/pg_loss": 0.0, "rationale/trained_tokens_mean": 50.0,
    "rationale/trained_truncated": 0.1, "group/length_reward_correlation": 0.2,
}  # fmt: skip
DIAGNOSED = {
    "diag/effective_rank": 20.0, "diag/cos_without": 0.8, "diag/cos_other_rationale": 0.7,
    "diag/cos_second_rationale": 0.9, "diag/own_rationale_gain": 0.2, "diag/own_rationale_gain_error": 0.02,
    "diag/log_likelihood": -2.0, "diag/samples": 100.0, "diag/mrr_thinking": 0.8,
}  # fmt: skip


def said(lines: list[dict]) -> list[tuple[int, str, str]]:
    """(step, name, text) of every alert, as a run says them."""
    watch, found = AlertWatch(), []
    for line in lines:
        watch.add(line)
        found += [(line["step"], alert.name, alert.text) for alert in watch.take()]
    return found


def names(lines: list[dict]) -> list[tuple[int, str]]:
    return [found[:2] for found in said(lines)]


def diagnoses(*changes: dict) -> list[dict]:
    return [{"step": 10 * i, **DIAGNOSED, **change} for i, change in enumerate(changes)]


def run(steps: int, **series) -> list[dict]:
    """Training lines; a series is a function of the step."""
    return [
        {"step": step, **HEALTHY, **{name: value(step) for name, value in series.items()}}
        for step in range(1, steps + 1)
    ]


def test_healthy_figures_say_nothing():
    assert said(sorted(run(300) + diagnoses(*[{}] * 30), key=lambda line: line["step"])) == []


@pytest.mark.parametrize(
    ("name", "healthy", "ill", "words"),
    [
        ("collapse", {"diag/effective_rank": 10.1}, {"diag/effective_rank": 9.9}, "is 9.9, and was 20.0"),
        ("not_used", {"diag/cos_without": 0.979}, {"diag/cos_without": 0.981}, "cosine of 0.981"),
        ("not_used", {"diag/own_rationale_gain": 0.0, "diag/own_rationale_gain_error": 0.006},
         {"diag/own_rationale_gain": 0.0, "diag/own_rationale_gain_error": 0.004}, "embed without rationales"),
        ("gibberish", {"diag/log_likelihood": -2.9}, {"diag/log_likelihood": -3.1}, "-3.10 per token, and -2.00"),
    ],
)  # fmt: skip
def test_a_diagnosis_is_compared_with_its_limit(name, healthy, ill, words):
    assert said(diagnoses({}, healthy)) == []
    ((step, found, text),) = said(diagnoses({}, healthy, ill))
    assert (step, found) == (20, name) and words in text and text.count(". ") == 0


def test_another_objective_is_advised_to_a_run_of_grace_alone():
    ill = {"diag/own_rationale_gain": 0.0, "diag/own_rationale_gain_error": 0.004}
    ((_, _, of_grace),) = said([{"step": 1, "reward/positive/raw": 0.9}, *diagnoses(ill)])
    ((_, _, of_infonce),) = said([{"step": 1, "reward/contrast/raw": -0.9}, *diagnoses(ill)])
    assert "objective=infonce pays for" in of_grace and "objective=infonce" not in of_infonce


def test_a_likelihood_near_zero_falls_by_a_whole_nat_before_it_is_said():
    values = [{"diag/log_likelihood": value} for value in (-0.2, -0.5, -1.1, -1.3)]
    assert names(diagnoses(*values)) == [(30, "gibberish")]


def test_an_alert_is_said_once_and_again_only_after_a_long_recovery():
    ill, well = {"diag/effective_rank": 5.0}, {}
    assert names(diagnoses(well, ill, ill, well, ill)) == [(10, "collapse")]
    assert names(diagnoses(well, ill, *[well] * 9, ill)) == [(10, "collapse")]
    assert names(diagnoses(well, ill, *[well] * 10, ill)) == [(10, "collapse"), (120, "collapse")]


def test_what_was_said_before_a_resume_is_not_said_again():
    lines = diagnoses({}, {"diag/effective_rank": 5.0}, {"diag/effective_rank": 4.0})
    not_said_yet = AlertWatch()
    not_said_yet.replay(lines[:2])
    assert [alert.name for alert in not_said_yet.take()] == ["collapse"]
    watch = AlertWatch()
    watch.replay([*lines[:2], {"step": 10, "alerts": [{"name": "collapse", "text": "..."}]}])
    assert watch.take() == []
    watch.add(lines[2])
    assert watch.take() == []
    watch.add({"step": 30, **DIAGNOSED, "diag/cos_without": 0.99})
    assert [alert.name for alert in watch.take()] == ["not_used"]


def test_no_signal_is_the_mean_of_the_last_steps_that_follow_the_policy():
    flat = run(30, **{"group/flat_share": lambda step: 0.9 if step > 10 else 0.2})
    # After step 16 the last ten are 4 x 0.2 and 6 x 0.9, on average 0.62; after step 15 they are 0.55, 14: 0.48.
    assert names(flat) == [(15, "no_signal")]
    for line in flat:
        del line["actor/pg_loss"]
    assert names(flat) == []


@pytest.mark.parametrize("factor", [2.1, 1 / 2.1])
def test_length_drift_compares_the_last_steps_with_the_first(factor):
    drift = run(60, **{"rationale/trained_tokens_mean": lambda step: 50 * (factor if step > 30 else 1)})
    assert names(drift) == [(40, "length_drift")]
    mild = run(60, **{"rationale/trained_tokens_mean": lambda step: 50 * (1.9 if step > 30 else 1)})
    assert names(mild) == []


def hacked(rise: float, fall: float, held_out: str = "val/triplet_accuracy", **more: float) -> list[dict]:
    lines = run(200, **{"reward/mean": lambda step: 0.5 + rise * step / 200 + 0.01 * (step % 3)})
    lines += [
        {"step": step, held_out: 0.8 - fall * max(step - 100, 0) / 100, **more} for step in range(0, 201, 20)
    ]  # fmt: skip
    return sorted(lines, key=lambda line: line["step"])


def test_hacking_is_a_reward_that_rises_while_held_out_accuracy_falls():
    ((step, name, text),) = said(hacked(0.2, 0.1))
    # At step 160 it has fallen by 0.06 of what it was at step 60.
    assert (step, name) == (160, "hacking")
    assert "from step 60 to 160 the reward rose, and val/triplet_accuracy of held-out texts fell from 0.800 to" in text
    for rise, fall in ((0.0, 0.1), (-0.2, 0.1), (0.2, 0.0), (0.2, -0.1), (0.2, 0.04)):
        assert names(hacked(rise, fall)) == []


def test_hacking_is_found_where_few_steps_have_a_reward():
    """As where eight steps without rationales follow each one with them: 20 rewards are those until step 172."""
    lines = [line for line in hacked(0.2, 0.1) if line["step"] % 9 == 1 or "reward/mean" not in line]
    ((step, name, text),) = said(lines)
    assert (step, name) == (180, "hacking") and "from step 0 to 180 the reward rose" in text


def test_a_small_probe_has_to_fall_further():
    assert names(hacked(0.2, 0.1, "diag/mrr_thinking", **{"diag/samples": 16.0})) == []
    assert names(hacked(0.2, 0.1, "diag/mrr_thinking", **{"diag/samples": 160.0})) == [(160, "hacking")]
    assert names(hacked(0.2, 0.2, "diag/mrr_thinking", **{"diag/samples": 16.0})) == [(180, "hacking")]


def test_values_that_were_not_finite_are_no_measurements():
    assert names(diagnoses({}, {"diag/effective_rank": None}, {"diag/effective_rank": float("nan")})) == []

"""The reward manager `naive`, its rules, and loading a manager or a score function from a user's file."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch

from verl.algorithm import advantage
from verl.config import RunConfig
from verl.config_checks import build_config
from verl.errors import UserError
from verl.protocol import DataProto
from verl.workers.reward_manager import load_reward_manager
from verl.workers.reward_manager.base import RewardOutput
from verl.workers.reward_manager.checked import CheckedRewardManager, RewardError
from verl.workers.reward_manager.hidden import HiddenRewardManager
from verl.workers.reward_manager.naive import NaiveRewardManager, default_compute_score, exact_match, gsm8k


@pytest.mark.parametrize(
    ("solution", "truth", "score"),
    [
        ("She has 3 + 4 = 7 apples.\n#### 7", "7", 1.0),
        ("#### 7", "8", 0.0),
        ("####7", "7", 1.0),
        ("#### -12", "-12", 1.0),
        ("#### -12", "12", 0.0),
        ("#### 1,234", "1234", 1.0),
        ("#### 1234", "1,234", 1.0),
        ("#### 3.5", "3.5", 1.0),
        ("#### 7. Done, in 2 steps.", "7", 1.0),  # the marked number counts, not the last one
        ("#### 4\n\nQuestion: 1 + 2?\n#### 3", "4", 1.0),  # what a model goes on with does not count
        ("#### 3 no, #### 4", "4", 0.0),
        ("The answer is 42.", "42", 1.0),
        ("First 41, then 42", "42", 1.0),
        ("First 42, then 41", "42", 0.0),
        ("It costs $1,000.", "1000", 1.0),
        ("no number at all", "7", 0.0),
        ("", "7", 0.0),
        ("#### seven 7", "7", 1.0),
    ],
)
def test_gsm8k_takes_the_marked_or_the_last_number(solution: str, truth: str, score: float) -> None:
    assert gsm8k(solution, truth) == score
    assert default_compute_score("openai/gsm8k", solution, truth) == score
    assert default_compute_score("gsm8k", solution, truth) == score


@pytest.mark.parametrize(
    ("solution", "truth", "score"),
    [
        ("Paris", "paris", 1.0),
        ("  Paris\n", "Paris ", 1.0),
        ("Straße", "STRASSE", 1.0),
        ("Paris.", "Paris", 0.0),
        ("in Paris", "Paris", 0.0),
        ("", "", 1.0),
    ],
)
def test_exact_match_ignores_case_and_outer_spaces(solution: str, truth: str, score: float) -> None:
    assert exact_match(solution, truth) == score
    assert default_compute_score("exact_match", solution, truth) == score


def test_a_number_as_ground_truth_is_compared_by_its_digits() -> None:
    assert default_compute_score("gsm8k", "#### 7", 7) == 1.0  # type: ignore[arg-type]
    assert default_compute_score("exact_match", "7", 7) == 1.0  # type: ignore[arg-type]


def test_an_unknown_data_source_is_an_error_with_the_rules_and_the_ways_out() -> None:
    with pytest.raises(ValueError) as error:
        default_compute_score("math500", "7", "7")
    message = str(error.value)
    for part in ("'math500'", "openai/gsm8k", "exact_match", "custom_reward_function.path", "hidden"):
        assert part in message


def make_rows(cases: list[tuple[str, str, str]]) -> DataProto:
    """Rows of (data source, rationale, ground truth)."""
    return DataProto.from_dict(
        {
            "response_length": torch.ones(len(cases), dtype=torch.int64),
            "trained": torch.ones(len(cases), dtype=torch.bool),
        },
        {
            "data_source": [c[0] for c in cases],
            "rationale": [c[1] for c in cases],
            "reward_model": [{"style": "rule", "ground_truth": c[2]} for c in cases],
            "extra_info": [{"index": i} for i in range(len(cases))],
            "role": ["positive"] * len(cases),
            "uid": list(range(len(cases))),
            "text": [f"text {i}" for i in range(len(cases))],
        },
    )


CASES = [
    ("gsm8k", "#### 5", "5"),
    ("exact_match", "Rome", "Paris"),
    ("gsm8k", "so 6", "6"),
    ("gsm8k", "9", "6"),
]


def test_each_row_is_scored_by_the_rule_of_its_data_source() -> None:
    manager = NaiveRewardManager()
    out = manager(make_rows(CASES))
    assert out.scores.tolist() == [1.0, 0.0, 1.0, 0.0]
    assert (out.metrics, out.columns) == ({}, {})
    assert manager.needs_embeddings is False


def test_dict_results_become_scores_metrics_and_columns() -> None:
    def compute(data_source: str, solution_str: str, ground_truth: str, extra_info: Any) -> dict[str, float]:
        return {
            "length": len(solution_str),
            "score": extra_info["index"] / 4,
            "known": data_source == "gsm8k",
        }

    out = NaiveRewardManager(compute)(make_rows(CASES))
    assert out.scores.tolist() == [0.0, 0.25, 0.5, 0.75]
    assert {name: column.tolist() for name, column in out.columns.items()} == {
        "length": [6.0, 4.0, 4.0, 1.0],
        "known": [1.0, 0.0, 1.0, 1.0],
    }
    assert out.metrics == pytest.approx({"length": 3.75, "known": 0.75}, abs=1e-6)


@pytest.mark.parametrize(
    ("results", "complaint"),
    [
        ([1.0, "0.5"], "returned '0.5' for sample 1, text 'text 1', rationale 'Rome'; return a finite number"),
        ([1.0, math.nan], "returned nan for sample 1"),
        ([1.0, math.inf], "returned inf for sample 1"),
        ([1.0, None], "returned None for sample 1"),
        ([1.0, [1.0, 2.0]], r"returned \[1.0, 2.0\] for sample 1"),
        ([{"score": 1}, {"acc": 1}], "returned {'acc': 1} for sample 1"),
        ([{"score": 1}, {"score": 1, "why": "good"}], "returned .*'why': 'good'} for sample 1"),
        (
            [{"score": 1, "acc": 1}, {"score": 1}],
            r"returned the keys \['score'\] for sample 1.*, and \['acc', 'score'\]",
        ),
        ([{"score": 1}, 1.0, {"score": 1, "acc": 1}], r"returned the keys \['acc', 'score'\] for sample 2"),
        ([1.0, ZeroDivisionError("no such unit")], "(?s)Traceback.*compute failed for sample 1.*: no such unit"),
    ],
)
def test_a_score_that_is_none_names_the_row_and_the_function(results: list[Any], complaint: str) -> None:
    def compute(extra_info: Any, **_: Any) -> Any:
        result = results[extra_info["index"]]
        if isinstance(result, Exception):
            raise result
        return result

    with pytest.raises(RewardError, match=complaint) as refused:
        NaiveRewardManager(compute)(make_rows(CASES[: len(results)]))
    assert "the score function compute" in str(refused.value)


def test_numbers_of_other_libraries_are_numbers() -> None:
    results = [True, np.float32(0.5), torch.tensor(0.25), np.int64(3)]
    out = NaiveRewardManager(lambda extra_info, **_: results[extra_info["index"]])(make_rows(CASES))
    assert out.scores.tolist() == [1.0, 0.5, 0.25, 3.0]


@pytest.mark.parametrize(
    ("output", "complaint"),
    [
        (torch.zeros(4), "returned Tensor; return a RewardOutput"),
        ({"reward_tensor": torch.zeros(4)}, "returned dict; return a RewardOutput"),
        (RewardOutput([0.0] * 4), r"scores is list; give a torch tensor \[4\]"),
        (RewardOutput(torch.zeros(4, 1)), r"scores has the shape \[4, 1\]; give one value for each of the 4 trained"),
        (RewardOutput(torch.zeros(5)), r"scores has the shape \[5\]"),
        (RewardOutput(torch.zeros(4, dtype=torch.float64)), "scores are torch.float64; return float32"),
        (RewardOutput(torch.zeros(4, dtype=torch.int64)), "scores are torch.int64; return float32"),
        (RewardOutput(torch.zeros(4, device="meta")), "scores is on meta; give it on the CPU"),
        (RewardOutput(torch.zeros(4, requires_grad=True)), r"scores carries a graph; return scores.detach\(\)"),
        (
            RewardOutput(torch.tensor([0.0, 1.0, math.nan, -math.inf])),
            "2 of 4 scores are not finite, the first is nan for sample 2, text 'text 2', rationale 'so 6'",
        ),
        (RewardOutput(torch.zeros(4), columns={"gap": torch.zeros(3)}), r"columns\['gap'\] has the shape \[3\]"),
        (RewardOutput(torch.zeros(4), metrics={"note": "good"}), r"metrics\['note'\] is 'good'; give a number"),
        (RewardOutput(torch.zeros(4), metrics={"two": torch.zeros(2)}), r"metrics\['two'\] is tensor.*; give a number"),
    ],
)
def test_what_a_manager_returns_is_checked_at_the_door(output: Any, complaint: str) -> None:
    with pytest.raises(RewardError, match=rf"reward_model.reward_manager=mine.*{complaint}"):
        CheckedRewardManager(Returning(output), "mine")(make_rows(CASES))


def test_metrics_of_other_libraries_become_numbers_that_files_and_trackers_take() -> None:
    given = {"double": np.float64(1.5), "single": np.float32(0.5), "count": 3, "scalar": torch.tensor(0.25)}
    found = CheckedRewardManager(Returning(RewardOutput(torch.zeros(4), metrics=given)), "mine")(make_rows(CASES))
    assert orjson.loads(orjson.dumps(found.metrics)) == {"double": 1.5, "single": 0.5, "count": 3, "scalar": 0.25}


WIDE = torch.zeros(4, 8)
HOLED = WIDE.clone()
HOLED[1:3, 5] = math.inf


@pytest.mark.parametrize(
    ("grad", "complaint"),
    [
        ([[0.0] * 8] * 4, r"embedding_grad is list; give a torch tensor \[4, 8\]"),
        (WIDE[:3], r"embedding_grad has the shape \[3, 8\]; give \[4, 8\], a gradient for every row of the step"),
        (WIDE[:, :7], r"embedding_grad has the shape \[4, 7\]"),
        (WIDE.double(), "embedding_grad are torch.float64; return float32"),
        (WIDE.to("meta"), "embedding_grad is on meta; give it on the CPU"),
        (WIDE.clone().requires_grad_(), r"embedding_grad carries a graph; return embedding_grad.detach\(\)"),
        (HOLED, "embedding_grad is not finite in 2 of 4 rows, the first is the positive of sample 1, text 'text 1'"),
    ],
)
def test_a_gradient_on_the_embeddings_is_checked_at_the_door(grad: Any, complaint: str) -> None:
    rows = make_rows(CASES[:4]).with_tensors(embeddings=torch.ones(4, 8))
    with pytest.raises(RewardError, match=rf"reward_model.reward_manager=mine: .*{complaint}"):
        CheckedRewardManager(Returning(RewardOutput(torch.zeros(4), embedding_grad=grad)), "mine")(rows)
    with pytest.raises(RewardError, match="returned embedding_grad, but asks for no embeddings"):
        output = RewardOutput(torch.zeros(4), embedding_grad=WIDE)
        CheckedRewardManager(Returning(output), "mine")(make_rows(CASES[:4]))


def test_a_manager_that_does_not_say_so_trains_no_anchors() -> None:
    manager = Returning(RewardOutput(torch.zeros(4), embedding_grad=WIDE))
    rows = make_rows(CASES[:4]).with_tensors(embeddings=torch.ones(4, 8))
    assert CheckedRewardManager(manager, "mine")(rows).embedding_grad is WIDE
    assert CheckedRewardManager(manager, "mine").trains_anchors is False
    manager.trains_anchors = True
    assert CheckedRewardManager(manager, "mine").trains_anchors is True


class Returning:
    needs_embeddings = False
    exclude_system_prompt = True

    def __init__(self, output: Any) -> None:
        self.output = output

    def __call__(self, rows: DataProto) -> Any:
        return self.output


def test_an_error_inside_a_manager_names_it_after_its_traceback() -> None:
    with pytest.raises(RewardError, match=r"(?s)Traceback.*reward_model.reward_manager=mine failed: .*rows lack"):
        CheckedRewardManager(HiddenRewardManager(), "mine")(make_rows(CASES))


USER_FILE = """
import torch
from verl.workers.reward_manager.base import RewardOutput


class LengthReward:
    needs_embeddings = False
    exclude_system_prompt = True

    def __init__(self, target, weight=1.0):
        self.target, self.weight = target, weight

    def __call__(self, rows):
        lengths = [len(text) for text in rows.non_tensor_batch["rationale"]]
        return RewardOutput(torch.tensor([-self.weight * abs(n - self.target) for n in lengths]))


def compute_score(data_source, solution_str, ground_truth, extra_info, bonus=0.0):
    return {"score": float(solution_str == ground_truth) + bonus, "index": extra_info["index"]}


def shout(data_source, solution_str, ground_truth, extra_info):
    return float(solution_str.isupper())
"""


@pytest.fixture
def user_file(tmp_path: Path) -> Path:
    file = tmp_path / "my_reward.py"
    file.write_text(USER_FILE)
    return file


def run_config(tmp_path: Path, manager: str, kwargs: dict[str, Any] | None = None, **custom: Any) -> RunConfig:
    train = tmp_path / "train.parquet"
    train.touch()
    return build_config(
        {
            "data": {"train_files": str(train)},
            "actor_rollout_ref": {"model": {"path": "a/model"}},
            "reward_model": {"reward_manager": manager, "reward_kwargs": kwargs or {}},
            "custom_reward_function": custom,
        }
    )


def test_hidden_is_built_with_its_arguments(tmp_path: Path) -> None:
    manager = load_reward_manager(run_config(tmp_path, "hidden", {"temperature": 0.1, "with_scale": False})).manager
    assert isinstance(manager, HiddenRewardManager)
    assert (manager.config.temperature, manager.config.with_scale, manager.config.cross_group_weight) == (
        0.1,
        False,
        0.2,
    )
    assert manager.needs_embeddings is True


def test_naive_without_a_function_uses_the_rules(tmp_path: Path) -> None:
    manager = load_reward_manager(run_config(tmp_path, "naive"))
    assert manager(make_rows(CASES)).scores.tolist() == [1.0, 0.0, 1.0, 0.0]


def test_naive_uses_the_function_of_the_users_file_with_its_arguments(tmp_path: Path, user_file: Path) -> None:
    config = run_config(tmp_path, "naive", path=str(user_file), reward_kwargs={"bonus": 0.5})
    out = load_reward_manager(config)(make_rows([("mine", "a", "a"), ("mine", "a", "b")]))
    assert out.scores.tolist() == [1.5, 0.5]
    assert out.columns["index"].tolist() == [0.0, 1.0]
    assert out.metrics == {"index": 0.5}


def test_naive_uses_the_function_of_the_given_name(tmp_path: Path, user_file: Path) -> None:
    config = run_config(tmp_path, "naive", path=str(user_file), name="shout")
    assert load_reward_manager(config)(make_rows([("x", "AB", ""), ("x", "Ab", "")])).scores.tolist() == [
        1.0,
        0.0,
    ]


def test_a_class_of_the_users_file_is_built_with_reward_kwargs(tmp_path: Path, user_file: Path) -> None:
    config = run_config(tmp_path, f"{user_file}:LengthReward", {"target": 3, "weight": 2.0})
    manager = load_reward_manager(config)
    assert manager(make_rows([("x", "abc", ""), ("x", "abcde", "")])).scores.tolist() == [0.0, -4.0]
    assert manager.needs_embeddings is False


def test_a_users_file_may_hold_a_dataclass_with_annotations_as_text(tmp_path: Path) -> None:
    file = tmp_path / "modern.py"
    file.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "import torch\n"
        "from verl.workers.reward_manager.base import RewardOutput\n"
        "@dataclass\n"
        "class Constant:\n"
        "    value: float = 1.0\n"
        "    needs_embeddings: bool = False\n"
        "    exclude_system_prompt: bool = True\n"
        "    def __call__(self, rows):\n"
        "        return RewardOutput(torch.full((len(rows),), self.value))\n"
    )
    manager = load_reward_manager(run_config(tmp_path, f"{file}:Constant", {"value": 2.5}))
    assert manager(make_rows(CASES)).scores.tolist() == [2.5] * 4


def test_a_users_file_may_register_an_advantage_estimator_and_be_loaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As two runs in one process do."""
    monkeypatch.setattr(advantage, "_ADVANTAGE_ESTIMATORS", dict(advantage._ADVANTAGE_ESTIMATORS))

    def load(name: str) -> None:
        file = tmp_path / f"registers_{name}.py"
        registering = f"from verl.trainer.ppo.core_algos import register_adv_est\nregister_adv_est('{name}')(shout)\n"
        file.write_text(USER_FILE + registering)
        load_reward_manager(run_config(tmp_path, f"{file}:LengthReward", {"target": 3}))

    load("mine")
    first = advantage.get_adv_estimator_fn("mine")
    load("mine")
    assert advantage.get_adv_estimator_fn("mine") is not first
    with pytest.raises(ValueError, match="'grpo' exists already"):
        load("grpo")


def test_a_class_that_is_no_reward_manager_is_told_what_it_lacks(tmp_path: Path) -> None:
    file = tmp_path / "plain.py"
    file.write_text("class Plain:\n    pass\n")
    with pytest.raises(UserError, match=r"plain\.py:Plain lacks the attribute needs_embeddings"):
        load_reward_manager(run_config(tmp_path, f"{file}:Plain"))


def test_an_unknown_manager_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"reward_manager=hiden is unknown; known: hidden, naive, or path/to/file.py:"):
        load_reward_manager(run_config(tmp_path, "hiden"))


@pytest.mark.parametrize(
    ("name", "missing"), [("absent.py:LengthReward", "absent.py"), ("my_reward.py:Other", "'Other'")]
)
def test_a_missing_file_or_class_is_named(tmp_path: Path, user_file: Path, name: str, missing: str) -> None:
    with pytest.raises(UserError, match="^reward_model.reward_manager: ") as error:
        load_reward_manager(run_config(tmp_path, str(tmp_path / name)))
    assert missing in str(error.value)


@pytest.mark.parametrize(
    ("file", "name", "missing"), [("absent.py", "shout", "absent.py"), ("my_reward.py", "sing", "'sing'")]
)
def test_a_missing_function_or_its_file_is_named(
    tmp_path: Path, user_file: Path, file: str, name: str, missing: str
) -> None:
    config = run_config(tmp_path, "naive", path=str(tmp_path / file), name=name)
    with pytest.raises(UserError, match="^custom_reward_function.path: ") as error:
        load_reward_manager(config)
    assert missing in str(error.value)


@pytest.mark.parametrize("kwargs", [{"targt": 3}, {}])
def test_arguments_that_a_users_class_does_not_take_are_an_error(
    tmp_path: Path, user_file: Path, kwargs: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=r"reward_kwargs do not fit .*LengthReward: .*targ"):
        load_reward_manager(run_config(tmp_path, f"{user_file}:LengthReward", kwargs))


def test_arguments_that_naive_does_not_take_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"reward_kwargs do not fit naive: .*temperature"):
        load_reward_manager(run_config(tmp_path, "naive", {"temperature": 0.1}))

"""The model card says how the model was made, and takes up scores without losing others."""

import pytest

from verl.checkpoint.model_card import put_scores, write_checkpoint_card
from verl.config import RunConfig
from verl.embedding.settings import EmbedderSettings
from verl.step_schedule import StepSchedule


@pytest.fixture
def card(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["main_ppo.py", "data.train_files=a b.parquet", "trainer.experiment_name=x"])
    config = RunConfig.model_validate(
        {
            "data": {"train_files": "a b.parquet", "train_batch_size": 32},
            "reward_model": {"reward_kwargs": {"temperature": 0.1}},
            "trainer": {"experiment_name": "x"},
        }
    )
    settings = EmbedderSettings(base_model="org/model-1.5B", system_prompt="Say | think")
    schedule = StepSchedule(1234, samples=32, contrastive_samples=48, warm_up_steps=2, steps_between=3)
    write_checkpoint_card(tmp_path, config, settings, schedule, 50, {"torch": "2.13.0"})
    return tmp_path / "README.md"


def test_it_tells_data_reward_settings_versions_and_the_command(card):
    text = card.read_text()
    for part in (
        "base_model: org/model-1.5B\n", "# x, step 50\n", "1,234 samples of a b.parquet",
        # 2 first ones, and 3 after each of steps 3, 7, ... 47.
        "| steps | 12 of 32 samples x 8 rationales, 38 of 48 samples without rationales |",
        "hidden {'temperature': 0.1}", "| max_new_tokens | 2048 |", "Say &#124; think", "torch 2.13.0",
        "python3 -m verl.trainer.main_ppo 'data.train_files=a b.parquet' trainer.experiment_name=x",
        "Not evaluated yet",
    ):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize("base", ["models/a/b", "models/folder", "./gone"])
def test_a_local_base_is_not_given_to_the_hub(tmp_path, monkeypatch, base):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "folder").mkdir(parents=True)
    write_checkpoint_card(tmp_path, RunConfig(), EmbedderSettings(base_model=base), StepSchedule(1, 1, 1), 1, {})
    front = (tmp_path / "README.md").read_text().split("---")[1]
    assert "base_model" not in front


def test_scores_come_in_are_replaced_and_leave_others_alone(card):
    before = card.read_text()
    assert put_scores(card.parent, "first set", ["| a | 1 |"])
    assert put_scores(card.parent, "second set", ["| b | 2 |"])
    assert put_scores(card.parent, "first set", ["| a | 3 |"])
    text = card.read_text()
    assert "Not evaluated yet" not in text and "| a | 1 |" not in text
    assert text.count("### first set") == text.count("### second set") == 1
    assert "| a | 3 |" in text and "| b | 2 |" in text
    assert text.split("<!-- end of scores -->")[1] == before.split("<!-- end of scores -->")[1]
    assert text.split("## Scores")[0] == before.split("## Scores")[0]


def test_a_readme_that_is_not_a_card_is_left_alone(tmp_path):
    assert not put_scores(tmp_path, "set", ["| a | 1 |"])
    (tmp_path / "README.md").write_text("mine\n")
    assert not put_scores(tmp_path, "set", ["| a | 1 |"])
    assert (tmp_path / "README.md").read_text() == "mine\n"

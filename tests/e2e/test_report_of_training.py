"""The report page that a training run keeps up to date. The page itself: test_report_page.py."""

import json

from runs import recipe, steps_of, train_here

from verl.utils.run_files import REPORT


def test_a_run_writes_its_page_at_each_save(tmp_path, tiny_folder, triplets):
    steps = ["trainer.total_training_steps=2", "trainer.save_freq=1", "trainer.report=True"]
    run = tmp_path / "run"
    done = train_here(*recipe(tiny_folder, triplets, run), *steps)
    assert done.returncode == 0, done.stderr
    data = json.loads((run / REPORT).read_bytes().split(b'id="data">')[1].split(b"</script>")[0])
    assert data["runs"][0]["progress"] == "2 of 2"
    changed = {row["name"]: row["cells"] for row in data["facts"]["settings"]}
    assert changed["actor_rollout_ref.rollout.n"] == ["3"] and changed["trainer.report"] == ["true"]
    assert data["groups"][0]["steps"] == [1, 2] and data["facts"]["versions"]


def test_a_page_that_cannot_be_written_is_said_and_costs_the_run_nothing(tmp_path, tiny_folder, triplets):
    run = tmp_path / "run"
    (run / REPORT).mkdir(parents=True)
    steps = ["trainer.total_training_steps=2", "trainer.save_freq=1", "trainer.report=True"]
    done = train_here(*recipe(tiny_folder, triplets, run), *steps)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{run / REPORT} was not written (trainer.report)") == 2
    assert {line["step"] for line in steps_of(run)} == {1, 2} and (run / "global_step_2").is_dir()

"""A run on two machines (docs/several-machines.md), one of which is lost in mid-step; and the run on the other one."""

import re
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from machines import Machine, NotPermitted, two_machines
from runs import message, recipe, steps_of

# Ray takes a minute to be sure that a silent machine is gone; here it asks more often.
IMPATIENT = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture
def machines() -> Iterator[tuple[Machine, Machine]]:
    with ExitStack() as stack:
        try:
            pair = stack.enter_context(two_machines())
        except NotPermitted as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        yield pair


@pytest.mark.parametrize("lost", ["cut off", "switched off"])
def test_a_machine_is_lost_and_the_run_goes_on_with_the_other_one(lost, machines, tmp_path, tiny_folder, triplets):
    # Two minutes: Ray on two machines, two workers, the time until a silent machine counts as lost, and a second run.
    first, second = machines
    run_dir, token = tmp_path / "run", {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    slots = "--num-cpus=1"
    first.run(RAY, "start", "--head", f"--node-ip-address={first.address}", "--port=6379",
              "--include-dashboard=false", slots, **token, **IMPATIENT)  # fmt: skip
    second.run(RAY, "start", f"--address={first.address}:6379", slots, **token)
    environment = {**token, "RAY_ADDRESS": f"{first.address}:6379"}
    train = [sys.executable, "-m", "verl.trainer.main_ppo", *recipe(tiny_folder, triplets, run_dir)]
    lose_a_machine(first, second, [*train, "trainer.nnodes=2"], environment, lost)
    steps = 1 + max(int(path.name.rsplit("_", 1)[1]) for path in run_dir.glob("global_step_*"))
    output = first.run(*train, "trainer.nnodes=1", f"trainer.total_training_steps={steps}", **environment)
    assert "resumed from" in output and "changed: trainer.nnodes: 2 before, 1 now" in output
    assert [line["step"] for line in steps_of(run_dir)] == list(range(1, steps + 1))
    # A cluster that the run did not start is left as it is.
    status = first.run(RAY, "status", **environment)
    assert re.search(r"Active:\n 1 node_\w+\nPending", status), status


def lose_a_machine(first: Machine, second: Machine, train: list[str], environment: dict[str, str], how: str) -> None:
    limit = ["trainer.phase_timeout_s=300", "trainer.total_training_steps=500", "trainer.save_freq=2"]
    process = first.start(*train, *limit, **environment)
    assert process.stdout is not None
    assert any("step 3/500" in line for line in iter(process.stdout.readline, "")), process.communicate()[1]
    start = time.monotonic()
    second.cut_off() if how == "cut off" else second.switch_off()
    _, errors = process.communicate(timeout=300)
    print(f"{how}: {time.monotonic() - start:.0f} s\n{message(errors)}")
    assert process.returncode == 1, errors
    assert re.search(rf"rank \d \(pid \d+ on {second.name}\)", message(errors)), errors

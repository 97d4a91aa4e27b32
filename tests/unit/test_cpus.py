"""The CPUs that a process may use, and how its threads wait for each other."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from verl.single_controller.local_group import LocalWorkerGroup
from verl.single_controller.worker import Worker
from verl.utils.cpus import threads_wanted, usable_cpus

ROOT = Path(__file__).parents[2]
SAID = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")

KEYS = ["actor_rollout_ref.model.path=m", "data.train_files=examples/triplets.jsonl"]
PROGRAMS = [
    ["verl.trainer.main_ppo", *KEYS],
    ["verl.doctor", *KEYS],
    ["verl.encoder", "--model", "m", "--input", "i.txt", "--output", "o.parquet"],
    ["verl.eval_generation", "--model", "m", "--data", "d.jsonl"],
    ["verl.centre", "--model", "m", "--input", "i.parquet"],
    ["eval_mteb", "--model_path", "m", "--suite", "quick"],
]
# Prints what is set when torch is imported, and ends the program.
AT_TORCH = """
import os, runpy, sys
class AtTorch:
    def find_spec(module, path=None, target=None):
        if module == "torch":
            print("set:", *(name + "=" + os.environ[name] for name in {names} if name in os.environ), flush=True)
            os._exit(0)
sys.meta_path.insert(0, AtTorch)
sys.argv = {command}
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def run(code: str, **said: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in SAID}
    environment |= {"PYTHONPATH": str(ROOT), **said}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


@pytest.mark.parametrize("command", PROGRAMS, ids=lambda command: command[0])
def test_programs_that_compute_set_how_threads_wait_before_torch_reads_it(command):
    code = AT_TORCH.format(names=SAID, command=command)
    assert "set: OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=1000\n" in run(code)


@pytest.mark.parametrize("said", ["OMP_WAIT_POLICY=active", "GOMP_SPINCOUNT=7", "KMP_BLOCKTIME=1"])
def test_what_the_user_has_said_stays(said):
    name, value = said.split("=")
    assert f"set: {said}\n" in run(AT_TORCH.format(names=SAID, command=PROGRAMS[0]), **{name: value})


def test_cpus_are_those_of_the_affinity():
    first = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, [{first}]); from verl.utils.cpus import *; "
    assert run(f"{code} print(usable_cpus(), share_of_cpus(3), threads_wanted())").split() == ["1", "1", "None"]


@pytest.mark.parametrize(("said", "threads"), [("3", 3), ("4,2", 4), ("", None), ("0", None)])
def test_a_worker_has_the_threads_that_the_user_wants(said, threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert threads_wanted() == threads
    before = torch.get_num_threads()
    group = LocalWorkerGroup(Worker, (), "cpu")
    try:
        assert torch.get_num_threads() == (threads or usable_cpus())
        assert os.environ["OMP_NUM_THREADS"] == str(threads or usable_cpus())
    finally:
        group.shutdown()
    assert torch.get_num_threads() == before

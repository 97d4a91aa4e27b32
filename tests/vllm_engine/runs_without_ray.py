"""Train without Ray, several times: python runs_without_ray.py jobs.json

Importing vllm takes longer than such a run, so it is imported once, and each run is a fork of this process. Each job
has the `overrides` of main_ppo, whether the engine is to keep its old LM head (`stale_head`), and the file `out` for
what is left: the exit code, stdout, stderr, and the exception that a worker raised.
"""

import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from verl.trainer import main_ppo, train
from verl.workers.fsdp_workers import ActorRolloutRefWorker
from verl.workers.rollout.base import RolloutError
from verl.workers.rollout.choose import load_vllm_adapter
from verl.workers.weight_sync import WeightSyncError


class StaleHeadWorker(ActorRolloutRefWorker):
    """The first sync is complete; from the second on, the engine's LM head keeps its old weights."""

    def update_actor(self, rows, num_mini_batches):
        self.rollout._repack_head = lambda: None
        return super().update_actor(rows, num_mini_batches)


def run(job: dict[str, Any]) -> None:
    if job["stale_head"]:
        train.ActorRolloutRefWorker = StaleHeadWorker
    left = {"returncode": 1, "error": ""}
    out, errors = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(errors):
        try:
            left["returncode"] = main_ppo.main([*job["overrides"], "trainer.use_ray=False"])
        except (RolloutError, WeightSyncError) as error:
            left["error"] = f"{type(error).__name__}: {error}"
    Path(job["out"]).write_text(json.dumps({**left, "stdout": out.getvalue(), "stderr": errors.getvalue()}))


if __name__ == "__main__":
    load_vllm_adapter()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        process = get_context("fork").Process(target=run, args=(job,))
        process.start()
        process.join()

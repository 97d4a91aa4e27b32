"""The number of GPUs that train.sh and eval.sh choose their recipe by."""

import subprocess
import sys

import torch

from verl.utils import gpus


def test_the_number_is_torchs_and_torch_is_loaded_only_where_there_is_a_driver(repo):
    code = (
        "import sys; from verl.utils.gpus import _has_driver, count_gpus; print(count_gpus()); "
        "assert _has_driver() or 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=repo)
    assert done.stdout == f"{torch.cuda.device_count()}\n"


def test_a_driver_does_not_make_a_gpu(monkeypatch):
    monkeypatch.setattr(gpus, "_has_driver", lambda: True)
    for count in (0, 3):  # none may be visible, and torch may be built without CUDA
        monkeypatch.setattr("torch.cuda.device_count", lambda count=count: count)
        assert gpus.count_gpus() == count

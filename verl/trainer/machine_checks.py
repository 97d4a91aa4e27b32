"""Whether this machine can train a configuration: the checks of `python3 -m verl.doctor`."""

import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from verl.checkpoint.run_folder import CheckpointError, RunFolder
from verl.checkpoint.training_state import checkpoint_size
from verl.config import RunConfig
from verl.embedding.chat_template import Message, with_system_prompt
from verl.embedding.prompts import rationale_messages
from verl.errors import UserError
from verl.models.attention import kernel_in_use
from verl.models.load import build_twin, load_causal_lm, read_model_config
from verl.models.lora import count_parameters
from verl.single_controller import ray_cluster
from verl.single_controller.worker import Worker, WorkerPlace
from verl.trainer.prepare import build_renderer, build_without_weights, find_devices, start_ray
from verl.utils.cpus import threads_wanted, usable_cpus
from verl.utils.logging import quiet_libraries
from verl.utils.tokenizer import load_tokenizer, stop_token_ids
from verl.workers.rollout.base import Rollout, finish
from verl.workers.rollout.choose import choose_engine, load_vllm_adapter
from verl.workers.rollout.hf import HFRollout

_REQUIREMENTS = Path(__file__).parents[2] / "requirements.txt"
_TIMEOUT_S = 120
_WRITE_MIB = 256


class CheckFailed(Exception):
    """The message says what is wrong, and what to do."""


def check_versions(_: RunConfig) -> str:
    """The installed packages are those that were tested together."""
    pinned = re.findall(r"^([\w.-]+)==([\w.+]+)", _REQUIREMENTS.read_text(), re.MULTILINE)
    wrong = []
    for name, tested in pinned:
        try:
            found = version(name).split("+")[0]
        except PackageNotFoundError:
            found = "is missing"
        if found != tested.split("+")[0]:
            wrong.append(f"{name} {found} (tested: {tested})")
    if wrong:
        raise CheckFailed("; ".join(wrong) + ". Run pip install -r requirements.txt; other versions are untested.")
    return f"Python {platform.python_version()}, {len(pinned)} packages as tested"


def check_devices(config: RunConfig) -> str:
    """Enough devices for the workers, and GPUs that nothing else uses."""
    device, workers = find_devices(config)
    if device == "cpu":
        memory = psutil.virtual_memory()
        return f"{workers} worker(s) on {usable_cpus()} CPUs, {memory.available / 2**30:.1f} GiB of memory free"
    lines = []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        lines.append(f"{torch.cuda.get_device_name(i)} ({free / 2**30:.0f} of {total / 2**30:.0f} GiB free)")
        if free < total / 2:
            raise CheckFailed(f"GPU {i} is in use: {lines[-1]}. Stop what runs there (nvidia-smi), or hide it "
                          "(CUDA_VISIBLE_DEVICES).")  # fmt: skip
    return f"{workers} worker(s) per machine, {', '.join(lines)}"


def check_ray(config: RunConfig) -> str:
    """Ray has enough machines and free devices for the workers."""
    if not config.trainer.use_ray:
        return "not used: trainer.use_ray=False"
    device, workers = find_devices(config)
    wanted = workers * config.trainer.nnodes
    reaper = start_ray(config, wanted)
    try:
        nodes = ray_cluster.machines()
        free = ray.available_resources().get("GPU" if device == "cuda" else "CPU", 0)
    finally:
        ray.shutdown()
        del reaper
    if len(nodes) < config.trainer.nnodes or free < wanted:
        raise CheckFailed(
            f"the cluster has {len(nodes)} machine(s) and {free:g} free {device} slots; the run needs "
            f"{config.trainer.nnodes} and {wanted}. Add machines (ray start --address=HEAD:6379), or stop the job that "
            "holds them (ray list actors)."
        )
    return f"{len(nodes)} machine(s), {free:g} {device} slots free, {wanted} needed"


def check_all_reduce(config: RunConfig) -> str:
    """Two processes sum a number over the network stack that training uses."""
    device, _ = find_devices(config)
    use_cuda = device == "cuda" and torch.cuda.device_count() > 1
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        context = mp.spawn(_all_reduce, (f"{folder}/meet", use_cuda), nprocs=2, join=False)
        while not context.join(timeout=1):
            if time.monotonic() > start + _TIMEOUT_S:
                for process in context.processes:
                    process.kill()
                raise CheckFailed(f"no answer in {_TIMEOUT_S} s. Set NCCL_DEBUG=INFO and look at NCCL_SOCKET_IFNAME, "
                              "GLOO_SOCKET_IFNAME and the firewall.")  # fmt: skip
        return f"2 processes over {'nccl' if use_cuda else 'gloo'} in {time.monotonic() - start:.1f} s"


def _all_reduce(rank: int, meet: str, use_cuda: bool) -> None:
    if use_cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if use_cuda else "gloo", f"file://{meet}", rank=rank, world_size=2)
    value = torch.tensor([rank + 1.0], device="cuda" if use_cuda else "cpu")
    dist.all_reduce(value)
    dist.destroy_process_group()
    assert float(value) == 3.0, value


def check_model(config: RunConfig) -> str:
    """The model has a config, a tokenizer and a chat template, and a prompt fits."""
    renderer = build_renderer(config)
    (prompt,) = renderer.render([_example(config)])
    found = read_model_config(config.actor_rollout_ref.model)
    stops = stop_token_ids(renderer.tokenizer, found)
    note = ""
    if renderer.tokenizer.pad_token_id in stops:
        note = "; the pad token is an end token too, which is fine here (lengths are counted)"
    return (
        f"{config.actor_rollout_ref.model.path}: {found.model_type}, the prompt of a short text has {len(prompt.ids)} "
        f"tokens, end tokens {stops}{note}"
    )


def check_hf(config: RunConfig) -> str:
    """transformers generates a short rationale, and the trainer's attention works."""
    lm, stops = _load(config)
    device, model = torch.device(find_devices(config)[0]), config.actor_rollout_ref.model
    attention = kernel_in_use(lm.config, model.attn_implementation, device)
    engine = HFRollout(build_twin(lm, lm.dtype, device, model.trust_remote_code), stops, 8)
    return f"{_generate(config, lm, engine)}, {attention}"


def check_vllm(config: RunConfig) -> str:
    """vLLM generates a short rationale, if the run may use it."""
    rollout = config.actor_rollout_ref.rollout
    if not config.data.think:
        return "not used: data.think=False"
    if rollout.name == "hf":
        return "not used: actor_rollout_ref.rollout.name=hf"
    name, reason = choose_engine(rollout.name)
    if name == "hf":
        return reason
    lm, stops = _load(config)
    worker = Worker(WorkerPlace(0, 1, find_devices(config)[0], 1, threads_wanted()))
    worker.join_process_group("127.0.0.1", "127.0.0.1", worker.open_port("127.0.0.1"))
    engine = load_vllm_adapter().VLLMRollout(
        config.actor_rollout_ref.model, rollout.model_copy(update={"tensor_model_parallel_size": 1}),
        worker.device, stops, weight_names=[n for n, _ in lm.named_parameters()],
        max_model_len=512, max_num_seqs=8, engines_per_node=1,
    )  # fmt: skip
    return _generate(config, lm, engine)


def _example(config: RunConfig) -> list[Message]:
    """A chat of the run: under its own system prompt, or that of `process_data.py`."""
    chat = rationale_messages("A text about rivers.")
    given = config.data.system_prompt
    return chat if given is None else with_system_prompt(chat, given or None)


def _load(config: RunConfig) -> tuple[Any, list[int]]:
    """The model on the CPU, and the ids that end a response."""
    model = config.actor_rollout_ref.model
    assert model.path is not None
    lm = load_causal_lm(model.path, model.trust_remote_code, model.override_config)
    tokenizer = load_tokenizer(model.path, model.trust_remote_code)
    return lm, stop_token_ids(tokenizer, lm.config, lm.generation_config)


def _generate(config: RunConfig, lm: Any, engine: Rollout) -> str:
    renderer = build_renderer(config)
    (prompt,) = renderer.render([_example(config)])
    start = time.monotonic()
    engine.update_weights(lm.named_parameters())
    engine.wake_up()
    (response,) = finish(engine.generate([prompt.ids], [0.0], 12, [0]))
    text = renderer.tokenizer.decode(response.ids, skip_special_tokens=True)
    return f"{time.monotonic() - start:.1f} s: {text!r}"


def check_folder(config: RunConfig) -> str:
    """The run folder can be written to, at which speed, and has room for the checkpoints."""
    folder = RunFolder(config.run_dir.absolute()).path
    speed, size = _write_speed(folder), _checkpoint_size(config)
    free, keep = shutil.disk_usage(folder).free, config.trainer.max_actor_ckpt_to_keep
    # The next checkpoint is written before the oldest is removed.
    needed = (keep or 0) + 1
    if free < needed * size:
        raise CheckFailed(
            f"{folder} has {free / 2**30:.1f} GiB free and a checkpoint takes {size / 2**30:.1f}; the run needs room "
            f"for {needed} (trainer.max_actor_ckpt_to_keep={keep}). Free some, or set trainer.default_local_dir."
        )
    kept = f"{keep} are kept" if keep else "all are kept (trainer.max_actor_ckpt_to_keep)"
    return f"{speed:.0f} MiB/s; a checkpoint takes {size / 2**30:.2f} GiB, room for {free // size}; {kept}"


def _write_speed(folder: Path) -> float:
    """MiB per second of a file that is written and flushed to the disk."""
    file = folder / ".doctor_write_test"
    block = os.urandom(2**20)
    start = time.monotonic()
    try:
        with file.open("wb") as opened:
            for _ in range(_WRITE_MIB):
                opened.write(block)
            opened.flush()
            os.fsync(opened.fileno())
    finally:
        file.unlink(missing_ok=True)
    return _WRITE_MIB / (time.monotonic() - start)


def _checkpoint_size(config: RunConfig) -> int:
    """Bytes of one checkpoint."""
    lm = build_without_weights(config)
    return checkpoint_size(config, *count_parameters(lm), lm.config.dtype)


CHECKS: dict[str, Callable[[RunConfig], str]] = {
    "versions": check_versions,
    "devices": check_devices,
    "ray": check_ray,
    "all-reduce": check_all_reduce,
    "model": check_model,
    "checkpoints": check_folder,
    "hf": check_hf,
    "vllm": check_vllm,
}


def run_program(config: RunConfig) -> int:
    """Print a line for each check; the exit code."""
    quiet_libraries()
    failed = 0
    for name, passed, text in run_checks(config):
        failed += not passed
        sys.stdout.write(f"{'OK  ' if passed else 'FIX '} {name:<12} {text}\n")
        sys.stdout.flush()
    sys.stdout.write("everything is fine\n" if not failed else f"{failed} of {len(CHECKS)} checks failed\n")
    return int(failed > 0)


def run_checks(config: RunConfig) -> Iterator[tuple[str, bool, str]]:
    """The name of each check, whether it passed, and what was found or what to do."""
    for name, check in CHECKS.items():
        try:
            yield name, True, check(config)
        except (CheckFailed, UserError, CheckpointError, ValueError, RuntimeError, OSError, ImportError) as error:
            # The other checks still run: their results help, and the exit code shows that this one failed.
            kind = "" if isinstance(error, CheckFailed | UserError) else f"{type(error).__name__}: "
            yield name, False, f"{kind}{error}"

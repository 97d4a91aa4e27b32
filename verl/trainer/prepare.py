"""What a run needs before its parts are built: configuration, devices, prompt renderer, Ray.

The training program and the doctor both use it, so the doctor checks exactly what a run would meet.
"""

import logging
import os
import secrets
import signal
from pathlib import Path
from typing import Any

import ray
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from ray._private import ray_constants
from transformers import AutoConfig

from verl.config import RunConfig
from verl.config_checks import build_config
from verl.embedding.prompts import PromptRenderer
from verl.errors import UserError
from verl.single_controller.reaper import Reaper
from verl.trainer.overrides import hydra_overrides, resolve
from verl.utils.tokenizer import load_tokenizer

CONFIG_DIR = Path(__file__).parent / "config"


def compose_config(overrides: list[str], config_name: str = "ppo_trainer", config_path: Path = CONFIG_DIR) -> RunConfig:
    """Compose YAML and overrides with hydra, and check the result.

    Raises:
        UserError: unknown keys, wrong values, missing files and bad combinations, one a line.
    """
    return build_config(resolve(compose_values(overrides, config_name, config_path)))


def compose_values(
    overrides: list[str], config_name: str = "ppo_trainer", config_path: Path = CONFIG_DIR
) -> DictConfig:
    """What hydra composes of YAML and overrides, with `${...}` as written and nothing checked.

    Raises:
        UserError: an override that cannot be read.
        HydraException: there is no such YAML, or a key to be removed does not exist.
    """
    with initialize_config_dir(str(config_path.absolute()), version_base=None):
        try:
            return compose(config_name, hydra_overrides(overrides))
        except OmegaConfBaseException as error:
            raise UserError(str(error)) from error


def sample_roles(train_mode: str, needs_embeddings: bool) -> tuple[str, ...]:
    """The roles of the texts of a sample that get a rationale; the first is the trained one.

    Args:
        needs_embeddings: False = the reward comes from a rule, and there are no anchors.
    """
    if not needs_embeddings:
        return ("positive",)
    return ("positive", "query", "negative") if train_mode == "supervised" else ("positive", "query")


def find_devices(config: RunConfig) -> tuple[str, int]:
    """The device and the number of workers per machine.

    Raises:
        UserError: trainer.device=cuda without a visible GPU, or fewer devices than workers.
    """
    trainer, gpus = config.trainer, torch.cuda.device_count()
    device = ("cuda" if gpus else "cpu") if trainer.device == "auto" else trainer.device
    if device == "cuda" and not gpus:
        raise UserError("trainer.device=cuda but no GPU is visible (CUDA_VISIBLE_DEVICES?); use auto or cpu.")
    available = gpus if device == "cuda" else config.ray_init.num_cpus or os.cpu_count() or 1
    workers = trainer.n_gpus_per_node or (gpus if device == "cuda" and trainer.use_ray else 1)
    if workers > available:
        raise UserError(
            f"trainer.n_gpus_per_node={workers}, but this machine has {available} "
            f"{'visible GPUs' if device == 'cuda' else 'CPUs (each is one worker)'}; set it to {available} or less."
        )
    return device, workers


def check_engine_groups(config: RunConfig, workers_per_node: int) -> None:
    """Raise `UserError` unless tensor_model_parallel_size divides the workers of a machine, and the engine has it."""
    rollout = config.actor_rollout_ref.rollout
    size = rollout.tensor_model_parallel_size
    if size > 1 and rollout.name != "vllm":
        raise UserError(
            f"actor_rollout_ref.rollout.tensor_model_parallel_size={size} needs the engine vllm, and this run "
            f"generates with {rollout.name}; set it to 1."
        )
    if workers_per_node % size:
        divisors = [d for d in range(1, workers_per_node + 1) if workers_per_node % d == 0]
        raise UserError(
            f"actor_rollout_ref.rollout.tensor_model_parallel_size={size} does not divide the {workers_per_node} "
            f"workers of a machine; use one of {', '.join(map(str, divisors))}."
        )


def load_model_config(config: RunConfig) -> Any:
    """The model's config.json with `override_config`.

    Raises:
        OSError: the model has none.
    """
    model = config.actor_rollout_ref.model
    assert model.path is not None
    return AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code, **model.override_config)


def build_renderer(config: RunConfig) -> PromptRenderer:
    """The prompt renderer of the model's tokenizer.

    Raises:
        UserError: prompt and response do not fit the model's context.
        ValueError: no such model, or it has no tokenizer or chat template.
    """
    model, data = config.actor_rollout_ref.model, config.data
    assert model.path is not None
    tokenizer = load_tokenizer(model.path, model.trust_remote_code)
    context = getattr(load_model_config(config).get_text_config(), "max_position_embeddings", None)
    wanted = data.max_prompt_length + data.max_response_length
    if context is not None and wanted > context:
        raise UserError(
            f"data.max_prompt_length={data.max_prompt_length} + data.max_response_length={data.max_response_length} "
            f"= {wanted} tokens, beyond the model's context of {context}; lower one of them by {wanted - context}."
        )
    return PromptRenderer(tokenizer, data.max_prompt_length, data.truncation)


def start_ray(config: RunConfig, world_size: int) -> Reaper | None:
    """Join the cluster at RAY_ADDRESS, or start one on this machine.

    Returns:
        The reaper of a cluster that was started here; keep it as long as the cluster runs.

    Raises:
        UserError: no cluster answers at RAY_ADDRESS, or the run wants several machines without one.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address := os.environ.get("RAY_ADDRESS"):
        _join_ray(address)
        return None
    if config.trainer.nnodes > 1:
        raise UserError(
            f"trainer.nnodes={config.trainer.nnodes} but RAY_ADDRESS is not set; run `ray start --head` on one "
            "machine, `ray start --address=HOST:6379` on the others, and export RAY_ADDRESS=HOST:6379."
        )
    reaper = Reaper()
    _start_local_ray(config.ray_init.num_cpus or max(os.cpu_count() or 1, world_size))
    return reaper


def _join_ray(address: str) -> None:
    try:
        ray.init(logging_level=logging.ERROR)
    except ConnectionError as error:
        raise UserError(
            f"RAY_ADDRESS={address}: {error}. Is `ray start --head` running there, and are RAY_AUTH_MODE and "
            "RAY_AUTH_TOKEN the same as on the head? Without RAY_ADDRESS a cluster is started on this machine."
        ) from error


def _start_local_ray(num_cpus: int) -> None:
    """Start Ray on the loopback address, with SIGTERM blocked in its processes.

    Raises:
        UserError: the folder for temporary files is too long for a socket.

    Ray's processes inherit the mask. A batch system sends SIGTERM to all processes of a job, and the last step can only
    be saved while Ray is running.
    """
    _give_ray_a_token()
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        # Otherwise Ray listens on all interfaces in spite of the loopback address, for clusters of several machines.
        ray_constants.ENABLE_RAY_CLUSTER = False
        ray.init(
            num_cpus=num_cpus, include_dashboard=False, logging_level=logging.ERROR, _node_ip_address="127.0.0.1",
            # No idle worker processes for tasks: a run has no tasks, and they cost memory and time.
            _system_config={"prestart_worker_first_driver": False},
        )  # fmt: skip
    except OSError as error:
        if "AF_UNIX" not in str(error):
            raise
        name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
        raise UserError(
            f"{name}={os.environ.get(name)} is too long for the paths of Ray's sockets; export RAY_TMPDIR=/tmp, or "
            "another folder with a short path."
        ) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _give_ray_a_token() -> None:
    """Where the home folder cannot be written to, in which Ray keeps the token of its processes, one for this run."""
    given = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    home = Path.home()
    kept = (home / ".ray/auth_token").is_file() or os.access(home, os.W_OK)
    if not kept and not any(name in os.environ for name in given):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)

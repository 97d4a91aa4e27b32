"""What a run needs before its parts are built: devices, prompt renderer, Ray.

The training program and the doctor both use it, so the doctor checks exactly what a run would meet.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from verl.config import RunConfig
from verl.config_checks import step_without_policy
from verl.embedding.prompts import PromptRenderer
from verl.errors import UserError
from verl.models.fsdp import shard_group
from verl.models.load import read_model_config
from verl.models.lora import add_adapter
from verl.models.policy import context_of
from verl.single_controller import ray_cluster
from verl.single_controller.reaper import Reaper
from verl.utils.cpus import usable_cpus
from verl.utils.tokenizer import load_tokenizer


def sample_roles(train_mode: str, needs_embeddings: bool, trained_text: str) -> tuple[str, ...]:
    """The roles of the texts of a sample that are embedded; the first is the trained one.

    Args:
        needs_embeddings: False = the reward comes from a rule, and there are no anchors.
        trained_text: positive or query, of a triplet.

    Raises:
        UserError: there is no such text.
    """
    if needs_embeddings and train_mode == "supervised":
        anchors = [role for role in ("positive", "query", "negative") if role != trained_text]
        return (trained_text, *anchors)
    if trained_text != "positive":
        raise UserError(
            f"data.trained_text={trained_text} needs triplets, and a reward manager that embeds queries; leave it out."
        )
    return ("positive", "query") if needs_embeddings else ("positive",)


def anchors_per_sample(roles: Sequence[str], negatives_per_query: int) -> int:
    """Most rows of a sample that are not trained."""
    return len(roles) - 1 + ("negative" in roles) * (negatives_per_query - 1)


def find_devices(config: RunConfig) -> tuple[str, int]:
    """The device and the number of workers per machine; of the cluster at RAY_ADDRESS, if there is one.

    Raises:
        UserError: trainer.device=cuda without a visible GPU, fewer devices than workers, or no cluster answers.
    """
    trainer = config.trainer
    cluster = trainer.use_ray and ray_cluster.given_address() is not None
    gpus, cpus = _devices_of_cluster(trainer.nnodes) if cluster else _devices_here(config)
    where = "a machine of the cluster" if cluster else "this machine"
    device = ("cuda" if gpus else "cpu") if trainer.device == "auto" else trainer.device
    if device == "cuda" and not gpus:
        raise UserError(
            "trainer.device=cuda but no GPU is visible (CUDA_VISIBLE_DEVICES?); use auto or cpu."
            if not cluster
            else f"trainer.device=cuda but the cluster at RAY_ADDRESS has no {trainer.nnodes} machine(s) with a GPU "
            "(trainer.nnodes); start Ray on those that have one (ray start --address=HOST:PORT)."
        )
    available = gpus if device == "cuda" else cpus
    workers = trainer.n_gpus_per_node or (gpus if device == "cuda" and trainer.use_ray else 1)
    if workers > available:
        raise UserError(
            f"trainer.n_gpus_per_node={workers}, but {where} has {available} "
            f"{'visible GPUs' if device == 'cuda' else 'CPUs (each is one worker)'}; set it to {available} or less."
        )
    given = config.ray_init.num_cpus
    if trainer.use_ray and not cluster and given is not None and workers > given:
        raise UserError(
            f"ray_init.num_cpus={given} is less than the {workers} workers, each of which takes one; leave it out, or "
            f"set it to {workers} or more."
        )
    return device, workers


def _devices_here(config: RunConfig) -> tuple[int, int]:
    """GPUs and CPUs of this machine."""
    return torch.cuda.device_count(), config.ray_init.num_cpus or usable_cpus()


def _devices_of_cluster(nnodes: int) -> tuple[int, int]:
    """GPUs and CPUs that each of the `nnodes` best machines has; the driver's own machine may have none."""
    ray_cluster.join()
    resources = [machine["Resources"] for machine in ray_cluster.machines()]
    if nnodes > len(resources):
        raise UserError(
            f"trainer.nnodes={nnodes}, but the cluster at RAY_ADDRESS has {len(resources)} machine(s); add machines "
            "(ray start --address=HOST:PORT), or lower it."
        )
    gpus, cpus = (
        sorted((int(found.get(kind, 0)) for found in resources), reverse=True)[nnodes - 1] for kind in ("GPU", "CPU")
    )
    return gpus, cpus


def check_engine_groups(config: RunConfig, workers_per_node: int) -> None:
    """Raise `UserError` unless tensor_model_parallel_size divides the workers of a machine, and the engine has it."""
    rollout = config.actor_rollout_ref.rollout
    size = rollout.tensor_model_parallel_size
    if not config.data.think:
        return
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


def check_shard_groups(config: RunConfig, world_size: int) -> None:
    """Raise `UserError` unless the models can be sharded over the workers. The untrained one may be loaded hours later,
    for a diagnosis."""
    section = config.actor_rollout_ref
    shard_group(section.actor.fsdp_config, world_size, "actor")
    if config.scores_by_untrained:
        shard_group(section.ref.fsdp_config, world_size, "ref")


def build_without_weights(config: RunConfig) -> Any:
    """The model that will be trained, with its adapters if it gets some, on the meta device.

    Raises:
        UserError: its adapters cannot be built.
    """
    model = config.actor_rollout_ref.model
    found = read_model_config(model)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(found, trust_remote_code=model.trust_remote_code)
    lm.config.dtype = found.dtype
    if model.trains_adapter:
        add_adapter(lm, model, config.actor_rollout_ref.rollout.seed)
    return lm


def check_embeddings(config: RunConfig, needs_embeddings: bool) -> None:
    """Raise `UserError` where a step would train by embeddings alone, and the reward manager does not ask for them."""
    found = None if needs_embeddings else step_without_policy(config)
    if found:
        step, setting = found
        raise UserError(
            f"{setting}: step {step} follows no policy gradient and trains by a loss on the embeddings alone, which "
            f"reward_model.reward_manager={config.reward_model.reward_manager} does not ask for (needs_embeddings). "
            "Leave the setting out, or use a reward manager with such a loss."
        )


def check_save_best(config: RunConfig, needs_embeddings: bool) -> None:
    """Raise `UserError` where trainer.save_best is a figure of embeddings and there are none, or the other way."""
    name = config.trainer.save_best
    if name is not None and (name == "val/reward") == needs_embeddings:
        reported = "figures of embeddings, and no val/reward" if needs_embeddings else "val/reward alone"
        raise UserError(
            f"trainer.save_best={name} is not a metric of this run's validation: with "
            f"reward_model.reward_manager={config.reward_model.reward_manager} (needs_embeddings={needs_embeddings}) "
            f"it reports {reported}."
        )


def check_matryoshka_dims(config: RunConfig, dims: list[int] | None) -> None:
    """Raise `UserError` unless the model's embeddings have as many dimensions as `dims` wants to compare."""
    if dims is None:
        return
    hidden = read_model_config(config.actor_rollout_ref.model).get_text_config().hidden_size
    if max(dims) > hidden:
        raise UserError(
            f"reward_model.reward_kwargs.matryoshka_dims={dims}: {max(dims)} is more than the {hidden} dimensions of "
            f"{config.actor_rollout_ref.model.path}; lower it."
        )


def build_renderer(config: RunConfig) -> PromptRenderer:
    """The prompt renderer of the model's tokenizer.

    Raises:
        UserError: prompt and response do not fit the model's context, or data.template_date has no effect.
        ValueError: no such model, or it has no tokenizer or chat template.
    """
    model, data = config.actor_rollout_ref.model, config.data
    assert model.path is not None
    tokenizer = load_tokenizer(model.path, model.trust_remote_code)
    context = context_of(read_model_config(model))
    wanted = config.longest_row
    if context is not None and wanted > context:
        response = f" + data.max_response_length={data.max_response_length} = {wanted}" if data.think else ""
        raise UserError(
            f"data.max_prompt_length={data.max_prompt_length}{response} tokens, beyond the model's context of "
            f"{context}; lower {'one of them' if data.think else 'it'} by {wanted - context}."
        )
    renderer = PromptRenderer(
        tokenizer, data.max_prompt_length, data.truncation,
        system_prompt_in=data.system_prompt_in, template_date=data.template_date,
    )  # fmt: skip
    if data.template_date and not renderer.template_date:
        raise UserError(
            f"data.template_date={data.template_date} has no effect: the chat template of {model.path} shows no date; "
            "leave it out."
        )
    return renderer


def start_ray(config: RunConfig, world_size: int) -> Reaper | None:
    """Join the cluster at RAY_ADDRESS, or start one on this machine.

    Returns:
        The reaper of a cluster that was started here; keep it as long as the cluster runs.

    Raises:
        UserError: no cluster answers at RAY_ADDRESS, or the run wants several machines without one.
    """
    if ray_cluster.given_address():
        ray_cluster.join()
        return None
    if config.trainer.nnodes > 1:
        raise UserError(
            f"trainer.nnodes={config.trainer.nnodes} but RAY_ADDRESS is not set; run `ray start --head` on one "
            "machine, `ray start --address=HOST:6379` on the others, and export RAY_ADDRESS=HOST:6379."
        )
    return ray_cluster.start(config.ray_init.num_cpus or max(usable_cpus(), world_size))

"""Everything that a training run starts from, built and checked before Ray or a device is touched."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from verl.algorithm.advantage import get_adv_estimator_fn
from verl.batch_plan import BatchPlan
from verl.checkpoint.resume import ResumePoint, find_resume
from verl.checkpoint.run_folder import CheckpointError, RunFolder
from verl.config import RunConfig, file_list
from verl.data.collator import PromptCollator, without_repeats
from verl.data.dataset import PromptDataset, text_settings
from verl.embedding.chat_template import system_prompt_of
from verl.embedding.prompts import PromptRenderer
from verl.embedding.settings import EmbedderSettings
from verl.errors import as_user_error
from verl.trainer.ppo.probe import Probe, choose_probe, diagnosed_steps, wanted_texts
from verl.trainer.ppo.validation import Validation
from verl.trainer.prepare import (
    anchors_per_sample,
    build_renderer,
    build_without_weights,
    check_embeddings,
    check_engine_groups,
    check_matryoshka_dims,
    check_save_best,
    check_shard_groups,
    find_devices,
    sample_roles,
)
from verl.trainer.trackers import check_packages
from verl.unread_settings import start_notes
from verl.workers.reward_manager import load_reward_manager
from verl.workers.reward_manager.base import RewardManager
from verl.workers.rollout.choose import choose_engine


@dataclass(frozen=True)
class TrainingRun:
    config: RunConfig
    """With the engine's name resolved, where there is an engine."""
    plan: BatchPlan
    dataset: PromptDataset
    collate: PromptCollator
    validation: Validation | None
    """None when the config does not validate."""
    reward_manager: RewardManager
    probe: Probe | None
    """What a new run would diagnose; None when it does not diagnose."""
    folder: RunFolder
    """Owned by this run."""
    folder_warning: str | None
    resume: ResumePoint | None
    """The checkpoint to resume from; None for a new run."""
    device: str
    """cuda or cpu."""
    workers_per_node: int
    engine: str
    """Which rollout engine, and why, in words."""

    def lines(self) -> list[tuple[str, str]]:
        """What the run will do, as (what, how much) lines."""
        lines = [*self.plan.lines(), *self._negative_lines(), *self._prompt_lines(), *self.dataset.length_lines()]
        lines.append(("rollout engine", self.engine))
        lines += self._probe_lines()
        if self.folder_warning:
            lines.append(("run folder", self.folder_warning))
        return [*lines, *start_notes(self.config, self.device)]

    def _negative_lines(self) -> Iterator[tuple[str, str]]:
        if (count := self.config.data.negatives_per_query) > 1:
            yield "negatives per sample", f"up to {count}, as many as its data has (data.negatives_per_query)"

    def _probe_lines(self) -> Iterator[tuple[str, str]]:
        if self.probe is not None:
            steps = diagnosed_steps(self.config, self.plan)
            yield "diagnoses", f"{len(steps)} of {len(self.probe.texts)} texts of {self.probe.source}"
        elif self.config.diagnoses:
            yield "diagnoses", "none: the rewards need no embeddings"

    def _prompt_lines(self) -> Iterator[tuple[str, str]]:
        settings, count = self.collate.settings, self.dataset.num_system_prompts
        source = "of the rows" if self.config.data.system_prompt is None else "data.system_prompt"
        yield "system prompt", f"{settings.prompt_line()} ({source})"
        if count > 1:
            yield "", f"WARNING: the rows have {count} different ones, and the checkpoint will embed with this one,"
            yield "", "the first row's; data.system_prompt gives all rows the same"
        if settings.template_date:
            yield "date in the prompts", f"{settings.template_date} (data.template_date)"


@contextmanager
def prepare_run(config: RunConfig) -> Iterator[TrainingRun]:
    """Build the parts of a run, check the config against data, model and machine, and own the run folder meanwhile.

    Raises:
        UserError: something given cannot work.
    """
    check_packages(config.trainer.logger)
    device, workers_per_node = find_devices(config)
    engine = "none: data.think=False"
    if config.data.think:
        name, why = choose_engine(config.actor_rollout_ref.rollout.name)
        config, engine = config.with_engine(name), f"{name}: {why}"
    check_engine_groups(config, workers_per_node)
    check_shard_groups(config, workers_per_node * config.trainer.nnodes)
    with as_user_error(ValueError):
        reward_manager = load_reward_manager(config)
        # After the user's file, which may register one.
        get_adv_estimator_fn(config.algorithm.adv_estimator)
        check_embeddings(config, reward_manager.needs_embeddings)
        check_save_best(config, reward_manager.needs_embeddings)
        renderer = build_renderer(config)
        roles = sample_roles(config.train_mode, reward_manager.needs_embeddings, config.data.trained_text)
        dataset = PromptDataset(file_list(config.data.train_files), config.data, roles, renderer)
        check_matryoshka_dims(config, reward_manager.matryoshka_dims)
        if config.actor_rollout_ref.model.trains_adapter:
            build_without_weights(config)
        collate = build_collate(config, dataset, renderer, reward_manager)
        held_out = load_held_out(config, roles, renderer)
        validation = None
        if config.validates:
            assert held_out is not None
            validation = Validation(config, held_out, collate, reward_manager.needs_embeddings)
        # A wrong template or an empty text in the first sample is found here rather than after the workers' start.
        collate([dataset[0]])
    num_anchors = anchors_per_sample(roles, config.data.negatives_per_query)
    plan = BatchPlan.from_config(config, len(dataset), num_anchors, workers_per_node * config.trainer.nnodes)
    probe = draw_probe(config, plan, dataset, held_out) if reward_manager.needs_embeddings else None
    with as_user_error(CheckpointError):
        folder = RunFolder(config.run_dir.absolute())
    with folder.owned() as warning:
        with as_user_error(CheckpointError):
            resume = find_resume(config, folder, dataset.sha256, len(dataset))
        yield TrainingRun(
            config, plan, dataset, collate, validation, reward_manager, probe, folder, warning, resume, device,
            workers_per_node, engine,
        )  # fmt: skip


def load_held_out(config: RunConfig, roles: Sequence[str], renderer: PromptRenderer) -> PromptDataset | None:
    """The samples of data.val_files, where validation or a diagnosis takes some.

    Raises:
        UserError: see `PromptDataset`.
    """
    if not config.validates and not (config.diagnoses and has_val_files(config)):
        return None
    # Figures compare a query with one negative.
    one_negative = config.data.model_copy(update={"negatives_per_query": 1})
    return PromptDataset(file_list(config.data.val_files), one_negative, roles, renderer)


def draw_probe(
    config: RunConfig, plan: BatchPlan, dataset: PromptDataset, held_out: PromptDataset | None
) -> Probe | None:
    """The texts to diagnose, of the held-out file where there is one; None when the config does not diagnose.

    Raises:
        UserError: the file does not have two samples of different texts.
    """
    if not config.diagnoses:
        return None
    key = "data.train_files" if held_out is None else "data.val_files"
    files = config.data.train_files if held_out is None else config.data.val_files
    samples = held_out or dataset
    num_texts = wanted_texts(config, plan, texts_per_sample=len(without_repeats(samples[0])["chats"]))
    return choose_probe(
        samples, f"{key}={','.join(file_list(files))}", num_texts, config.actor_rollout_ref.rollout.seed
    )


def has_val_files(config: RunConfig) -> bool:
    """Whether the files of data.val_files exist; without validation they need not."""
    files = file_list(config.data.val_files)
    return bool(files) and all(Path(name).is_file() for name in files)


def build_collate(
    config: RunConfig, dataset: PromptDataset, renderer: PromptRenderer, reward_manager: RewardManager
) -> PromptCollator:
    """The collator, with the settings by which training embeds; checkpoints hand them to the encoder."""
    data, rollout = config.data, config.actor_rollout_ref.rollout
    settings = EmbedderSettings(
        **text_settings(data),
        system_prompt=system_prompt_of(dataset[0]["chats"]["positive"]),
        system_prompt_in=data.system_prompt_in,
        template_date=renderer.template_date,
        pool_system_prompt=not reward_manager.exclude_system_prompt,
        text_share=reward_manager.text_share,
        no_rationale_weight=reward_manager.no_rationale_weight,
        matryoshka_dims=reward_manager.matryoshka_dims,
        max_prompt_length=data.max_prompt_length,
        # An encoder that stops at a long text is of no use.
        truncation="right" if data.truncation == "error" else data.truncation,
        temperature=rollout.temperature,
        base_model=config.actor_rollout_ref.model.path,
    )
    return PromptCollator(renderer, settings, data.reward_fn_key, data.trained_text)

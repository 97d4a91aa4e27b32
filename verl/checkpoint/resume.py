"""Which checkpoint a run resumes from, and whether it is a checkpoint of the same run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl.checkpoint.run_folder import RunFolder, find_fault, read_state, step_folder
from verl.config import RunConfig
from verl.config_fields import walk_fields
from verl.errors import UserError

# With another value of one of these it is another run: other samples, other rows, or another model.
_SAME_RUN = (
    "actor_rollout_ref.model.path",
    "actor_rollout_ref.model.override_config",
    "actor_rollout_ref.model.lora_rank",
    "actor_rollout_ref.model.lora_alpha",
    "actor_rollout_ref.model.target_modules",
    "actor_rollout_ref.model.lora_adapter_path",
    "actor_rollout_ref.rollout.n",
    "data.train_mode",
    "data.train_batch_size",
    "data.contrastive_batch_size",
    "data.prompt_key",
    "data.system_prompt",
    "data.system_prompt_in",
    "data.template_date",
    "data.trained_text",
    "data.template",
    "data.instructions",
    "data.think",
    "data.query.template",
    "data.query.think",
    "data.document.template",
    "data.document.think",
    "data.filter_overlong_prompts",
    "data.negatives_per_query",
    "data.shuffle",
    "data.seed",
)
# What null stands for in some of these: always the same, or the value of another setting.
_NULL_IS = {"data.train_mode": RunConfig().train_mode}
_NULL_IS_AS = {
    "data.contrastive_batch_size": "data.train_batch_size",
    "data.val_batch_size": "data.train_batch_size",
    "data.query.template": "data.template",
    "data.document.template": "data.template",
}
# These say how and from where to resume, not what is trained.
_NOT_COMPARED = (
    "trainer.resume_mode",
    "trainer.resume_from_path",
    "trainer.resume_force",
    "trainer.val_before_train",
)
# What a run has found out for itself, and the settings that it holds for: with another value of one it starts anew.
_HOLDS_FOR = {
    "kl_coef": ("algorithm.kl_ctrl.type", "algorithm.kl_ctrl.kl_coef"),
    "first_probs_diff": ("actor_rollout_ref.rollout.name", "actor_rollout_ref.rollout.dtype"),
}


@dataclass(frozen=True)
class ResumePoint:
    folder: Path
    state: dict[str, Any]
    """Its trainer_state.json, without what does not hold under the present settings."""
    notes: list[str]
    """For the log: checkpoints that were skipped, and settings that changed."""


def find_resume(config: RunConfig, run: RunFolder, data_sha256: str, num_samples: int) -> ResumePoint | None:
    """The checkpoint to resume from, or None.

    Args:
        data_sha256: of the training files' bytes.
        num_samples: that are trained on, without those that are filtered.

    Raises:
        UserError: trainer.resume_from_path is not a complete checkpoint; or the checkpoint is of another run.
        CheckpointError: there are checkpoints, and none is complete.
    """
    mode = config.trainer.resume_mode
    if mode == "disable":
        return None
    if mode == "auto":
        folder, skipped = run.newest_whole()
        if folder is None:
            return None
    else:
        folder, skipped = _given_folder(config), []
    state = read_state(folder)
    changed = _changes(state["config"], config.model_dump(mode="json"))
    data = _data_changes(state, data_sha256, num_samples)
    notes = [f"skipped: {reason}" for reason in skipped] + _compare(changed, data, config, folder)
    held = {name: value for name, value in state.items() if changed.keys().isdisjoint(_HOLDS_FOR.get(name, ()))}
    return ResumePoint(folder, held, notes)


def _given_folder(config: RunConfig) -> Path:
    assert config.trainer.resume_from_path is not None
    folder = Path(config.trainer.resume_from_path).absolute()
    if fault := find_fault(folder):
        raise UserError(
            f"trainer.resume_from_path={config.trainer.resume_from_path}: {fault}; give a complete global_step_N "
            f"folder, such as {step_folder(config.run_dir, 50)}."
        )
    return folder


def _changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """A line for each setting that means another value than before, by its dotted key; a mapping is one value."""
    lines = {}
    for key, _ in walk_fields(RunConfig):
        # A key that an earlier version did not have was not changed by anybody.
        if key in _NOT_COMPARED or not (old := _find(before, key)):
            continue
        (was,), (value,) = old, _find(now, key)
        if was != value and _meaning(before, key) != _meaning(now, key):
            lines[key] = f"{key}: {was!r} before, {value!r} now"
    return lines


def _find(values: Any, key: str) -> tuple[Any, ...]:
    """The value of a dotted key in nested mappings, in a tuple that is empty where there is none."""
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return ()
        values = values[part]
    return (values,)


def _meaning(values: dict[str, Any], key: str) -> tuple[Any, ...]:
    """As `_find`, with what null stands for in place of null."""
    found = _find(values, key)
    if found != (None,):
        return found
    return _find(values, _NULL_IS_AS[key]) if key in _NULL_IS_AS else (_NULL_IS.get(key),)


def _data_changes(state: dict[str, Any], data_sha256: str, num_samples: int) -> list[str]:
    """A line for what changed of the training data."""
    if state["data_sha256"] != data_sha256:
        return [f"data.train_files: other contents (sha256 {state['data_sha256'][:8]}, {data_sha256[:8]} now)"]
    # Steps of earlier versions do not say how many.
    if (before := state.get("num_samples", num_samples)) != num_samples:
        return [
            f"data.train_files: {before} samples are left of it, {num_samples} now (data.max_prompt_length, "
            "data.filter_overlong_prompts, or the prompt)"
        ]
    return []


def _compare(changed: dict[str, str], data: list[str], config: RunConfig, folder: Path) -> list[str]:
    """A line for every setting that changed since the checkpoint was written.

    Args:
        data: a line for what changed of the training data.

    Raises:
        UserError: with one of the changes it is another run, and trainer.resume_force is not set.
    """
    other_run = [
        *(line for key, line in changed.items() if any(key == one or key.startswith(f"{one}.") for one in _SAME_RUN)),
        *data,
    ]
    if other_run and not config.trainer.resume_force:
        place = "default_local_dir" if config.trainer.default_local_dir else "experiment_name"
        raise UserError(
            f"{folder} is of another run:\n  " + "\n  ".join(other_run) + f"\nGive the same values; or another "
            f"trainer.{place} to start a new run; or trainer.resume_force=True to resume with these."
        )
    lines = [line for line in changed.values() if line not in other_run]
    return [f"changed: {line}" for line in lines] + [f"FORCED: {line}" for line in other_run]

"""The model card, README.md of a model folder: how it was made, how to use it, and scores as they come in."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from verl.config import RunConfig, file_list
from verl.embedding.settings import EmbedderSettings
from verl.step_schedule import StepSchedule
from verl.utils.files import replace_file
from verl.utils.hub_names import is_hub_name

FILE_NAME = "README.md"
_SCORES = "## Scores"
_NO_SCORES = "Not evaluated yet (`bash eval.sh`)."
_BAR = "&#124;"
_END = "<!-- end of scores -->"
_SETTINGS, _TRAINING = "## How it embeds", "## How it was trained"


def write_checkpoint_card(
    folder: Path, config: RunConfig, settings: EmbedderSettings, schedule: StepSchedule, step: int,
    versions: Mapping[str, str],
) -> None:  # fmt: skip
    """Write the card of the model folder of step `step`."""
    name = f"{config.trainer.experiment_name}, step {step}"
    write_card(folder, name, settings, _training(config, schedule, step), training_command(), versions)


def training_command() -> str:
    """The command that started this process, a training."""
    return shlex.join(["python3", "-m", "verl.trainer.main_ppo", *sys.argv[1:]])


def write_card(
    folder: Path, name: str, settings: EmbedderSettings, training: Mapping[str, Any], command: str,
    versions: Mapping[str, str],
) -> None:  # fmt: skip
    """Write the card of a checkpoint.

    Args:
        settings: how it embeds.
        training: what it was trained on and for, by name.
        command: that trained it.
    """
    base, thinks = settings.base_model, settings.think
    call = 'vectors, rationales = encoder.encode(["a text"], return_rationales=True)'
    how = (
        "by reinforcement learning to embed text through the rationales it writes (GRACE, arXiv 2510.04506)"
        if thinks else "by a loss on its vectors to embed text, without rationales"
    )  # fmt: skip
    front = ModelCardData(
        library_name="transformers",
        pipeline_tag="sentence-similarity",
        # A hub takes hub names alone here.
        base_model=base if base and is_hub_name(base) else None,
        tags=["text-embedding", *(["rationales", "grpo"] if thinks else [])],
    )
    text = [
        f"# {name}", "",
        f"{base or 'A language model'}, trained {how}. It still generates text like any causal language model.", "",
        "```python", "from verl import GraceEncoder", "",
        'encoder = GraceEncoder.from_pretrained("this folder")',
        call if thinks else 'vectors = encoder.encode(["a text"])', "```", "",
        _SCORES, "", _NO_SCORES, "", _END, "",
        _SETTINGS, "", *_table(settings.model_dump()), "",
        _TRAINING, "", *_table(training), "",
        "```bash", command, "```", "",
        "Versions: " + ", ".join(f"{package} {version}" for package, version in versions.items()) + ".", "",
    ]  # fmt: skip
    (folder / FILE_NAME).write_text(with_front_matter(front, "\n".join(text)))


def with_front_matter(front: ModelCardData, text: str) -> str:
    """A card: what the hub reads of it, and the text."""
    return f"---\n{front.to_yaml()}\n---\n\n{text}"


def put_scores(folder: Path, title: str, lines: Sequence[str]) -> bool:
    """Put a table of scores under `title` into a card, in place of an earlier one of that title.

    Returns:
        False where there is no card of this project.
    """
    file = folder / FILE_NAME
    text = file.read_text() if file.is_file() else ""
    if _SCORES not in text or _END not in text:
        return False
    head, _, rest = text.partition(f"{_SCORES}\n")
    scores, _, tail = rest.partition(_END)
    sections = {part.partition("\n")[0]: part for part in scores.split("### ")[1:]}
    sections[title] = "\n".join([title, "", *lines, ""])
    kept = "".join(f"### {section.rstrip()}\n\n" for section in sections.values())
    replace_file(file, f"{head}{_SCORES}\n\n{kept}{_END}{tail}")
    return True


def put_settings(folder: Path, settings: EmbedderSettings) -> None:
    """Bring the table of settings in a card up to date; a folder without a card of this project is left alone."""
    file = folder / FILE_NAME
    text = file.read_text() if file.is_file() else ""
    if _SETTINGS not in text or _TRAINING not in text:
        return
    head, _, rest = text.partition(f"{_SETTINGS}\n")
    table = "\n".join(_table(settings.model_dump()))
    replace_file(file, f"{head}{_SETTINGS}\n\n{table}\n\n{_TRAINING}{rest.partition(_TRAINING)[2]}")


def _table(values: Mapping[str, Any]) -> list[str]:
    rows = ["| | |", "|---|---|"]
    for name, value in values.items():
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        rows.append(f"| {name} | {shown.replace('|', _BAR)} |")
    return rows


def _steps(schedule: StepSchedule, step: int, rationales: int) -> str:
    """How many steps of which kind the first `step` steps are."""
    writing = schedule.steps_with_rationales(step)
    without = step - writing
    parts = [f"{writing} of {schedule.samples} samples x {rationales} rationales"] if writing else []
    parts += [f"{without} of {schedule.contrastive_samples} samples without rationales"] if without else []
    return ", ".join(parts)


def _training(config: RunConfig, schedule: StepSchedule, step: int) -> dict[str, Any]:
    """What a reader of the weights wants to know of the run, by name."""
    data, section, algorithm = config.data, config.actor_rollout_ref, config.algorithm
    rationales = (
        f"{section.rollout.name}, at most {data.max_response_length} tokens, temperature "
        f"{section.rollout.temperature:g} (anchors {section.rollout.anchor_temperature:g})"
    )
    reward = config.reward_model
    return {
        "data": f"{config.train_mode}, {schedule.num_samples:,} samples of {', '.join(file_list(data.train_files))}",
        "steps": _steps(schedule, step, section.rollout.n),
        "reward": f"{reward.reward_manager} {dict(reward.reward_kwargs)}",
        "advantage": f"{algorithm.adv_estimator}, divided by the group's standard deviation: "
        f"{algorithm.norm_adv_by_std_in_grpo}",
        "optimizer": f"AdamW, learning rate {section.actor.optim.lr:g}, mini-batches of "
        f"{section.actor.ppo_mini_batch_size} samples",
        "rationales": rationales if data.think else "none",
        "seeds": f"data {data.seed}, rollout {section.rollout.seed}",
    }

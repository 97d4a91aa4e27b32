"""The reward managers, and loading one by its config."""

import importlib.util
import sys
from functools import partial
from pathlib import Path
from typing import Any

from verl.config import RunConfig
from verl.errors import UserError
from verl.workers.reward_manager.base import RewardManager
from verl.workers.reward_manager.checked import CheckedRewardManager
from verl.workers.reward_manager.hidden import HiddenRewardManager
from verl.workers.reward_manager.naive import NaiveRewardManager, default_compute_score

REWARD_MANAGERS: dict[str, Any] = {"hidden": HiddenRewardManager, "naive": NaiveRewardManager}


def load_reward_manager(config: RunConfig) -> RewardManager:
    """Build the reward manager of a run; what it returns is checked.

    Raises:
        UserError: unknown name, a file or a name in it that is not there, or arguments it does not take.
    """
    name, kwargs = config.reward_model.reward_manager, dict(config.reward_model.reward_kwargs)
    if name == "naive":
        kwargs["compute_score"] = _score_function(config)
    if name in REWARD_MANAGERS:
        manager_class = REWARD_MANAGERS[name]
    elif ":" in name:
        path, class_name = name.rsplit(":", 1)
        manager_class = load_from_file(path, class_name, key="reward_model.reward_manager")
    else:
        raise UserError(
            f"reward_model.reward_manager={name} is unknown; known: {', '.join(REWARD_MANAGERS)}, "
            "or path/to/file.py:ClassName for your own."
        )
    try:
        manager = manager_class(**kwargs)
    except TypeError as error:
        raise UserError(f"reward_model.reward_kwargs do not fit {name}: {error}") from error
    for attribute in ("needs_embeddings", "exclude_system_prompt"):
        if not hasattr(manager, attribute):
            raise UserError(
                f"reward_model.reward_manager={name} lacks the attribute {attribute}; see examples/custom_reward.py."
            )
    return CheckedRewardManager(manager, name)


def load_from_file(path: str, name: str, key: str) -> Any:
    """The object `name` of the Python file `path`; `key` is the setting to name in an error."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{key}: the file {path!r} does not exist.")
    spec = importlib.util.spec_from_file_location(f"user_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name while it is being executed.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise UserError(f"{key}: {path!r} has no {name!r}.")
    return getattr(module, name)


def _score_function(config: RunConfig) -> Any:
    custom = config.custom_reward_function
    if custom.path is None:
        return default_compute_score
    function = load_from_file(custom.path, custom.name, key="custom_reward_function.path")
    return partial(function, **custom.reward_kwargs)

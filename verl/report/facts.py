"""What was run: the facts of each run, its settings that are not the defaults, and the versions it ran with."""

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

from verl.config import DataConfig, HiddenRewardConfig, RunConfig, file_list
from verl.config_fields import walk_fields
from verl.report.read import Run
from verl.verl_keys import ONLY_VALUES

UNKNOWN = "–"
"""Of what is not set, or not known."""
REWARD_KWARGS = "reward_model.reward_kwargs"
# Where a run's files lie differs between any two runs and says nothing about them.
_NAMES = ("trainer.default_local_dir", "trainer.experiment_name", "trainer.project_name")


def what_was_run(runs: Sequence[Run]) -> dict[str, Any]:
    """The tables of the section, a column for each run."""
    defaults = default_settings()
    settings = [flat_settings(run) for run in runs]
    rows = [
        {"name": key, "default": as_text(defaults.get(key)), "cells": [as_text(s.get(key)) for s in settings]}
        for key in all_keys(settings)
        if key not in _NAMES
    ]
    versions = [run.record.get("versions") or {} for run in runs]
    return {
        "facts": [{"name": name, "cells": cells} for name, cells in _facts(runs)],
        "settings": [row for row in rows if any(cell not in (row["default"], UNKNOWN) for cell in row["cells"])],
        "versions": [{"name": key, "cells": [v.get(key, UNKNOWN) for v in versions]} for key in all_keys(versions)],
        "commands": [run.record.get("command") for run in runs],
    }


def default_settings() -> dict[str, Any]:
    """Every key with its default; of the reward manager's arguments, those of `hidden`.

    Earlier versions recorded keys that can have one value alone.
    """
    defaults = ONLY_VALUES | {key: field.default for key, field in walk_fields(RunConfig)}
    return defaults | {f"{REWARD_KWARGS}.{key}": field.default for key, field in walk_fields(HiddenRewardConfig)}


def flat_settings(run: Run) -> dict[str, Any]:
    """The run's settings by dotted key, with the defaults of what its reward manager was not given; {} if unknown."""
    found = dict(_flat(run.config, dict(walk_fields(RunConfig)), ""))
    given = found.pop(REWARD_KWARGS, {})
    if found.get("reward_model.reward_manager") == "hidden":
        given = {key: field.default for key, field in walk_fields(HiddenRewardConfig)} | given
    return found | {f"{REWARD_KWARGS}.{key}": value for key, value in given.items()}


def _flat(section: Mapping[str, Any], fields: Container[str], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        key = prefix + name
        if isinstance(value, Mapping) and key not in fields:
            yield from _flat(value, fields, f"{key}.")
        else:
            yield key, value


def all_keys(tables: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys of all tables, in the order in which they first come."""
    return list(dict.fromkeys(key for table in tables for key in table))


def as_text(value: Any) -> str:
    """A setting as it is written on a command line."""
    if value is None:
        return UNKNOWN
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _facts(runs: Sequence[Run]) -> Iterator[tuple[str, list[str]]]:
    yield "folder", [str(run.folder) for run in runs]
    yield "model", [as_text(run.setting("actor_rollout_ref.model.path")) for run in runs]
    yield "training data", [_training_data(run) for run in runs]
    yield "a step", [_step(run) for run in runs]
    yield "steps done", [progress(run) for run in runs]
    yield "time in steps", [_duration(run) for run in runs]
    if any(run.record.get("started") for run in runs):
        yield "last started", [as_text(run.record.get("started")) for run in runs]


def progress(run: Run) -> str:
    total = run.record.get("total_steps")
    return f"{run.last_step:,} of {total:,}" if total else f"{run.last_step:,}"


def _training_data(run: Run) -> str:
    files = run.setting("data.train_files")
    mode = run.setting("data.train_mode") or DataConfig().mode
    return f"{', '.join(file_list(files))} ({mode})" if files else UNKNOWN


def _step(run: Run) -> str:
    samples, rationales = run.setting("data.train_batch_size"), run.setting("actor_rollout_ref.rollout.n")
    if samples and run.setting("data.think") is False:
        return f"{samples} samples"
    return f"{samples} samples × {rationales} rationales" if samples and rationales else UNKNOWN


def _duration(run: Run) -> str:
    series = run.series.get("time/step_s")
    return duration(float(series.values.sum())) if series else UNKNOWN


def duration(seconds: float) -> str:
    """Seconds in words, of two units at most."""
    minutes, hours = seconds / 60, seconds / 3600
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{minutes:.1f} min" if minutes < 120 else f"{hours:.1f} h"

"""The scores that may be published with a model: mteb's tasks, of these very weights, by the model's own settings.

`eval_mteb.py` keeps them as mteb does, in a folder for each model, revision and experiment (ours: all settings):

    <folder>/model_meta.json    the revision, which is the beginning of the weights' hash, and the settings
    <folder>/<Task>.json        a result
    <folder>/run_settings.jsonl with what versions each was made

mteb is imported where there are scores, and not needed without any.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple, get_args

from huggingface_hub import EvalResult, ModelCardData

from verl.embedding.centre import Centre
from verl.embedding.prompts import PromptRenderer
from verl.embedding.settings import NO_MIX, EmbedderSettings
from verl.errors import UserError
from verl.evaluation.records import revision_of
from verl.prompt_options import DEFAULT_DATE
from verl.text_roles import ROLES, TEXT, Role

_META, _RUNS = "model_meta.json", "run_settings.jsonl"
_PROMPT = {
    "system_prompt", "system_prompt_in", "max_prompt_length", "truncation", "pooling", "span", "pool_system_prompt",
}  # fmt: skip


class Own(NamedTuple):
    """What a model's folder says of how it embeds."""

    settings: EmbedderSettings
    centre: Centre | None
    tokenizer_hash: str

    @classmethod
    def read(cls, folder: Path, tokenizer: Any) -> "Own":
        """Of the folder whose tokenizer is `tokenizer`.

        Raises:
            UserError: its settings or its centre cannot be read.
        """
        settings = EmbedderSettings.read(folder)
        centre = Centre.read(folder, settings) if settings.centre else None
        renderer = PromptRenderer(
            tokenizer, system_prompt_in=settings.system_prompt_in, template_date=settings.template_date
        )
        return cls(settings, centre, renderer.fingerprint())


class NoScoresError(UserError):
    """There are no scores that may be published; the message says what there is."""


@dataclass(frozen=True)
class Scores:
    """Results of one model by one set of options."""

    folder: Path
    entries: list[EvalResult]
    """Of a card's model-index; one for each split and subset of each task, in percent."""
    tasks: list[str] = field(default_factory=list)
    """mteb's tasks that have results."""
    others: list[str] = field(default_factory=list)
    """What else has results there: tasks of local files, and of mteb on other data."""


def find_scores(results: Path, weights: str, own: Own) -> Scores:
    """The scores below `results` of the weights with the hash `weights`, as a user of the model gets them.

    Args:
        results: --output_dir of eval_mteb.py, or any folder below it.
        own: of the model.

    Raises:
        NoScoresError: there are none.
        UserError: there are several sets, of which one has to be chosen; or mteb is not installed.
    """
    of_others, otherwise, found = 0, [], []
    for file in sorted(results.rglob(_META)):
        meta = json.loads(file.read_text())
        if meta["revision"] != revision_of(weights):
            of_others += 1
        elif difference := difference_from(own, meta["experiment_kwargs"] or {}):
            otherwise.append(difference)
        elif (scores := _read(file.parent)).tasks:
            found.append(scores)
        else:
            otherwise.append(f"only tasks that are not mteb's: {', '.join(scores.others)}")
    if len(found) > 1:
        raise UserError(
            f"{results} holds {len(found)} sets of scores of these weights: "
            f"{', '.join(str(scores.folder) for scores in found)}; give one of them as --results"
        )
    if not found:
        notes = otherwise + ([f"{of_others} folders of scores of other weights"] if of_others else [])
        raise NoScoresError(
            f"{results} holds no scores of these weights ({revision_of(weights)}) by the settings of the model"
            + (f", but {'; '.join(dict.fromkeys(notes))}" if notes else "")
            + "; evaluate it with eval_mteb.py, or give another --results"
        )
    return found[0]


def write_leaderboard(scores: Scores, target: Path, repo: str, commit: str, head: ModelCardData) -> list[Path]:
    """Write the scores as mteb's results repository wants them, and read them back with mteb.

    Args:
        target: gets results/<owner>__<name>/<commit>/.
        repo, commit: where the weights are on the hub.
        head: of the card there.

    Returns:
        The files of results.
    """
    import mteb
    from mteb.models import ModelMeta
    from mteb.types import Licenses

    meta = json.loads((scores.folder / _META).read_text())
    del meta["is_cross_encoder"]  # of mteb's, and read by it as an old field
    model = ModelMeta.model_validate(
        {
            **meta, "name": repo, "revision": commit, "reference": f"https://huggingface.co/{repo}",
            "release_date": date.today().isoformat(), "open_weights": True, "adapted_from": head.base_model,
            "license": head.license if head.license in get_args(Licenses) else None,
            # The scores are those of the model as it is on the hub, and not of an experiment with it.
            "experiment_kwargs": None,
        }
    )  # fmt: skip
    cache = mteb.ResultCache(target)
    paths = [cache.get_task_result_path(name, model) for name in scores.tasks]
    folder = paths[0].parent
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in zip(scores.tasks, paths, strict=True):
        shutil.copyfile(scores.folder / f"{name}.json", path)
    (folder / _META).write_text(json.dumps(model.to_dict(), default=str, indent=4))
    (folder / _RUNS).write_text("".join(_runs_of(scores)))
    if sorted(cache.get_cache_paths(models=[model])) != sorted(paths):
        raise UserError(f"mteb does not find in {target} what was written; give an empty --leaderboard")
    for name in scores.tasks:
        cache.load_task_result(name, model, raise_if_not_found=True)
    return paths


def _runs_of(scores: Scores) -> list[str]:
    file = scores.folder / _RUNS
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [line for line in lines if json.loads(line)["task"] in scores.tasks]


def difference_from(own: Own, used: Mapping[str, Any]) -> str:
    """How the options of an evaluation differ from what a model's folder says; an empty string = not at all.

    What a folder does not say is free: seed, engine, dtype, and whether vectors get unit length.
    """
    # What earlier versions left out, or did not say.
    off = {
        **NO_MIX._asdict(), "ignore_eos": False, "template": TEXT, "instructions": {},
        "template_date": own.settings.template_date or DEFAULT_DATE, "tokenizer_hash": own.tokenizer_hash,
    }  # fmt: skip
    for role in (None, *ROLES):
        # A role of its own is told where it differs from texts without one.
        used_by_role = used if role is None else used.get(role, used)
        for name, value in _of_role(own, role).items():
            other = off.get(name) if used_by_role.get(name) is None else used_by_role[name]
            if other != value:
                key = name if role is None else f"{role}.{name}"
                return f"scores with {key}={other!r}, and the model's is {value!r}"
    return ""


def _of_role(own: Own, role: Role | None) -> dict[str, Any]:
    """What a folder says of texts of a role, by the names of an encoder's description."""
    settings, of_role = own.settings, own.settings.of_role(role)
    mean = None if own.centre is None else own.centre.mean(of_role.think)
    found = {
        **settings.model_dump(include=_PROMPT), "template_date": settings.template_date or DEFAULT_DATE,
        "template": of_role.template, "think": of_role.think,
        "centre": None if mean is None else hashlib.sha256(mean.tobytes()).hexdigest(),
    }  # fmt: skip
    if of_role.think:
        found |= {
            "max_new_tokens": of_role.max_new_tokens, "temperature": settings.temperature, "ignore_eos": False,
            **settings.mix._asdict(),
        }  # fmt: skip
    if role is None and settings.uses_instructions:
        found["instructions"] = settings.instructions
    # Last, as some of the settings are part of it.
    return {**found, "tokenizer_hash": own.tokenizer_hash}


def _read(folder: Path) -> Scores:
    try:
        import mteb
        from mteb.results import TaskResult
    except ImportError as error:
        raise UserError(f"{folder} holds scores, and mteb is not installed: pip install -e '.[eval]'") from error
    scores = Scores(folder, [])
    for file in sorted(folder.glob("*.json")):
        if file.name == _META:
            continue
        result = TaskResult.from_disk(file)
        try:
            task = mteb.get_task(result.task_name).metadata
        except KeyError:
            scores.others.append(result.task_name)
            continue
        # A local task may have the name of one of mteb's.
        if result.dataset_revision != task.revision:
            scores.others.append(result.task_name)
            continue
        scores.tasks.append(result.task_name)
        scores.entries.extend(_entries(result, task))
    return scores


def _entries(result: Any, task: Any) -> list[EvalResult]:
    path = task.dataset["path"]
    return [
        EvalResult(
            task_type=task.type,
            task_name=task.type,
            # An aggregated task has a sentence there.
            dataset_type=path if "/" in path else task.name,
            dataset_name=f"MTEB {task.name} ({subset['hf_subset']})",
            dataset_config=subset["hf_subset"],
            dataset_split=split,
            dataset_revision=result.dataset_revision,
            metric_type=task.main_score,
            metric_value=round(100 * subset["main_score"], 4),
            source_name="MTEB",
            source_url="https://github.com/embeddings-benchmark/mteb",
        )
        for split, subsets in result.scores.items()
        for subset in subsets
    ]

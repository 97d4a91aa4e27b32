"""Which tasks an evaluation runs: benchmarks and suites by name, single tasks, local files."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mteb
from mteb.abstasks import AbsTask

from verl.errors import UserError
from verl.evaluation.local_tasks import find_local_tasks

ENGLISH_V1 = "MTEB(eng, v1)"
ENGLISH_V2 = "MTEB(eng, v2)"
NANO = "NanoBEIR"
# One or two tasks of each type, from those of ENGLISH_V1: the paper's subset for ablations.
QUICK = (
    "Banking77Classification", "EmotionClassification", "MedrxivClusteringS2S", "TwitterSemEval2015",
    "AskUbuntuDupQuestions", "BIOSSES", "STS17", "STSBenchmark", "SummEval",
)  # fmt: skip


@dataclass(frozen=True)
class Selection:
    """The tasks of one evaluation."""

    title: str
    tasks: list[Any]
    comparable: bool
    """Whether the mean is that of a published benchmark."""


def select_tasks(benchmark: str | None, suite: str | None, names: Sequence[str], task_dir: Path | None) -> Selection:
    """The tasks that the arguments select: a benchmark, a suite, or names and local tasks.

    A name is looked up among the local tasks first. Tasks of mteb are limited to their English subsets and keep their
    own evaluation splits.

    Raises:
        UserError: a name is unknown (the error lists the nearest ones), or more than one selection is given.
    """
    if sum([benchmark is not None, suite is not None, bool(names) or task_dir is not None]) > 1:
        raise UserError("give one of --benchmark, --suite, and --tasks or --task_dir")
    if benchmark is not None:
        return Selection(benchmark, _benchmark_tasks(benchmark), comparable=True)
    if suite is not None:
        return _suite(suite)
    local = find_local_tasks(task_dir) if task_dir else []
    if not names:
        return Selection(f"the tasks of {task_dir}", list(local), comparable=False)
    own = {task.metadata.name: task for task in local}
    tasks = [own.get(name) or _english_task(name, own) for name in dict.fromkeys(names)]
    return Selection(f"{len(tasks)} chosen tasks", tasks, comparable=False)


def _suite(name: str) -> Selection:
    """One of SUITES."""
    if name == "quick":
        return Selection("suite quick", [_english_task(task, ()) for task in QUICK], comparable=False)
    if name == "nano":
        return Selection("suite nano (NanoBEIR)", _benchmark_tasks(NANO), comparable=False)
    benchmark = {"eng-v1": ENGLISH_V1, "eng-v2": ENGLISH_V2}[name]
    return Selection(benchmark, _benchmark_tasks(benchmark), comparable=True)


def _benchmark_tasks(name: str) -> list[Any]:
    try:
        return list(mteb.get_benchmark(name).tasks)
    except KeyError as error:
        raise UserError(f"--benchmark {name}: {error.args[0]}") from None


def _english_task(name: str, local: Sequence[str] | Any) -> AbsTask:
    """A task of mteb; if an English benchmark has it, then with that benchmark's subsets."""
    for benchmark in (ENGLISH_V1, ENGLISH_V2, NANO):
        for task in mteb.get_benchmark(benchmark).tasks:
            if task.metadata.name == name:
                return task
    every = {task.metadata.name for task in mteb.get_tasks(exclude_superseded=False)}
    if name not in every:
        near = _nearest(name, [*local, *every])
        raise UserError(f"--tasks: there is no task {name!r}; the nearest names are {', '.join(near)}")
    return mteb.get_task(name, languages=["eng"])


def _nearest(name: str, known: Sequence[str]) -> list[str]:
    """Names with a similar spelling, else names that `name` abbreviates, else the most similar ones."""
    lower = {other.lower(): other for other in known}
    close = difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.75)
    if not close:
        close = sorted((other for other in lower if _abbreviates(name.lower(), other)), key=len)[:3]
    return [lower[other] for other in close or difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.0)]


def _abbreviates(short: str, name: str) -> bool:
    """Whether `name` begins with the first letter of `short` and contains all its letters in order."""
    letters = iter(name)
    return name[:1] == short[:1] and all(letter in letters for letter in short)

"""The comparison from its data to its scores; every finished part is kept and not done again."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from common import REPO

from comparison import answers, baseline, scoring
from comparison.baseline import Setting
from comparison.data import Data
from comparison.kept import Kept, clear, key_of
from comparison.measured import Measured
from comparison.rows import RECIPES, ROWS, Trained
from comparison.scoring import MAX_LENGTH, Scores, from_json, mean_of_main
from comparison.states import WITHOUT
from comparison.training import Cost, Run
from verl.checkpoint.model_folder import weights_revision

BASE, CONTRASTIVE = "base", "contrastive"
# Raised when parts that were kept are no longer what this code computes.
_VERSION = 1


@dataclass(frozen=True)
class Shape:
    """How much is done."""

    seconds: float
    """Of training steps, for every row."""
    shares: tuple[float, ...]
    """Of the seconds, at which a row is scored on dev; ends with 1."""
    seeds: int
    grid: tuple[Setting, ...]
    """Settings that the contrastive baseline is chosen from."""
    tokens: int = 16
    """Of a rationale of the base model."""
    recipe_steps: tuple[int, ...] = ()
    """Of training, after which a recipe is scored on dev, rising; none = after `seconds`, as the rows are."""
    rows: Mapping[str, Trained] = field(default_factory=lambda: ROWS)
    """What is trained beside the baseline, by name."""


class Point(NamedTuple):
    """A model at a point of its training."""

    cost: Cost
    scores: Scores


class Stretch(NamedTuple):
    """Training up to a point."""

    title: str
    settings: dict[str, Any]
    """By which it is told from the others of its run."""
    train: Callable[[Run], Cost]


class Study:
    """Trains and scores models: `base`, `contrastive`, those of `shape.rows`, and recipes.

    Args:
        model: folder of the untrained model.
        out: folder of everything that is made.
        say: shows what is begun; a part that was kept is not begun.
    """

    def __init__(self, model: Path, data: Data, shape: Shape, out: Path, say: Callable[[str], None]) -> None:
        self.model, self.data, self.shape, self.out, self.say = model, data, shape, out, say
        self.kept = Kept(out / "parts")
        # Whatever the row, its result depends on these.
        self._common = {"version": _VERSION, "model": weights_revision(model), "max_length": MAX_LENGTH}

    def base(self, part: str) -> Scores:
        """The scores of the untrained model on dev or test."""
        settings = {**self._common, **self._scored_on(part), "tokens": self.shape.tokens}

        def make(_: Path) -> dict[str, Any]:
            tasks = self.data.parts[part]
            return scoring.score_encoder(self.model, tasks, self.data.centre, self.shape.tokens, echo=True)

        return from_json(self._part(f"{BASE}-{part}", settings, f"{BASE}: {part}", make)["scores"])

    def row(self, name: str, seed: int) -> list[Point]:
        """Train a row, and score it on dev at every share of the seconds."""
        run, settings = self._run(name, self.shape.rows[name], seed, self._seconds(self.shape.shares))
        points = self._train(name, seed, run, settings, self._by_seconds(self.shape.shares))
        run.finish()
        return points

    def recipe(self, name: str, seed: int) -> list[Point]:
        """Train a recipe for all of the seconds, or for each number of steps, and score it on dev there."""
        run, settings = self._recipe_run(name, seed)
        if self.shape.recipe_steps:
            points = self._train(_label(name), seed, run, settings, _by_steps(self.shape.recipe_steps))
            run.finish()
        else:
            points = self._train(_label(name), seed, run, settings, self._by_seconds((1.0,)))
            # It was tried to choose by dev; its model is not asked for anything else, unless it is a row's too.
            if run.folder == self._folder_of_row(name, seed):
                run.finish()
            else:
                clear(run.folder)
        return points

    def _folder_of_row(self, name: str, seed: int) -> Path | None:
        row = self.shape.rows.get(name)
        return self._run(name, row, seed, self._seconds(self.shape.shares))[0].folder if row else None

    def test_row(self, name: str, seed: int) -> Scores:
        """The scores on test of a row that `row` has trained."""
        run, settings = self._run(name, self.shape.rows[name], seed, self._seconds(self.shape.shares))
        return self._test(name, seed, settings, lambda _: self._on_test(run))

    def test_recipe(self, name: str, seed: int) -> Scores:
        """The scores on test of a recipe that `recipe` has trained for its steps."""
        run, settings = self._recipe_run(name, seed)
        return self._test(_label(name), seed, settings, lambda _: self._on_test(run))

    def contrastive(self, setting: Setting, seed: int) -> list[Point]:
        """Train the contrastive baseline, and score it on dev at every share of the seconds."""
        settings = self._baseline_settings(setting, seed)

        def make(folder: Path) -> dict[str, Any]:
            budgets = {folder / f"{share:g}": share * self.shape.seconds for share in self.shape.shares}
            costs = baseline.train(self.model, self.data.train, setting, budgets, seed, folder / "trainer")
            points = []
            for at in budgets:
                scores = scoring.score_baseline(at, self.data.parts["dev"], self.data.centre)
                points.append({"cost": costs[at].as_json(), **scores})
            for at in list(budgets)[:-1]:
                clear(at)
            return {"points": points}

        title = f"{CONTRASTIVE}, {setting.name}, seed {seed}: {self.shape.seconds:g} s of training, and dev"
        made = self._part(f"{CONTRASTIVE}-s{seed}", settings, title, make)
        return [_point(point) for point in made["points"]]

    @cached_property
    def tuned(self) -> dict[Setting, float]:
        """The mean on dev of each setting of the baseline, with the first seed."""
        return {
            setting: mean_of_main([self.contrastive(setting, 0)[-1].scores], WITHOUT.name)
            for setting in self.shape.grid
        }  # fmt: skip

    @property
    def chosen(self) -> Setting:
        """The setting of the baseline that is best on dev."""
        return max(self.tuned, key=self.tuned.__getitem__)

    def test_contrastive(self, seed: int) -> Scores:
        """The scores on test of the baseline by the chosen setting."""

        def make(_: Path) -> dict[str, Any]:
            return scoring.score_baseline(self._baseline_model(seed), self.data.parts["test"], self.data.centre)

        return self._test(CONTRASTIVE, seed, self._baseline_settings(self.chosen, seed), make)

    def likelihood(self, name: str, seed: int) -> Measured | None:
        """The log-likelihood of the answers by a trained or the untrained model; None where there are no answers."""
        if not self.data.answers:
            return None
        if name == BASE:
            folder, settings = self.model, self._common
        elif name == CONTRASTIVE:
            folder, settings = self._baseline_model(seed), self._baseline_settings(self.chosen, seed)
        else:
            run, settings = self._run(name, self.shape.rows[name], seed, self._seconds(self.shape.shares))
            folder = run.trained_model
        return self._likelihood(name, seed, settings, lambda: folder)

    def recipe_likelihood(self, name: str, seed: int) -> Measured | None:
        """`likelihood` of a recipe that `recipe` has trained for its steps."""
        if not self.data.answers:
            return None
        run, settings = self._recipe_run(name, seed)
        return self._likelihood(_label(name), seed, settings, lambda: run.trained_model)

    def _likelihood(self, name: str, seed: int, settings: dict[str, Any], model: Callable[[], Path]) -> Measured:
        described = {**settings, "answers": key_of(self.data.answers)}
        made = self._part(
            f"{name}-s{seed}-answers", described, f"{name}, seed {seed}: likelihood of answers",
            lambda _: answers.likelihood(model(), self.data.answers).as_json(),
        )  # fmt: skip
        return Measured.from_json(made)

    def _by_seconds(self, shares: tuple[float, ...]) -> list[Stretch]:
        ends = {share: share * self.shape.seconds for share in shares}
        return [
            Stretch(f"training until {end:g} s", {"share": share}, partial(Run.train_until, seconds=end))
            for share, end in ends.items()
        ]

    def _seconds(self, shares: tuple[float, ...]) -> dict[str, Any]:
        return {"seconds": self.shape.seconds, "shares": list(shares)}

    def _run(
        self, name: str, trained: Trained, seed: int, until: dict[str, Any]
    ) -> tuple[Run, dict[str, Any]]:  # fmt: skip
        """A row's training run, and what its results on dev depend on.

        Args:
            until: what the run is trained for.
        """
        overrides = [*trained.overrides, f"data.seed={seed}", f"actor_rollout_ref.rollout.seed={seed}"]
        settings = {
            **self._common, **self._scored_on("dev"), "overrides": overrides, "mode": trained.mode,
            "train": key_of(self.data.train), **until,
        }  # fmt: skip
        folder = self.out / "runs" / f"{name}-s{seed}-{key_of(settings)}"
        return Run(folder, str(self.model), self._train_file(trained.mode), trained.mode, overrides), settings

    def _recipe_run(self, name: str, seed: int) -> tuple[Run, dict[str, Any]]:
        steps = self.shape.recipe_steps
        until = {"steps": list(steps)} if steps else self._seconds((1.0,))
        return self._run(_label(name), RECIPES[name], seed, until)

    def _train(
        self, name: str, seed: int, run: Run, settings: dict[str, Any], stretches: Sequence[Stretch]
    ) -> list[Point]:
        points = []
        for stretch in stretches:

            def make(_: Path, stretch: Stretch = stretch) -> dict[str, Any]:
                return self._on_dev(run, stretch.train(run))

            title = f"{name}, seed {seed}: {stretch.title}, and dev"
            points.append(_point(self._part(f"{name}-s{seed}", {**settings, **stretch.settings}, title, make)))
        return points

    def _on_dev(self, run: Run, cost: Cost) -> dict[str, Any]:
        scores = scoring.score_encoder(run.trained_model, self.data.parts["dev"], self.data.centre, None)
        return {"cost": cost.as_json(), **scores}

    def _on_test(self, run: Run) -> dict[str, Any]:
        return scoring.score_encoder(run.trained_model, self.data.parts["test"], self.data.centre, None)

    def _train_file(self, mode: str) -> Path:
        """The training triplets, or their queries and positives as plain texts, as train.sh reads them."""
        triplets = self.data.train
        samples: list[dict[str, str]] = [
            {"query": query, "positive": positive, "negative": negative} for query, positive, negative in triplets
        ]
        if mode == "unsupervised":
            texts = dict.fromkeys(text for query, positive, _ in triplets for text in (query, positive))
            samples = [{"text": text} for text in texts]
        folder = self.out / "data" / f"{mode}-{key_of(triplets)}"
        if not (folder / "train.parquet").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "texts.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
            command = [sys.executable, "process_data.py", "--mode", mode, "--test_ratio", "0"]
            files = ["--input_file", str(folder / "texts.jsonl"), "--local_dir", str(folder)]
            subprocess.run([*command, *files], check=True, cwd=REPO, stdout=subprocess.DEVNULL)
        return folder / "train.parquet"

    def _baseline_settings(self, setting: Setting, seed: int) -> dict[str, Any]:
        return {
            **self._common, **self._scored_on("dev"), **asdict(setting), "seed": seed,
            "train": key_of(self.data.train), "seconds": self.shape.seconds, "shares": self.shape.shares,
        }  # fmt: skip

    def _baseline_model(self, seed: int) -> Path:
        return self.kept.folder(f"{CONTRASTIVE}-s{seed}", self._baseline_settings(self.chosen, seed)) / "1"

    def _test(self, name: str, seed: int, settings: dict[str, Any], make: Callable[[Path], dict[str, Any]]) -> Scores:
        described = {**settings, "test": self._scored_on("test")}
        return from_json(self._part(f"{name}-s{seed}-test", described, f"{name}, seed {seed}: test", make)["scores"])

    def _scored_on(self, part: str) -> dict[str, Any]:
        return {"tasks": scoring.hash_of(self.data.parts[part], self.data.centre)}

    def _part(self, name: str, settings: Any, title: str, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        if self.kept.find(name, settings) is None:
            self.say(title)
        return self.kept.get(name, settings, make)


def _by_steps(steps: Sequence[int]) -> list[Stretch]:
    return [Stretch(f"{end} steps of training", {"at": end}, partial(Run.train_steps, steps=end)) for end in steps]


def _label(recipe: str) -> str:
    """Its name in names of folders."""
    return recipe.replace(" ", "-")


def _point(made: dict[str, Any]) -> Point:
    return Point(Cost(**made["cost"]), from_json(made["scores"]))

"""What is the choice of a rationale worth, for each of the models?

    python3 bench/best_of.py MODEL [MODEL ...] --data DIR

Draws several rationales for each positive of the comparison's test triplets, embeds it through each of them, and
chooses one by the reward of `objective=infonce`: the log-probability of its query among all queries and negatives.
Queries and negatives keep one rationale. The best is chosen with the answer in hand, so no policy that draws such
rationales has a higher reward; the gap to the worst is all that what is written decides. Where the cosine of two
rationales of one text is near 1, a policy has little to choose from.
"""

import argparse
import statistics
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import REPO, markdown, write_json
from comparison.data import load
from comparison.measured import Measured, interval
from comparison.program import SIZES
from comparison.states import lookup
from comparison.tasks import Triplets

from verl import GraceEncoder
from verl.algorithm.contrastive import Group
from verl.embedding.metrics import mean_cosine
from verl.encoder.arguments import whole_number
from verl.utils.console import exit_code_of
from verl.utils.logging import quiet_libraries
from verl.workers.reward_manager.hidden import clustering, contrast
from verl.workers.rollout.base import RolloutError

GREEDY, DRAWN, BEST, WORST = "the likeliest tokens", "drawn", "best", "worst"
METRICS = ("accuracy", "R@1", "nDCG@10")
# Of the reward, as in train.sh.
_TEMPERATURE = 0.1


@dataclass(frozen=True)
class Choice:
    """What the choice between k rationales of each text is worth to a model."""

    scores: dict[str, dict[str, list[Measured]]]
    """By how the rationale was chosen, and metric; of those that are drawn, k."""
    rewards: np.ndarray
    """[k,N] float64, log-probabilities of the query."""
    same: float
    """Mean cosine of two rationales of one text."""
    different: float
    """Mean cosine of two texts through one rationale each."""


def measure(encoder: GraceEncoder, task: Triplets, rationales: int) -> Choice:
    """Embed N triplets of different texts, the positives through k = `rationales` each; both are at least 2."""
    queries, positives, negatives = map(list, zip(*task.rows, strict=True))
    q, n = encoder.encode(queries), encoder.encode(negatives)
    drawn = np.stack([encoder.encode(positives, seed=seed) for seed in range(rationales)])  # [k,N,H]
    rewards = np.stack([rewards_of(m, q, n, task) for m in drawn])
    text = np.arange(len(positives))
    vectors = {
        GREEDY: [encoder.encode(positives, temperature=0.0)],
        DRAWN: list(drawn),
        BEST: [drawn[rewards.argmax(0), text]],
        WORST: [drawn[rewards.argmin(0), text]],
    }
    texts = [*queries, *positives, *negatives]
    runs = {name: [task.measure(lookup(texts, np.concatenate([q, m, n]))) for m in ms] for name, ms in vectors.items()}
    scores = {name: {metric: [run[metric] for run in own] for metric in METRICS} for name, own in runs.items()}
    # The mean cosine with the group's other rows; here a text's rationales are the group.
    same = clustering(torch.from_numpy(np.concatenate(drawn)), torch.arange(len(positives)).repeat(rationales))
    different = float(np.mean([mean_cosine(torch.from_numpy(m)) for m in drawn]))
    return Choice(scores, rewards, float(same.mean()), different)


def rewards_of(m: np.ndarray, q: np.ndarray, n: np.ndarray, task: Triplets) -> np.ndarray:
    """[N] float64, rewards of one rationale of each positive, of unit vectors [N,H]: its own, queries', negatives'."""
    groups = [Group(query, (positive,), (negative,)) for query, positive, negative in task.rows]
    trained, queries, negatives = (torch.from_numpy(part).double() for part in (m, q, n))
    return contrast(trained, queries, negatives, torch.arange(len(groups)), groups, _TEMPERATURE).numpy()


def table(found: dict[str, Choice]) -> str:
    """The scores x 100 ± half of their 95 % interval over the triplets and draws."""
    lines = []
    for model, choice in found.items():
        for name, metrics in choice.scores.items():
            figures = [interval(metrics[metric]) for metric in METRICS]
            lines.append(
                [model, name, *(f"{100 * f.value:.1f} ±{50 * (f.high - f.low):.1f}" for f in figures)]
            )  # fmt: skip
    return markdown(["model", "rationale of the positive", *METRICS], lines)


def spreads(found: dict[str, Choice]) -> str:
    """How much of a vector and of its reward a rationale decides."""
    lines = [
        [model, f"{choice.same:.3f}", f"{choice.different:.3f}", f"{choice.rewards.mean():.3f}",
         f"{spread_of_rewards(choice):.3f}"]
        for model, choice in found.items()
    ]  # fmt: skip
    head = ["model", "cosine, two rationales of a text", "two texts", "reward", "its standard deviation within a text"]
    return markdown(head, lines)


def spread_of_rewards(choice: Choice) -> float:
    """The median over the texts of the standard deviation over their rationales."""
    return statistics.median(choice.rewards.std(0, ddof=1).tolist())


def as_json(found: dict[str, Choice]) -> dict[str, Any]:
    return {
        model: {
            "scores": {
                name: {metric: interval(runs)._asdict() for metric, runs in metrics.items()}
                for name, metrics in choice.scores.items()
            },
            "cosine_same": choice.same, "cosine_different": choice.different,
            "reward": float(choice.rewards.mean()), "reward_std": spread_of_rewards(choice),
        }
        for model, choice in found.items()
    }  # fmt: skip


def run(args: argparse.Namespace) -> None:
    rationales = whole_number("--rationales", args.rationales, 2)
    most = whole_number("--triplets", args.triplets, 2)
    held_out = next(task for task in load(args.data, SIZES["full"]).parts["test"] if isinstance(task, Triplets))
    task = Triplets(held_out.name, held_out.rows[:most])
    found = {}
    for number, model in enumerate(args.models, start=1):
        print(f"{number}/{len(args.models)} {model}: {rationales} rationales of {len(task.rows)} texts", flush=True)
        with GraceEncoder(model, engine="hf", device="cpu", max_new_tokens=args.tokens) as encoder:
            found[model] = measure(encoder, task, rationales)
    print(f"\n{table(found)}\n\n{spreads(found)}")
    write_json(args.json, {"triplets": len(task.rows), "rationales": rationales, "models": as_json(found)})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="model folder")
    parser.add_argument("--data", type=Path, default=REPO / "examples", help="folder, see bench/comparison/data.py")
    parser.add_argument("--triplets", type=int, default=200, help="at most")
    parser.add_argument("--rationales", type=int, default=8, help="of each positive")
    parser.add_argument("--tokens", type=int, help="of a rationale, at most; default: the model's own setting")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    quiet_libraries()
    return exit_code_of("best_of", partial(run, args), failures=(RolloutError,))


if __name__ == "__main__":
    sys.exit(main())

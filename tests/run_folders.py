"""Run folders as training leaves them, of made-up figures: for what reads a run."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from verl.config import RunConfig
from verl.evaluation.report import Summary, TaskReport
from verl.utils.run_files import DIAGNOSTICS, METRICS, PROBE, RECORD, SAMPLES

ROLES = ("positive", "query", "negative")
TOPICS = "lost cards, late trains, cast iron pans, tax forms, garden tools, night skies, old bridges".split(", ")


def write_run(
    folder: Path,
    steps: int = 40,
    texts: int = 30,
    every: int = 10,
    size: int = 24,
    seed: int = 0,
    rationale: Callable[[int, int], str] | None = None,
) -> Path:
    """A whole run: its record, figures of every step, samples, diagnoses of probe texts, and evaluations.

    Args:
        every: steps between diagnoses.
        size: of the vectors.
        rationale: the rationale of a text at a step.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    write = rationale or (lambda text, step: f"Step {step}: this is about {TOPICS[text // 3 % 7]}, number {text}.")
    write_record(folder, steps)
    write_metrics(folder / METRICS, steps, every, rng)
    for step in range(max(1, steps - 11), steps + 1):
        write_lines(folder / SAMPLES / f"step_{step}.jsonl", sample_rows(step, rng, write))
    write_diagnostics(folder / DIAGNOSTICS, list(range(0, steps + 1, every)), texts, size, rng, write)
    write_evaluation(folder, steps)
    return folder


def write_record(folder: Path, steps: int) -> None:
    config = RunConfig().model_dump(mode="json")
    config["actor_rollout_ref"]["model"]["path"] = "models/base"
    config["actor_rollout_ref"]["rollout"]["n"] = 4
    config["data"] |= {"train_files": "data/train.parquet", "train_batch_size": 6}
    config["reward_model"]["reward_kwargs"] = {"temperature": 0.1}
    record = {
        "command": "python3 -m verl.trainer.main_ppo data.train_batch_size=6",
        "config": config,
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "total_steps": steps,
        "started": "2026-11-28 19:00 UTC",
    }
    (folder / RECORD).write_text(json.dumps(record))


def write_metrics(file: Path, steps: int, every: int, rng: np.random.Generator) -> None:
    noise = rng.normal(0, 0.05, (steps + 1, 8))
    lines: list[dict[str, Any]] = []
    for step in range(steps + 1):
        part, n = step / max(steps, 1), noise[step]
        if step:
            lines.append({"step": step, **training_figures(part, n)})
        if step % every == 0:
            lines.append(
                {
                    "step": step,
                    "val/triplet_accuracy": 0.6 + 0.15 * part + n[0] / 5,
                    "val/sts_spearman": 0.58 + 0.05 * part,
                    "val/effective_rank": 30 - 4 * part,
                    "time/val_s": 9.5,
                }
            )
            lines.append({"step": step, **diagnosed_figures(part, n), "time/diag_s": 4.2})
    lines.insert(
        len(lines) // 2,
        {
            "step": steps // 2,
            "alerts": [
                {"name": "not_used", "text": "The rationales hardly matter: the cosine with and without them is 0.985."}
            ],
        },
    )
    write_lines(file, lines)


def training_figures(part: float, n: np.ndarray) -> dict[str, float]:
    positive, negative, clustering = 8.6 + 0.7 * part + n[1], -8.7 - n[2], 1.9 + n[3] / 4
    return {
        "reward/positive/weighted": positive,
        "reward/negative/weighted": negative,
        "reward/clustering/weighted": clustering,
        "reward/positive/variance_share": 0.93 + n[4] / 5,
        "reward/clustering/variance_share": 0.07 - n[4] / 5,
        "reward/mean": positive + negative,
        "reward/max": positive + negative + 0.7,
        "reward/min": positive + negative - 0.6,
        "group/std_median": 0.14 + n[5] / 3,
        "group/flat_share": 0.0,
        "group/duplicate_share": 0.02,
        "group/distinct_1": 0.6,
        "rationale/trained_tokens_mean": 24 + 8 * part + n[6] * 9,
        "rationale/query_tokens_mean": 21 + 5 * part,
        "rationale/trained_truncated": 0.3 - 0.1 * part,
        "rationale/query_truncated": 0.2,
        "rationale/repetition": 0.01,
        "actor/grad_norm": 0.9 + n[7],
        "actor/pg_loss": n[1] / 100,
        "actor/entropy": 3 - part,
        "actor/lr": 1e-5,
        "memory/host_peak_gb": 4.4,
        "perf/tokens_per_s": 160 + 40 * n[0],
        "own/figure": part,
        "time/gen_s": 5.1 + n[0],
        "time/score_s": 3.9,
        "time/update_s": 5.8 + n[2],
        "time/sync_s": 1.2,
        "time/step_s": 16.0,
    }


def diagnosed_figures(part: float, n: np.ndarray) -> dict[str, float]:
    return {
        "diag/texts": 30,
        "diag/samples": 10,
        "diag/effective_rank": 16 - 3 * part,
        "diag/mean_cosine": 0.8 - 0.05 * part,
        "diag/top1_variance_share": 0.2,
        "diag/uniformity": -0.7,
        "diag/alignment": 0.3 - 0.1 * part,
        "diag/log_likelihood": -2.4 - 0.2 * part,
        "diag/cos_without": 0.97 - 0.06 * part,
        "diag/cos_other_rationale": 0.93 - 0.04 * part,
        "diag/cos_second_rationale": 0.97,
        "diag/own_rationale_gain": 0.04 + 0.03 * part,
        "diag/mrr_thinking": 0.5 + 0.2 * part,
        "diag/mrr_without": 0.48,
        "diag/mrr_shuffled": 0.4,
        "diag/tokens_mean": 26 + n[0],
        "diag/truncated": 0.2,
    }


def sample_rows(step: int, rng: np.random.Generator, write: Callable[[int, int], str]) -> list[dict[str, Any]]:
    """Two groups of four rationales, with the texts that they are compared with."""
    rows = []
    for uid in (2 * step, 2 * step + 1):
        text = f"A sample text about {TOPICS[uid % 7]}."
        for _ in range(4):
            parts = {"positive": 9 + rng.normal(0, 0.3), "negative": -8.8, "clustering": 1.9 + rng.normal(0, 0.02)}
            rows.append(
                {
                    "uid": uid,
                    "role": "positive",
                    "text": text,
                    "rationale": write(uid, step),
                    "tokens": 16,
                    "finish_reason": "length",
                    "reward": sum(parts.values()) - 1.6,
                    "reward_parts": parts,
                    "advantage": rng.normal(0, 0.1),
                }
            )
        rows += [
            {
                "uid": uid,
                "role": role,
                "text": f"The {role} of it.",
                "rationale": write(uid, step),
                "tokens": 9,
                "finish_reason": "stop",
            }
            for role in ("query", "negative")
        ]
    return rows


def write_diagnostics(
    folder: Path,
    steps: Sequence[int],
    count: int,
    size: int,
    rng: np.random.Generator,
    write: Callable[[int, int], str],
) -> None:
    """Probe texts whose vectors move from one cloud towards their topics."""
    texts = [{"id": i, "sample": i // 3, "role": ROLES[i % 3], "text": probe_text(i)} for i in range(count)]
    folder.mkdir(parents=True)
    (folder / PROBE).write_text(json.dumps({"seed": 0, "source": "data.val_files=x", "texts": texts}))
    topics, own = rng.normal(size=(7, size)), rng.normal(size=(count, size))
    for step in steps:
        part = step / max(steps[-1], 1)
        rows = [
            {
                "id": i,
                "rationale": write(i, step),
                "tokens": 16,
                "finish_reason": "stop",
                "log_likelihood": -2.5,
                "cos_without": 0.95,
                "cos_other_rationale": 0.9,
                "cos_second_rationale": 0.97,
            }
            for i in range(count)
        ]
        write_lines(folder / f"step_{step}.jsonl", rows)
        if step in (steps[0], steps[-1]):
            raw = own + (0.4 + 1.2 * part) * topics[np.arange(count) // 3 % 7]
            vectors = {
                name: unit(vector).astype(np.float16) for name, vector in (("with", raw), ("without", raw + 0.5 * own))
            }
            np.savez(folder / f"vectors_step_{step}.npz", **vectors)


def probe_text(i: int) -> str:
    form = ("Everything that one has to know about {}, part {}.", "What about {}? ({})", "No word of {} here, {}.")[
        i % 3
    ]
    return form.format(TOPICS[i // 3 % 7], i // 3)


def write_evaluation(run: Path, step: int) -> None:
    for name, path, score in (
        ("base", "models/base", 44.96),
        ("trained", f"{run}/global_step_{step}/huggingface", 51.28),
    ):
        write_summary(run / "evaluation" / name, path, score)


def write_summary(folder: Path, path: str, score: float, think: bool = True) -> None:
    tasks = [
        TaskReport("Retrieval", "Retrieval", "ndcg_at_10", score),
        TaskReport("STS", "STS", "cosine_spearman", score + 8),
    ]
    model = {"name": folder.name, "path": path, "revision": "0"}
    summary = Summary("tasks", False, ["Retrieval", "STS"], model, {"think": think}, {}, "eval", tasks)
    summary.write(folder)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write_lines(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

"""Score model folders on local files: STS pairs, a retrieval set, triplets. No hub is needed.

    python3 scripts/evaluate_local.py --model before=models/SmolLM2-135M-Instruct \\
        --model after=checkpoints/GRACE/quickstart/global_step_8/huggingface \\
        --sts examples/eval/sts_pairs.jsonl --retrieval examples/eval --triplets data/test.parquet

Every text is embedded through a rationale of its own, sampled with --seed. Spearman is that of cosine and
score (x100), retrieval is nDCG@10 (x100), triplet accuracy the share nearer to the positive (x100).
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from verl.embedding.encoder import GraceEncoder
from verl.embedding.metrics import triplet_report
from verl.utils.logging import quiet_libraries


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_triplets(path: Path, limit: int) -> list[tuple[str, str, str]]:
    """Triplets of a JSONL file, or of a parquet made by process_data.py."""
    if path.suffix == ".parquet":
        rows = pq.read_table(path, columns=["extra_info"]).slice(0, limit)["extra_info"].to_pylist()
        return [(r["original_query"], r["positive_example"], r["negative_example"]) for r in rows]
    return [(r["query"], r["positive"], r["negative"]) for r in read_jsonl(path)[:limit]]


def ndcg_at_10(similarity: np.ndarray, relevant: list[set[int]]) -> float:
    """Mean nDCG@10 with binary relevance. similarity: [queries, documents]."""
    discounts = 1 / np.log2(np.arange(2, 12))
    scores = []
    for row, wanted in zip(similarity, relevant, strict=True):
        gains = np.array([float(i in wanted) for i in np.argsort(-row)[:10]])
        scores.append((gains * discounts[: len(gains)]).sum() / discounts[: len(wanted)].sum())
    return float(np.mean(scores))


class Evaluation:
    """The texts of all chosen sets, embedded in one go, and the scores from their vectors."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.pairs = read_jsonl(args.sts) if args.sts else []
        self.corpus = read_jsonl(args.retrieval / "retrieval_corpus.jsonl") if args.retrieval else []
        self.queries = read_jsonl(args.retrieval / "retrieval_queries.jsonl") if args.retrieval else []
        self.triplets = read_triplets(args.triplets, args.max_triplets) if args.triplets else []
        texts = [p[side] for p in self.pairs for side in ("sentence1", "sentence2")]
        texts += [d["text"] for d in self.corpus] + [q["text"] for q in self.queries]
        self.texts = list(dict.fromkeys(texts + [text for triplet in self.triplets for text in triplet]))

    def run(self, path: str, args: argparse.Namespace) -> tuple[dict[str, float], list[str]]:
        start = time.perf_counter()
        encoder = GraceEncoder(path, ignore_eos=args.ignore_eos)
        vectors, rationales = encoder.encode_with_rationales(
            self.texts, show_progress_bar=Console().is_terminal, think=not args.no_thinking,
            max_new_tokens=args.max_new_tokens, temperature=args.temperature, seed=args.seed,
        )  # fmt: skip
        place = {text: i for i, text in enumerate(self.texts)}

        def pick(wanted: list[str]) -> np.ndarray:
            return vectors[[place[text] for text in wanted]]

        scores: dict[str, float] = {}
        if self.pairs:
            first, second = (pick([p[side] for p in self.pairs]) for side in ("sentence1", "sentence2"))
            cosine = (first * second).sum(1)
            scores["STS Spearman"] = 100 * float(spearmanr(cosine, [p["score"] for p in self.pairs]).statistic)
        if self.queries:
            number = {d["doc_id"]: i for i, d in enumerate(self.corpus)}
            relevant = [{number[d] for d in q["relevant_doc_ids"]} for q in self.queries]
            similarity = pick([q["text"] for q in self.queries]) @ pick([d["text"] for d in self.corpus]).T
            scores["retrieval nDCG@10"] = 100 * ndcg_at_10(similarity, relevant)
        if self.triplets:
            query, positive, negative = (torch.from_numpy(pick(list(c))) for c in zip(*self.triplets, strict=True))
            report = triplet_report(query, positive, negative)
            scores["triplet accuracy"] = 100 * report.pop("triplet_accuracy")
            scores["triplets R@1"] = 100 * report.pop("recall_at_1")
            scores |= {f"triplets {name.replace('_', ' ')}": value for name, value in report.items()}
        lengths = [len(ids) for ids in encoder.tokenizer(rationales)["input_ids"]]
        scores["rationale tokens"] = float(np.mean(lengths))
        scores["seconds"] = time.perf_counter() - start
        return scores, rationales


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, metavar="NAME=FOLDER", help="may be repeated")
    parser.add_argument("--sts", type=Path, help="JSONL of sentence1, sentence2, score")
    parser.add_argument("--retrieval", type=Path, help="folder of retrieval_corpus.jsonl and retrieval_queries.jsonl")
    parser.add_argument("--triplets", type=Path, help="JSONL of query, positive, negative, or a parquet")
    parser.add_argument("--max_triplets", type=int, default=200)
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no_thinking", action="store_true", help="embed the prompts alone")
    parser.add_argument("--ignore_eos", action="store_true", help="write every rationale to its full length")
    parser.add_argument("--show", type=int, default=0, help="print this many rationales of each model")
    parser.add_argument("--note", default="", help="a line under the table")
    parser.add_argument("--json", type=Path, help="also write the scores here")
    args = parser.parse_args()
    quiet_libraries()
    console = Console(highlight=False, soft_wrap=True)
    evaluation = Evaluation(args)
    columns: dict[str, dict[str, float]] = {}
    shown: list[str] = []
    for entry in args.model:
        name, path = entry.split("=", 1)
        console.print(f"embedding {len(evaluation.texts)} texts with {path}")
        columns[name], rationales = evaluation.run(path, args)
        shown += [f"[{name}] {text}\n    -> {' '.join(rationale.split())}"
                  for text, rationale in zip(evaluation.texts[: args.show], rationales, strict=False)]  # fmt: skip
    table = Table(title=f"seed {args.seed}, at most {args.max_new_tokens} rationale tokens", title_justify="left")
    table.add_column("score")
    for name in columns:
        table.add_column(name, justify="right")
    for score in next(iter(columns.values())):
        table.add_row(score, *(f"{columns[name][score]:.3f}" for name in columns))
    console.print(table)
    for line in [*shown, args.note]:
        console.print(line, markup=False)
    if args.json:
        args.json.write_text(json.dumps({"arguments": vars(args), "scores": columns}, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()

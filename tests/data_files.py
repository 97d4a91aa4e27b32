"""Inputs of the data programs, and the rows that they must become."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.parquet as pq

from verl.embedding.prompts import SYSTEM_PROMPT

ROOT = Path(__file__).resolve().parents[1]


def load_program(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


process_data = load_program("process_data")


def run(mode: str, input_file: Path, local_dir: Path, *more: object) -> int:
    argv = ["--mode", mode, "--input_file", input_file, "--local_dir", local_dir, *more]
    return process_data.main([str(a) for a in argv])


def rows_of(local_dir: Path, split: str) -> list[dict[str, Any]]:
    return pq.read_table(local_dir / f"{split}.parquet").to_pylist()


def counts_of(local_dir: Path) -> dict[str, int]:
    return json.loads((local_dir / "manifest.json").read_text())["counts"]


def write_jsonl(path: Path, objects: list[Any]) -> Path:
    path.write_text("".join(json.dumps(o, ensure_ascii=False) + "\n" for o in objects), encoding="utf-8")
    return path


def write_texts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return path


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": text}]


def reference_triplet(
    split: str, index: int, line_idx: int, texts: tuple[str, str, str], source: str | None, **several: list[str]
) -> dict:
    """`several`: all positives or negatives of a sample that has more than one."""
    query, positive, negative = texts
    return {
        "data_source": "supervised",
        "prompt": chat(positive),
        "ability": "natural_language_inference",
        "reward_model": {"style": "multi_input", "ground_truth": positive},
        "extra_info": {
            "split": split,
            "index": index,
            "original_query": query,
            "positive_example": positive,
            "negative_example": negative,
            "source": source,
            "line_idx": line_idx,
        },
        "multi_input": {"query": query, "instruction": positive, "negative_document": negative},
        "positives": several.get("positives"),
        "negatives": several.get("negatives"),
    }


def reference_text(split: str, index: int, line_idx: int, text: str, source: str | None) -> dict:
    return {
        "data_source": "unsupervised",
        "prompt": chat(text),
        "ability": "natural_language_inference",
        "reward_model": {"style": "unsupervised", "ground_truth": ""},
        "extra_info": {"split": split, "index": index, "text": text, "source": source, "line_idx": line_idx},
    }


def triplet(i: int, **more: Any) -> dict[str, Any]:
    return {"query": f"query {i}", "positive": f"positive {i}", "negative": f"negative {i}", **more}

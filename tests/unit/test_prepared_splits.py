"""process_data.py: which samples are held out, and duplicates, against brute force."""

import hashlib
import random
from collections import Counter
from pathlib import Path

import pytest
from data_files import counts_of, rows_of, run, write_jsonl, write_texts

from verl.data.split import build_splitter


@pytest.mark.parametrize(("num", "ratio"), [(7, 0.3), (100, 0.01), (99, 0.01), (3, 0.999), (10, 0.7), (1, 0.5)])
def test_leading_split(tmp_path: Path, num: int, ratio: float) -> None:
    texts = [f"text {i}" for i in range(num)]
    assert run("unsupervised", write_texts(tmp_path / "in.txt", texts), tmp_path, "--test_ratio", ratio) == 0
    infos = {split: [row["extra_info"] for row in rows_of(tmp_path, split)] for split in ("test", "train")}
    assert [info["text"] for info in infos["test"]] == texts[: int(num * ratio)]
    assert [info["text"] for info in infos["train"]] == texts[int(num * ratio) :]
    for split, rows in infos.items():
        assert [info["index"] for info in rows] == list(range(len(rows)))
        assert {info["split"] for info in rows} <= {split}


def test_seeded_split_is_exact_repeatable_and_keeps_the_order(tmp_path: Path) -> None:
    num = 20_000
    source = write_texts(tmp_path / "in.txt", [f"text {i}" for i in range(num)])
    chosen = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run("unsupervised", source, tmp_path / name, "--test_ratio", 0.013, "--seed", seed) == 0
        test, train = (
            [row["extra_info"]["line_idx"] for row in rows_of(tmp_path / name, split)] for split in ("test", "train")
        )
        assert len(test) == int(num * 0.013)
        assert sorted(test + train) == list(range(num))
        assert (test, train) == (sorted(test), sorted(train))
        chosen[name] = test
    assert chosen["a"] == chosen["b"] != chosen["c"]
    digests = [hashlib.sha256((tmp_path / n / "train.parquet").read_bytes()).hexdigest() for n in "ab"]
    assert digests[0] == digests[1]


def test_seeded_split_is_fair() -> None:
    hits: Counter[int] = Counter()
    for seed in range(2_000):
        split = build_splitter(10, 0.3, seed)
        mask = [*split(4), *split(0), *split(6)]
        assert sum(mask) == 3
        hits.update(i for i, is_test in enumerate(mask) if is_test)
    # 600 expected each, standard deviation 20.5.
    assert all(abs(hits[i] - 600) < 100 for i in range(10)), hits


@pytest.mark.parametrize("seed", [None, 4])
def test_duplicates_and_overlap_equal_brute_force(tmp_path: Path, seed: int | None) -> None:
    rng = random.Random(0)
    records = [
        {k: str(rng.randint(0, 6)) for k in ("query", "positive", "negative")} | {"source": f"s{i}"} for i in range(600)
    ]
    source = write_jsonl(tmp_path / "in.jsonl", records)
    more = [] if seed is None else ["--seed", seed]
    assert run("supervised", source, tmp_path, "--test_ratio", 0.1, *more) == 0
    parts = {
        split: [tuple(row["multi_input"].values()) for row in rows_of(tmp_path, split)] for split in ("train", "test")
    }
    counts = counts_of(tmp_path)
    assert counts["duplicates"] == 600 - len(set(parts["train"] + parts["test"])) > 0
    assert counts["test_also_in_train"] == sum(t in set(parts["train"]) for t in parts["test"]) > 0


def test_max_samples_stops_reading(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "in.txt", ["a", "", "b\0", "c", "d", "\0", "\0"])
    assert run("unsupervised", source, tmp_path, "--max_samples", 2, "--max_rejected", 0.5) == 0
    assert [row["extra_info"]["text"] for row in rows_of(tmp_path, "train")] == ["a", "c"]
    counts = counts_of(tmp_path)
    assert [counts[k] for k in ("lines", "blank", "accepted", "rejected")] == [4, 1, 2, 1]

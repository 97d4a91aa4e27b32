"""The data of the comparison: what is trained on, the tasks of the dev and of the test part, and the answers.

A folder holds nli_triplets.jsonl or triplets.jsonl (`query`, `positive`, `negative`), and any of sts17_en_en_test.jsonl
(`sentence1`, `sentence2`, `score`), xquad_en_corpus.jsonl with xquad_en_queries.jsonl, banking77_train.jsonl with
banking77_test.jsonl (`text`, `label_text`), gsm8k_test.jsonl (`question`, `answer`). The local tasks of examples/eval
are used as well, whatever the folder.
"""

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import REPO

from comparison.split import split_by_text
from comparison.tasks import Labels, Pairs, Retrieval, Task, Triplets
from verl.errors import UserError

TRIPLETS = ("nli_triplets.jsonl", "triplets.jsonl")
# STS17 en-en is made of SNLI's sentences, and so are nli_triplets.jsonl.
IN_DOMAIN = ("triplets", "STS17")
# Of a small file, the most that is held out for a part.
_MOST_OF_TRIPLETS = {"dev": 0.1, "test": 0.25}


@dataclass(frozen=True)
class PartSize:
    """The most items of the tasks of a part."""

    triplets: int
    pairs: int
    queries: int
    documents: int
    labels: int
    labelled: int
    """Texts of each label whose label is known."""
    asked: int
    """Texts of each label whose label is asked for."""


@dataclass(frozen=True)
class Sizes:
    dev: PartSize
    test: PartSize
    centre: int
    """Training texts that the mean vector is taken of."""
    answers: int
    """Questions whose answers' likelihood is measured."""


@dataclass(frozen=True)
class Data:
    train: list[tuple[str, str, str]]
    """Query, positive, negative."""
    dropped: int
    """Triplets that are not trained on because they share a text with a task."""
    parts: dict[str, list[Task]]
    """`dev`, by which everything is chosen, and `test`."""
    centre: list[str]
    """Texts of the training triplets."""
    answers: list[tuple[str, str]]
    """Question and answer, for the test part alone."""


def load(folder: Path, sizes: Sizes, seed: int = 0) -> Data:
    """Read and split the data; the same folder, sizes and seed give the same.

    Raises:
        UserError: the folder has no triplets, or too few.
    """
    parts: dict[str, list[Task]] = {"dev": [], "test": []}
    examples = REPO / "examples/eval"
    found = [
        *_pairs("STS17", folder / "sts17_en_en_test.jsonl", sizes, seed),
        *_xquad(folder, sizes, seed),
        *_banking(folder, sizes, seed),
        *_pairs("ExampleSTS", examples / "ExampleSTS.sts.jsonl", sizes, seed),
        *_examples(examples / "ExampleRetrieval.retrieval", sizes, seed),
    ]
    for part, task in found:
        parts[part].append(task)
    reserved = [text for tasks in parts.values() for task in tasks for text in task.texts]
    rows = _triplets(folder)
    counts = [min(size, int(_MOST_OF_TRIPLETS[part] * len(rows))) for part, size in _triplet_counts(sizes).items()]
    # The test part is drawn first: it is to be as large as it was asked for.
    (test, dev), train = split_by_text(rows, counts, seed, reserved)
    if min(len(test), len(dev), len(train)) < 2:
        raise UserError(f"--data={folder}: {len(rows)} triplets are too few to train, to choose and to test on")
    parts["dev"].insert(0, Triplets("triplets", [rows[i] for i in dev]))
    parts["test"].insert(0, Triplets("triplets", [rows[i] for i in test]))
    trained = [rows[i] for i in train]
    texts = sorted({text for row in trained for text in row})
    centre = random.Random(seed).sample(texts, min(sizes.centre, len(texts)))
    answers = _shuffled([(row["question"], row["answer"]) for row in _read(folder / "gsm8k_test.jsonl")], seed)
    return Data(
        trained, len(rows) - len(trained) - len(test) - len(dev), parts, centre,
        answers[: sizes.answers],
    )  # fmt: skip


def _triplet_counts(sizes: Sizes) -> dict[str, int]:
    return {"test": sizes.test.triplets, "dev": sizes.dev.triplets}


def _triplets(folder: Path) -> list[tuple[str, str, str]]:
    file = next((folder / name for name in TRIPLETS if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"--data={folder} has neither {' nor '.join(TRIPLETS)}; give a folder with one of them")
    return [(row["query"], row["positive"], row["negative"]) for row in _read(file)]


def _pairs(name: str, file: Path, sizes: Sizes, seed: int) -> list[tuple[str, Task]]:
    rows = [(row["sentence1"], row["sentence2"], float(row["score"])) for row in _read(file)]
    # A third for dev, so that a small file has enough left to test on.
    counts = (min(sizes.dev.pairs, len(rows) // 3), sizes.test.pairs)
    drawn, _ = split_by_text([row[:2] for row in rows], counts, seed)
    return [
        (part, Pairs(name, [rows[i] for i in own])) for part, own in zip(("dev", "test"), drawn, strict=True) if own
    ]


def _xquad(folder: Path, sizes: Sizes, seed: int) -> list[tuple[str, Task]]:
    documents = {row["doc_id"]: row["text"] for row in _read(folder / "xquad_en_corpus.jsonl")}
    queries = [(row["text"], [row["relevant_doc_id"]]) for row in _read(folder / "xquad_en_queries.jsonl")]
    return _retrieval("XQuAD", queries, documents, sizes, seed)


def _examples(folder: Path, sizes: Sizes, seed: int) -> list[tuple[str, Task]]:
    documents = {row["id"]: row["text"] for row in _read(folder / "corpus.jsonl")}
    queries = [(row["text"], row["relevant"]) for row in _read(folder / "queries.jsonl")]
    return _retrieval("ExampleRetrieval", queries, documents, sizes, seed)


def _retrieval(
    name: str, queries: list[tuple[str, list[str]]], documents: dict[str, str], sizes: Sizes, seed: int
) -> list[tuple[str, Task]]:
    """A third of the queries at most for dev; both parts search the same kind of documents."""
    queries = _shuffled(queries, seed)
    dev = min(sizes.dev.queries, len(queries) // 3)
    own = {"dev": (queries[:dev], sizes.dev), "test": (queries[dev:][: sizes.test.queries], sizes.test)}
    return [
        (part, _searched(name, some, documents, size.documents, seed)) for part, (some, size) in own.items() if some
    ]


def _searched(
    name: str, queries: list[tuple[str, list[str]]], documents: dict[str, str], most: int, seed: int
) -> Retrieval:
    """The task with all relevant documents, and with others until there are `most`."""
    relevant = list(dict.fromkeys(key for _, keys in queries for key in keys))
    others = _shuffled([key for key in documents if key not in set(relevant)], seed)
    kept = [*relevant, *others[: max(0, most - len(relevant))]]
    position = {key: number for number, key in enumerate(kept)}
    asked = [(text, [position[key] for key in keys]) for text, keys in queries]
    return Retrieval(name, asked, [documents[key] for key in kept])


def _banking(folder: Path, sizes: Sizes, seed: int) -> list[tuple[str, Task]]:
    train, test = (_by_label(_read(folder / f"banking77_{part}.jsonl"), seed) for part in ("train", "test"))
    if not train or not test:
        return []
    tasks: list[tuple[str, Task]] = []
    for part, size in (("dev", sizes.dev), ("test", sizes.test)):
        labels = _shuffled(sorted(train), seed)[: size.labels]
        labelled = [(text, label) for label in labels for text in train[label][: size.labelled]]
        # What is asked on dev comes from the end of the training texts, where no part takes labelled ones from.
        source = {label: texts[::-1] for label, texts in train.items()} if part == "dev" else test
        asked = [(text, label) for label in labels for text in source[label][: size.asked]]
        tasks.append((part, Labels("Banking77", labelled, asked)))
    return tasks


def _by_label(rows: list[dict[str, Any]], seed: int) -> dict[str, list[str]]:
    texts = defaultdict(list)
    for row in _shuffled(rows, seed):
        texts[row["label_text"]].append(row["text"])
    return dict(texts)


def _read(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file; none where there is no such file."""
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()]


def _shuffled(items: Sequence[Any], seed: int) -> list[Any]:
    found = list(items)
    random.Random(seed).shuffle(found)
    return found

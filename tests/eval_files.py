"""Small files of every type of local task, made from code."""

import json
from pathlib import Path

TOPICS = {
    "river": ["the river floods the valley", "a boat drifts down the stream", "water runs over the stones"],
    "music": ["the violin plays a slow tune", "drums open the concert", "she sings in the old choir"],
    "bread": ["the baker kneads the dough", "fresh loaves cool on the rack", "flour covers the kitchen table"],
}
SENTENCES = [(topic, text) for topic, texts in TOPICS.items() for text in texts]


def write_jsonl(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_tasks(folder: Path) -> Path:
    """One task of every type."""
    labelled = [{"text": text, "label": topic} for topic, text in SENTENCES]
    pairs = [(a, b) for i, a in enumerate(SENTENCES) for b in SENTENCES[i + 1 :]]
    same = [
        {"sentence1": a[1], "sentence2": b[1], "label": int(a[0] == b[0]), "score": 5.0 * (a[0] == b[0]) - i / 100}
        for i, (a, b) in enumerate(pairs)
    ]
    write_jsonl(folder / "Sts.sts.jsonl", same)
    write_jsonl(folder / "Pairs.pairs.jsonl", same)
    write_jsonl(folder / "Clusters.clustering.jsonl", labelled)
    write_jsonl(folder / "Classes.classification" / "train.jsonl", labelled)
    write_jsonl(
        folder / "Classes.classification" / "test.jsonl", [{**row, "text": f"{row['text']} today"} for row in labelled]
    )
    corpus = [{"id": f"d{i}", "title": topic, "text": text} for i, (topic, text) in enumerate(SENTENCES)]
    write_jsonl(folder / "Search.retrieval" / "corpus.jsonl", corpus)
    write_jsonl(
        folder / "Search.retrieval" / "queries.jsonl",
        [{"id": f"q{i}", "text": topic, "relevant": [f"d{3 * i}", f"d{3 * i + 1}"]} for i, topic in enumerate(TOPICS)],
    )
    others = {topic: [text for other, text in SENTENCES if other != topic] for topic in TOPICS}
    write_jsonl(
        folder / "Ranks.reranking.jsonl",
        [{"query": t, "positive": texts[:2], "negative": others[t]} for t, texts in TOPICS.items()],
    )
    write_jsonl(
        folder / "Triples.triplets.jsonl",
        [{"query": t, "positive": texts[0], "negative": others[t][0]} for t, texts in TOPICS.items()],
    )
    write_jsonl(
        folder / "Summaries.summarization.jsonl",
        [
            {"text": " ".join(texts), "human_summaries": texts[:2], "machine_summaries": [t, *others[t][:3]],
             "relevance": [4.5, 3, 2, 1]}
            for t, texts in TOPICS.items()
        ],
    )  # fmt: skip
    return folder


def write_beir(folder: Path, **qrels: str) -> Path:
    """BEIR's layout: two documents, three queries, and a file of judgements for each split."""
    corpus = [
        {"_id": "d1", "title": "T", "text": "one", "metadata": {}},
        {"_id": "d2", "title": "", "text": "", "metadata": {}},
    ]
    write_jsonl(folder / "corpus.jsonl", corpus)
    write_jsonl(folder / "queries.jsonl", [{"_id": f"q{n}", "text": f"ask {n}", "metadata": {}} for n in (1, 2, 3)])
    for split, lines in qrels.items():
        (folder / "qrels").mkdir(exist_ok=True)
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    return folder

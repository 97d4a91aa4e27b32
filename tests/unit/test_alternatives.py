"""Samples with several positives or negatives: which of them a pass takes, which are dropped, what rewards see."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_files import load_program
from tiny import save_tiny, tiny_tokenizer

from verl.config import DataConfig
from verl.data.collator import PromptCollator
from verl.data.dataset import PromptDataset
from verl.data.step_batches import StepBatches, prompt_batches
from verl.embedding.prompts import PromptRenderer, rationale_messages
from verl.embedding.settings import EmbedderSettings
from verl.errors import UserError
from verl.protocol import DataProto
from verl.step_schedule import StepSchedule
from verl.workers.reward_manager.hidden import HiddenRewardManager

ROLES = ("positive", "query", "negative")
# Of each sample its positives and negatives.
SAMPLES = [(["p0"], ["n0"]), (["p1", "p1b", "p1c"], ["n1", "n1b"]), (["p2", "p2b"], ["n2", "n2b", "n2c", "n2d", "n2e"])]


def rows_of(samples: list[tuple[list[str], list[str]]]) -> list[dict[str, Any]]:
    return [
        {
            "data_source": "supervised",
            "prompt": rationale_messages(positives[0], system_prompt="Own."),
            "reward_model": None,
            "extra_info": None,
            "multi_input": {"query": f"q{i}", "instruction": positives[0], "negative_document": negatives[0]},
            "positives": positives if len(positives) > 1 else None,
            "negatives": negatives if len(negatives) > 1 else None,
        }
        for i, (positives, negatives) in enumerate(samples)
    ]


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    pq.write_table(pa.Table.from_pylist(rows), file)
    return str(file)


def dataset_of(*files: str, limit: int | None = None, **settings: Any) -> PromptDataset:
    renderer = PromptRenderer(tiny_tokenizer(), limit)
    if limit is not None:
        settings["max_prompt_length"] = limit
    return PromptDataset(list(files), DataConfig(**settings), ROLES, renderer)


def collator(limit: int | None = None) -> PromptCollator:
    return PromptCollator(PromptRenderer(tiny_tokenizer(), limit), EmbedderSettings(), "data_source")


def steps_of(dataset: PromptDataset, first_step: int, last_step: int, samples: int = 1) -> list[DataProto]:
    batches = StepBatches(StepSchedule(len(dataset), samples, samples), first_step, last_step, seed=None)
    return list(prompt_batches(dataset, batches, collator(), num_workers=0, timeout_s=0))


def texts_by_role(rows: DataProto) -> dict[str, list[str]]:
    columns = rows.non_tensor_batch
    return {role: [t for t, r in zip(columns["text"], columns["role"], strict=True) if r == role] for role in ROLES}


@pytest.mark.parametrize("k", [1, 2, 4])
def test_every_pass_takes_the_next_positive_and_the_next_negatives(tmp_path, k):
    dataset = dataset_of(write(tmp_path / "in.parquet", rows_of(SAMPLES)), negatives_per_query=k)
    steps = steps_of(dataset, 0, 15)
    for step, rows in enumerate(steps):
        epoch, index = divmod(step, 3)
        positives, negatives = SAMPLES[index]
        wanted = [negatives[(epoch * k + j) % len(negatives)] for j in range(min(k, len(negatives)))]
        found = texts_by_role(rows)
        assert found == {"positive": [positives[epoch % len(positives)]], "query": [f"q{index}"], "negative": wanted}
        others = [p for p in positives if p not in found["positive"]]
        assert all(list(each) == others for each in rows.non_tensor_batch["other_positives"])
        assert set(rows.non_tensor_batch["uid"]) == {index}
        for i, text in enumerate(rows.non_tensor_batch["text"]):
            ids = rows.batch["prompts"][i, -int(rows.batch["prompt_length"][i]) :]
            assert f"Own.<|im_end|>\n<|im_start|>user\n{text}<|im_end|>" in tiny_tokenizer().decode(ids)
    resumed = steps_of(dataset, 7, 15)
    assert [texts_by_role(rows) for rows in resumed] == [texts_by_role(rows) for rows in steps[7:]]


def test_the_first_pass_has_the_samples_that_validation_and_the_probe_see(tmp_path):
    dataset = dataset_of(write(tmp_path / "in.parquet", rows_of(SAMPLES)))
    (rows,) = steps_of(dataset, 0, 1, samples=3)
    plain = collator()([dataset[i] for i in range(3)])
    assert texts_by_role(rows) == texts_by_role(plain)
    assert {role: texts[1] for role, texts in texts_by_role(plain).items()} == {
        "positive": "p1", "query": "q1", "negative": "n1",
    }  # fmt: skip


def test_files_of_earlier_versions_have_no_lists_and_may_stand_beside_new_ones(tmp_path):
    names = ("positives", "negatives")
    old = [{key: value for key, value in row.items() if key not in names} for row in rows_of(SAMPLES)]
    files = [write(tmp_path / "old.parquet", old), write(tmp_path / "new.parquet", rows_of(SAMPLES))]
    alone = dataset_of(files[0], negatives_per_query=3)
    assert [texts_by_role(rows)["negative"] for rows in steps_of(alone, 0, 6)] == [["n0"], ["n1"], ["n2"]] * 2
    both = dataset_of(*files, negatives_per_query=3)
    found = [texts_by_role(rows)["negative"] for rows in steps_of(both, 0, 6)]
    assert found == [["n0"], ["n1"], ["n2"], ["n0"], ["n1", "n1b"], ["n2", "n2b", "n2c"]]


LONG = "long " * 30
UNEVEN = [
    (["p0", LONG, "p0c"], ["n0", "n0b"]),
    (["p1", "p1b"], ["n1", LONG]),
    ([LONG, "p2b"], ["n2", "n2b"]),
    (["p3"], [LONG, "n3b"]),
]
FITTING = [(["p0", "p0c"], ["n0", "n0b"]), (["p1", "p1b"], ["n1"])]


def limit_of() -> int:
    return PromptRenderer(tiny_tokenizer()).lengths([rationale_messages("query 0", system_prompt="Own.")])[0] + 5


def test_over_long_texts_of_lists_are_dropped_and_samples_only_with_their_first_ones(tmp_path):
    file = write(tmp_path / "in.parquet", rows_of(UNEVEN))
    dataset = dataset_of(file, limit=limit_of(), filter_overlong_prompts=True)
    rows = dataset.table.select(["multi_input", "positives", "negatives"]).to_pylist()
    assert [(row["positives"], row["negatives"]) for row in rows] == FITTING
    assert dataset.num_dropped == 2
    assert dataset_of(file, limit=limit_of()).share_cut == 1.0
    with pytest.raises(UserError, match="4 of 4 samples have a text"):
        dataset_of(file, limit=limit_of(), truncation="error")


def test_the_filter_for_files_leaves_out_the_same_texts(tmp_path, capsys):
    model = save_tiny(tmp_path / "model")
    single = (["p4"], ["n4"])
    file = write(tmp_path / "in.parquet", rows_of([*UNEVEN, single]))
    argv = ["--train_parquet", file, "--out_dir", tmp_path / "out", "--tokenizer_path", model, "--max_len", limit_of()]
    program = load_program("offline_filter_data")
    assert program.main([str(a) for a in argv]) == 0
    rows = pq.read_table(tmp_path / "out/train.parquet").to_pylist()
    assert [(row["positives"], row["negatives"]) for row in rows] == [*FITTING, (None, None)]
    assert pq.read_schema(tmp_path / "out/train.parquet").field("positives").type == pa.list_(pa.string())
    report = json.loads((tmp_path / "out/filter.json").read_text())["splits"]["train"]
    assert report["over_long"] == {"positive": 1, "query": 0, "negative": 1, "positives": 2, "negatives": 2}
    assert len(dataset_of(str(tmp_path / "out/train.parquet"), limit=limit_of(), truncation="error")) == 3


BAD_LISTS = {
    "a null text": ({"negatives": ["n", None]}, "row 2: negatives is null"),
    "an empty text": ({"positives": ["p", " "]}, "row 2: positives has an empty text"),
    "no list": ({"negatives": "n"}, "column 'negatives' is string instead of a list of texts"),
}


@pytest.mark.parametrize(("columns", "message"), BAD_LISTS.values(), ids=BAD_LISTS.keys())
def test_a_bad_list_is_refused_by_its_row(tmp_path, columns, message):
    rows = rows_of(SAMPLES)
    if isinstance(next(iter(columns.values())), str):
        rows = [row | columns for row in rows]
    rows[1] |= columns
    with pytest.raises(UserError, match=message):
        dataset_of(write(tmp_path / "in.parquet", rows))


# ---- Rewards and the loss on the embeddings, against loops


def unit(draw: random.Random) -> list[float]:
    return torch.nn.functional.normalize(torch.tensor([draw.gauss(0, 1) for _ in range(8)]), dim=0).tolist()


def step_of(seed: int) -> list[dict[str, Any]]:
    """Groups of different sizes with one to four negatives, rows mixed up, and texts that several samples know."""
    draw = random.Random(seed)
    pool = ["a", "b", "c"]
    rows = []
    for uid, (size, negatives) in enumerate([(3, 1), (2, 4), (1, 2), (4, 3)]):
        others = tuple(draw.sample(pool, draw.randint(0, 2)))
        query, positive = (draw.choice([f"{role} {uid}", *pool]) for role in ("query", "positive"))
        texts = [("positive", positive)] * size + [("query", query)]
        texts += [("negative", draw.choice([f"negative {uid} {j}", *pool])) for j in range(negatives)]
        rows += [
            {"uid": uid, "role": role, "text": text, "other_positives": others, "vector": unit(draw)}
            for role, text in texts
        ]
    draw.shuffle(rows)
    return rows


def as_data(rows: list[dict[str, Any]]) -> DataProto:
    vectors = torch.tensor([row["vector"] for row in rows])
    tensors = {
        "embeddings": vectors,
        "truncated": torch.zeros(len(rows), dtype=torch.bool),
        "response_length": torch.ones(len(rows), dtype=torch.int64),
        "trained": torch.tensor([row["role"] == "positive" for row in rows]),
    }
    names = ("uid", "role", "text", "other_positives")
    return DataProto.from_dict(tensors, {name: [row[name] for row in rows] for name in names}, {"step": 1})


def dot(a: dict[str, Any], b: dict[str, Any]) -> float:
    return math.fsum(x * y for x, y in zip(a["vector"], b["vector"], strict=True))


def of(rows: list[dict[str, Any]], role: str, uid: int | None = None) -> list[dict[str, Any]]:
    return [row for row in rows if row["role"] == role and uid in (None, row["uid"])]


def right(rows: list[dict[str, Any]], uid: int) -> set[str]:
    (query,) = of(rows, "query", uid)
    return {query["text"], of(rows, "positive", uid)[0]["text"], *query["other_positives"]}


def slow_cross_entropy(logits: list[float]) -> float:
    """Of the first."""
    top = max(logits)
    return top + math.log(math.fsum(math.exp(x - top) for x in logits)) - logits[0]


@pytest.mark.parametrize("seed", range(8))
def test_rewards_with_several_negatives_equal_their_loops(seed):
    rows = step_of(seed)
    out = HiddenRewardManager(temperature=1.0)(as_data(rows))
    contrast = HiddenRewardManager(temperature=1.0, objective="infonce")(as_data(rows)).columns["contrast"]
    for place, row in enumerate(of(rows, "positive")):
        (query,) = of(rows, "query", row["uid"])
        cosines = [dot(query, negative) for negative in of(rows, "negative", row["uid"])]
        assert out.columns["negative"][place].item() == pytest.approx(-math.fsum(cosines) / len(cosines), abs=1e-6)
        known = right(rows, row["uid"])
        wrong = [q for q in of(rows, "query") if q["uid"] != row["uid"]] + of(rows, "negative")
        logits = [dot(row, query), *(dot(row, other) for other in wrong if other["text"] not in known)]
        assert contrast[place].item() == pytest.approx(-slow_cross_entropy(logits), abs=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_the_contrastive_loss_with_several_negatives_equals_its_loop(seed):
    rows = step_of(seed)
    losses = []
    for row in of(rows, "positive"):
        known, (query,) = right(rows, row["uid"]), of(rows, "query", row["uid"])
        strangers = {q["uid"] for q in of(rows, "query") if not right(rows, q["uid"]) & known}
        hard = [negative for negative in of(rows, "negative") if negative["text"] not in known]
        for of_role, this, own in (("query", row, query), ("positive", query, row)):
            wrong = [other for other in of(rows, of_role) if other["uid"] in strangers] + hard
            losses.append(slow_cross_entropy([dot(this, other) / 0.05 for other in [own, *wrong]]))
    out = HiddenRewardManager(contrastive_weight=1.0)(as_data(rows))
    assert out.metrics["contrastive/loss"] == pytest.approx(math.fsum(losses) / len(losses), rel=1e-5)


def test_the_other_positives_in_the_examples_matter():
    """Guards the two tests above: without them they would expect something else."""
    changed = 0
    for seed in range(8):
        rows = step_of(seed)
        data = as_data(rows)
        manager = HiddenRewardManager(temperature=1.0, objective="infonce", contrastive_weight=1.0)
        with_them = manager(data)
        data.non_tensor_batch.pop("other_positives")
        without = manager(data)
        gap = (with_them.columns["contrast"] - without.columns["contrast"]).abs().max()
        changed += bool(gap > 0.01 and with_them.metrics["contrastive/loss"] != without.metrics["contrastive/loss"])
    assert changed >= 3

"""The plan of an evaluation: texts counted, a rate measured, tokens and hours of each task."""

from types import SimpleNamespace

import pytest

from verl.embedding.settings import EmbedderSettings
from verl.encoder.usage import Usage
from verl.evaluation import plan
from verl.evaluation.local_tasks import LocalTask
from verl.evaluation.plan import Rate, TaskCost, TextCount, count_texts, measure_rate, plan_costs


class Texts(LocalTask):
    """As much of a local task as the plan reads."""

    def __init__(self, name: str, *texts: str) -> None:
        self.metadata = SimpleNamespace(name=name)
        self.texts = list(texts)


def published(statistics, splits=("test",), subsets=("en",), parts=None) -> SimpleNamespace:
    """As much of one of mteb's own tasks."""
    metadata = SimpleNamespace(name="Published", descriptive_stats=statistics, tasks=parts)
    return SimpleNamespace(metadata=metadata, eval_splits=list(splits), hf_subsets=list(subsets))


def column(chars: int, average: float, unique: int) -> dict:
    return {"total_text_length": chars, "min_text_length": 1, "average_text_length": average, "unique_texts": unique}


PAIR = {"num_samples": 5, "first": column(60, 12.0, 4), "second": column(50, 10.0, 5)}
DOCUMENTS = {"num_samples": 3, "queries": {"text_statistics": column(9, 3.0, 3), "image_statistics": None}}
MANY = {**PAIR, "hf_subset_descriptive_stats": {"en": DOCUMENTS, "de": PAIR}}


@pytest.mark.parametrize(
    ("task", "count"),
    [
        (Texts("Own", "a", "bcd", "a"), TextCount(3, 2, 5)),
        (published({"test": PAIR, "train": MANY}), TextCount(10, 9, 110)),
        (published({"test": PAIR, "dev": DOCUMENTS}, splits=("test", "dev")), TextCount(13, 12, 119)),
        # Of several subsets those that are evaluated; where none of them is, the split as a whole.
        (published({"test": MANY}), TextCount(3, 3, 9)),
        (published({"test": MANY}, subsets=("en", "de")), TextCount(13, 12, 119)),
        (published({"test": MANY}, subsets=("default",)), TextCount(10, 9, 110)),
        (published({"test": PAIR}, splits=("test", "dev")), None),
        (published(None), None),
        (published({}, parts=[published({"test": PAIR}), published({"test": DOCUMENTS})]), TextCount(13, 12, 119)),
        (published({}, parts=[published({"test": PAIR}), published(None)]), None),
    ],
)
def test_texts_are_counted_in_what_is_evaluated(task, count):
    assert count_texts(task) == count


# 3 different texts of 4, of 20 characters each.
LONG = Texts("Long", "a" * 20, "b" * 20, "c" * 20, "a" * 20)
RATE = Rate(rationale_tokens=50.0, seconds=1.5, chars=10.0)


@pytest.mark.parametrize(
    ("thinks", "hours"),
    # Without rationales a text of twice the sample's length takes twice as long.
    [(True, 3 * 1.5 / 3600), (False, 3 * 1.5 * 2 / 3600)],
)
def test_a_task_costs_its_different_texts_at_the_samples_rate(thinks, hours):
    found = plan_costs([LONG, published(None), Texts("Empty")], RATE, thinks)
    assert found == [
        TaskCost("Long", TextCount(4, 3, 80), pytest.approx(150), pytest.approx(hours)),
        TaskCost("Published", None, 0, 0),
        TaskCost("Empty", TextCount(0, 0, 0), 0, 0),
    ]


class Encoder:
    """Takes ten seconds for each text that it does not have; the rationale has as many tokens as the text letters."""

    def __init__(self, *stored: str, thinks: bool = True) -> None:
        self.settings = EmbedderSettings(think=thinks)
        self.seconds = 0.0
        self.usage = Usage()
        self.calls: list[tuple] = []
        self._stored = set(stored)

    def encode(self, texts, *, batch_size, show_progress_bar=None, think=None, **options) -> None:
        self.calls.append((list(texts), batch_size, think, options))
        new = [text for text in texts if text not in self._stored]
        self._stored.update(new)
        self.seconds += 10 * len(new)
        self.usage.texts += len(texts)
        self.usage.vectors_made += len(new)
        if self.settings.think if think is None else think:
            self.usage.rationales_made += len(new)
            self.usage.generated_tokens += sum(map(len, new))


@pytest.mark.parametrize(
    ("stored", "think", "rate"),
    [
        ((), None, Rate(rationale_tokens=4, seconds=10, chars=4)),
        # Of the two that are new; a text has as many letters as before.
        (("aa",), True, Rate(rationale_tokens=5, seconds=10, chars=4)),
        ((), False, Rate(rationale_tokens=0, seconds=10, chars=4)),
        (("aa",), False, Rate(rationale_tokens=0, seconds=10, chars=4)),
        (("aa", "bbbb", "cccccc"), None, None),
        (("aa", "bbbb", "cccccc"), False, None),
    ],
)
def test_the_rate_is_that_of_what_the_sample_made_after_a_warm_up_with_other_texts(monkeypatch, stored, think, rate):
    encoder, sample = Encoder(*stored), ["aa", "bbbb", "cccccc"]
    monkeypatch.setattr(plan, "time", SimpleNamespace(perf_counter=lambda: encoder.seconds))
    assert measure_rate(encoder, sample, {"think": think, "seed": 3}, batch_size=7) == rate
    (warm_up, *_), (measured, *options) = encoder.calls
    assert measured == sample and options == [7, think, {"seed": 3}]
    assert len(warm_up) == 2 and not {*warm_up} & {*sample}


def test_the_rate_of_a_model_that_embeds_without_rationales_is_that_of_its_vectors(monkeypatch):
    encoder = Encoder(thinks=False)
    monkeypatch.setattr(plan, "time", SimpleNamespace(perf_counter=lambda: encoder.seconds))
    assert measure_rate(encoder, ["aa", "bbbb"], {}, None) == Rate(rationale_tokens=0, seconds=10, chars=3)

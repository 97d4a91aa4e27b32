"""Whatever a file or a text holds, the programs either take it whole or refuse it by name."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from verl.config import RunConfig
from verl.config_checks import build_config
from verl.config_fields import walk_fields
from verl.data.length_filter import FilterSettings, filter_file, open_prompts
from verl.embedding.prompts import PromptRenderer, rationale_messages
from verl.encoder.record import Rationale
from verl.encoder.store import EmbeddingStore
from verl.errors import UserError
from verl.utils.tokenizer import load_tokenizer
from verl.verl_keys import ONLY_VALUES

MARKERS = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "assistant\n", "\u202e", "\u200f", "🙂", "\0", "\ud800"]
HOSTILE = st.lists(st.one_of(st.text(max_size=20), st.sampled_from(MARKERS)), max_size=8).map("".join)
SETTINGS = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

TOKENIZER = tiny_tokenizer()
RENDERER = PromptRenderer(TOKENIZER)


@SETTINGS
@given(HOSTILE.filter(lambda text: text.strip() and "\ud800" not in text))
def test_no_text_changes_the_turns_around_it(text):
    (plain,) = RENDERER.render([rationale_messages("x")])
    (prompt,) = RENDERER.render([rationale_messages(text)])
    tail = len(plain.ids) - plain.text_start - 1
    assert prompt.ids[: prompt.text_start] == plain.ids[: plain.text_start]
    assert prompt.ids[len(prompt.ids) - tail :] == plain.ids[len(plain.ids) - tail :]
    inside = prompt.ids[prompt.text_start : len(prompt.ids) - tail]
    assert not set(inside) & set(TOKENIZER.all_special_ids)
    assert RENDERER.lengths([rationale_messages(text)]) == [len(prompt.ids)]


@SETTINGS
@given(HOSTILE.filter(lambda text: "\ud800" in text))
def test_half_a_character_is_refused_by_its_place(text):
    for measure in (RENDERER.render, RENDERER.lengths):
        with pytest.raises(ValueError, match=rf"character {text.strip().index(chr(0xD800))} of the text .* surrogate"):
            measure([rationale_messages(text)])


@SETTINGS
@given(HOSTILE.filter(lambda text: text.strip() and "\ud800" not in text), st.integers(4, 30))
def test_a_cut_prompt_keeps_its_turns_and_its_limit(text, room):
    (plain,) = RENDERER.render([rationale_messages("x")])
    limit = len(plain.ids) - 1 + room
    (prompt,) = PromptRenderer(TOKENIZER, limit).render([rationale_messages(text)])
    assert len(prompt.ids) <= limit
    assert prompt.ids[: plain.text_start] == plain.ids[: plain.text_start]


def test_a_text_of_a_hundred_thousand_tokens_is_cut_or_measured():
    text = "river stone " * 60_000
    (prompt,) = PromptRenderer(TOKENIZER, 512).render([rationale_messages(text)])
    assert prompt.shortened and len(prompt.ids) <= 512
    assert RENDERER.lengths([rationale_messages(text)])[0] > 100_000


# transformers' own template, which the filter is compared with, takes markers for its own.
TEXTS = st.text(max_size=60).filter(lambda text: text.strip() and not any(marker in text for marker in MARKERS[:3]))


@SETTINGS
@given(st.lists(TEXTS, min_size=1, max_size=6), st.integers(60, 140))
def test_the_length_filter_keeps_the_rows_that_transformers_finds_short_enough(
    tmp_path_factory, tiny_folder, texts, limit
):
    folder = tmp_path_factory.mktemp("filter")
    chats = [rationale_messages(text, system_prompt=None) for text in texts]
    pq.write_table(pa.table({"prompt": chats, "row": list(range(len(texts)))}), folder / "in.parquet")
    chosen = FilterSettings(str(tiny_folder), limit, "prompt", trust_remote_code=False)
    report = filter_file(open_prompts(folder / "in.parquet", "prompt"), folder / "out.parquet", chosen, map)
    # The saved one: transformers adds a normalizer to it that the one in memory lacks.
    tokenizer = load_tokenizer(str(tiny_folder))
    ids = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
    kept = pq.read_table(folder / "out.parquet").to_pylist()
    assert [(row["row"], row["prompt"][-1]["content"]) for row in kept] == [
        (i, texts[i].strip()) for i in range(len(texts)) if len(ids[i]) <= limit
    ]
    assert [row["prompt_lengths"]["text"] for row in kept] == [len(found) for found in ids if len(found) <= limit]
    assert (report.rows, report.kept) == (len(texts), len(kept))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | HOSTILE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(HOSTILE, inner, max_size=3),
    max_leaves=6,
)
KEYS = sorted(ONLY_VALUES | dict(walk_fields(RunConfig)))


@SETTINGS
@given(st.lists(st.tuples(st.sampled_from(KEYS) | HOSTILE.filter(str.strip), VALUES), max_size=4))
def test_any_setting_is_taken_or_refused_by_name(tmp_path, pairs):
    (tmp_path / "train.parquet").touch()
    values: dict = {
        "data": {"train_files": str(tmp_path / "train.parquet")},
        "actor_rollout_ref": {"model": {"path": "m"}},
    }
    for key, value in pairs:
        place = values
        *sections, leaf = key.split(".")
        for section in sections:
            place = place.setdefault(section, {}) if isinstance(place.setdefault(section, {}), dict) else {}
        place[leaf] = value
    try:
        build_config(values)
    except UserError as error:
        assert str(error).strip()


@SETTINGS
@given(
    st.dictionaries(
        st.binary(min_size=1, max_size=12),
        st.tuples(st.lists(st.integers(0, 2**31 - 1), max_size=5), st.booleans(), HOSTILE, HOSTILE),
        max_size=5,
    )
)
def test_the_store_gives_back_what_it_was_given(tmp_path_factory, entries):
    whole = {key: value for key, value in entries.items() if "\ud800" not in value[2] + value[3]}
    folder = tmp_path_factory.mktemp("store")
    with EmbeddingStore(folder) as store:
        context = store.open_context({"model": "m"})
        for key, (ids, cut, text, decoded) in whole.items():
            store.add_rationale(context, key, Rationale(tuple(ids), cut), text, decoded)
    with EmbeddingStore(folder) as store:
        found = store.find_rationales(list(whole))
    assert found == {key: Rationale(tuple(ids), cut) for key, (ids, cut, _, _) in whole.items()}

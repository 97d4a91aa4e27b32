"""What chat templates of model families do with a system turn, with the date and with themselves, in every program."""

import json
import re
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import load_program, rows_of, write_texts
from data_files import run as process_data
from tiny import save_tiny, tiny_tokenizer

import verl.encoder.__main__ as encode
from verl import GraceEncoder, eval_generation
from verl.config import DataConfig, RunConfig
from verl.data.dataset import PromptDataset
from verl.embedding.prompts import SYSTEM_PROMPT, PromptRenderer, rationale_messages
from verl.embedding.settings import EmbedderSettings
from verl.errors import UserError
from verl.evaluation.exact_match import Question
from verl.evaluation.generation import render
from verl.prompt_options import read_system_prompt
from verl.trainer.display import RunDisplay
from verl.trainer.run import build_collate
from verl.workers.reward_manager.hidden import HiddenRewardManager

offline_filter_data = load_program("offline_filter_data")

SYSTEM = "Think <before> you & embed.\nThen write."
HEADER = "{% if add_generation_prompt %}[A]{% endif %}"
TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}[/]{% endfor %}"
ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
)
FIRST_IS_SYSTEM = "{% if messages[0].role == 'system' %}"
TAKE_SYSTEM = "{% set s = messages[0].content %}{% set messages = messages[1:] %}"

# By what they do: the template; how it fails or what it shows before the user's text; the same when folded.
NO_SYSTEM_TURN = {
    "raises": (FIRST_IS_SYSTEM + "{{ raise_exception('no system turns') }}{% endif %}" + TURNS + HEADER, "[user]"),
    "raises, and trims the user's turn": (
        FIRST_IS_SYSTEM + "{{ raise_exception('no system turns') }}{% endif %}" + ALTERNATE
        + "[{{ m.role }}]{{ m.content | trim }}[/]{% endfor %}" + HEADER,
        "[user]",
    ),
    "wants roles to alternate": (
        ALTERNATE + "{% if m.role == 'user' %}[I] {{ m.content }} [/I]{% else %}{{ m.content + eos_token }}{% endif %}"
        "{% endfor %}",
        "[I] ",
    ),
    "knows two roles": (
        "{% for m in messages %}{{ {'user': '[U]', 'assistant': '[A]'}[m.role] + m.content }}{% endfor %}" + HEADER,
        "[U]",
    ),
    "drops it": (
        "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}[/]{% endfor %}" + HEADER,
        "[user]",
    ),
    "has a text of its own": ("[system]Be good.[/]" + "{% for m in messages if m.role != 'system' %}"
                              "[{{ m.role }}]{{ m.content }}[/]{% endfor %}" + HEADER, "[system]Be good.[/][user]"),
    "shows its beginning": (
        FIRST_IS_SYSTEM + TAKE_SYSTEM + "[S]{{ s[:20] }}{% endif %}" + TURNS + HEADER, "[user]",
    ),
    "shows its first line": (
        FIRST_IS_SYSTEM + TAKE_SYSTEM + "[S]{{ s.split('\\n')[0] }}{% endif %}" + TURNS + HEADER, "[user]",
    ),
}  # fmt: skip
SYSTEM_TURN = {
    "a turn": (TURNS + HEADER, f"[system]{SYSTEM}[/][user]"),
    "trimmed, in capitals": (
        "{% for m in messages %}[{{ m.role }}]"
        "{{ m.content | trim | upper if m.role == 'system' else m.content }}[/]{% endfor %}" + HEADER,
        f"[system]{SYSTEM.upper()}[/][user]",
    ),
    "in the first user turn": (
        FIRST_IS_SYSTEM + TAKE_SYSTEM + "{% endif %}{% for m in messages %}{% if m.role == 'user' %}[I] "
        "{% if loop.first and s is defined %}<<S>>{{ s }}<</S>>{% endif %}{{ m.content | trim }} [/I]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        f"[I] <<S>>{SYSTEM}<</S>>",
    ),
    "in place of a text of its own": (
        FIRST_IS_SYSTEM + TAKE_SYSTEM + "{% else %}{% set s = 'Be good.' %}{% endif %}[S]{{ s }}" + TURNS + HEADER,
        f"[S]{SYSTEM}[user]",
    ),
    "escaped": (TURNS.replace("m.content }}", "m.content | e }}") + HEADER, "[system]Think &lt;before&gt; you &amp; "
                "embed.\nThen write.[/][user]"),
}  # fmt: skip


def renderer(template: str, **options) -> PromptRenderer:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.name_or_path = "some/model"
    return PromptRenderer(tokenizer, **options)


def model_with(folder: Path, template: str) -> Path:
    save_tiny(folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def one_line(capsys, program: str) -> str:
    error = capsys.readouterr().err
    assert error.startswith(f"{program}: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize("name", NO_SYSTEM_TURN)
def test_a_template_without_a_system_turn_is_an_error_that_names_the_setting(name):
    template, _ = NO_SYSTEM_TURN[name]
    with pytest.raises(UserError, match=r"some/model.*(takes no|leaves out the) system turn.*data\.system_prompt_in"):
        renderer(template).render([rationale_messages("a text", SYSTEM)])


@pytest.mark.parametrize("name", NO_SYSTEM_TURN)
def test_folded_the_system_prompt_stands_before_the_text_and_is_not_pooled(name):
    template, before = NO_SYSTEM_TURN[name]
    folding = renderer(template, system_prompt_in="user")
    (prompt,) = folding.render([rationale_messages("a text", SYSTEM)])
    prefix, suffix = folding.frame(rationale_messages("", SYSTEM))
    assert prefix == f"{before}{SYSTEM}\n\n"
    decode = folding.tokenizer.decode
    assert decode(prompt.ids[: prompt.text_start]) == prefix
    assert decode(prompt.ids[prompt.text_start :]) == "a text" + suffix
    # Without a system prompt there is nothing to fold.
    assert folding.frame(rationale_messages("", None))[0].endswith(before)


@pytest.mark.parametrize("name", SYSTEM_TURN)
def test_a_system_text_that_the_template_shows_in_its_own_way_is_taken(name):
    template, before = SYSTEM_TURN[name]
    (prompt,) = renderer(template).render([rationale_messages("a text", SYSTEM)])
    assert tiny_tokenizer().decode(prompt.ids[: prompt.text_start]) == before


def test_a_text_is_cut_alone_when_the_system_prompt_stands_in_its_turn():
    template, _ = NO_SYSTEM_TURN["raises"]
    whole, cut = (
        renderer(template, max_length=limit, system_prompt_in="user").render([rationale_messages("abcdef", SYSTEM)])[0]
        for limit in (None, len(f"[user]{SYSTEM}\n\n" + "abc" + "[/][A]"))
    )
    assert cut.text == "abc" and cut.ids[: cut.text_start + 3] == whole.ids[: whole.text_start + 3]
    assert tiny_tokenizer().decode(cut.ids[cut.text_start :]) == "abc[/][A]"


def test_an_earlier_turn_takes_the_system_prompt_of_a_longer_chat():
    chat = [*rationale_messages("first", SYSTEM), {"role": "assistant", "content": "reply"},
            {"role": "user", "content": "second"}]  # fmt: skip
    folding = renderer(NO_SYSTEM_TURN["wants roles to alternate"][0], system_prompt_in="user")
    (prompt,) = folding.render([chat])
    assert folding.tokenizer.decode(prompt.ids) == f"[I] {SYSTEM}\n\nfirst [/I]reply<|im_end|>[I] second [/I]"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}", "{{ nothing.at.all }}", "{{ 1 + messages[0].content }}", "{{ 1 // 0 }}",
        "{{ messages[0].content.no_such() }}", "{{ messages[7].content }}", "{{ ''.__class__.mro() }}",
        "{{ raise_exception('one\\nand another line') }}", "{{ raise_exception('') }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["system", "user"])
def test_a_template_that_fails_is_one_line(template, place):
    for chat in (rationale_messages("a text"), rationale_messages("a text", None)):
        with pytest.raises(UserError, match=r"^the chat template of 'some/model' fails for the turns user") as failed:
            renderer(template, system_prompt_in=place).render([chat])
        assert "\n" not in str(failed.value)


@pytest.mark.parametrize("place", ["system", "user"])
def test_a_prompt_that_does_not_begin_the_answer_is_an_error(place):
    with pytest.raises(UserError, match=r"does not begin the assistant's turn: a prompt ends before '\[assistant\]'"):
        renderer(TURNS, system_prompt_in=place).render([rationale_messages("a text")])


@pytest.mark.parametrize(
    "template",
    [
        TURNS + "[assistant]", TURNS + HEADER, TURNS + "{% if add_generation_prompt %}[assistant]<think>{% endif %}",
        "{% for m in messages %}[I]{{ m.content }}[/I]{% endfor %}",
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ raise_exception('single turns') }}{% endif %}"
        "{{ m.content }}\n{% endfor %}",
    ],
)  # fmt: skip
def test_a_prompt_that_begins_the_answer_in_its_own_way_is_taken(template):
    assert renderer(template).frame(rationale_messages("", SYSTEM))


DATED = {
    "strftime_now": "[{{ strftime_now('%d %b %Y') }}]",
    "another form": "[{{ strftime_now('%Y-%m-%d') }}]",
    "date_string, or today": "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    "{% endif %}[{{ date_string }}]",
    "date_string, or a day of its own": "{% if not date_string is defined %}{% set date_string = '01 Feb 2023' %}"
    "{% endif %}[{{ date_string }}]",
    "no date": "[]",
}


@pytest.mark.parametrize(
    ("name", "given", "shown", "kept"),
    [
        ("strftime_now", None, "26 Jul 2024", "2024-07-26"),
        ("strftime_now", "2025-03-04", "04 Mar 2025", "2025-03-04"),
        ("another form", None, "2024-07-26", "2024-07-26"),
        ("another form", "2025-03-04", "2025-03-04", "2025-03-04"),
        ("date_string, or today", None, "26 Jul 2024", "2024-07-26"),
        ("date_string, or today", "2025-03-04", "04 Mar 2025", "2025-03-04"),
        ("date_string, or a day of its own", None, "01 Feb 2023", None),
        ("date_string, or a day of its own", "2025-03-04", "04 Mar 2025", "2025-03-04"),
        ("no date", None, "", None),
        ("no date", "2025-03-04", "", None),
    ],
)
def test_a_prompt_shows_the_date_of_the_settings_and_never_todays(name, given, shown, kept):
    dated = renderer(DATED[name] + TURNS + HEADER, template_date=given)
    assert dated.frame(rationale_messages("", SYSTEM))[0] == f"[{shown}][system]{SYSTEM}[/][user]"
    assert dated.template_date == kept
    # What a checkpoint keeps gives the same prompt again.
    again = renderer(DATED[name] + TURNS + HEADER, template_date=kept)
    assert again.frame(rationale_messages("", SYSTEM)) == dated.frame(rationale_messages("", SYSTEM))


def test_the_fingerprint_of_lengths_changes_with_place_and_date():
    options = [{}, {"system_prompt_in": "user"}, {"template_date": "2025-09-26"}]
    assert len({renderer(DATED["strftime_now"] + TURNS + HEADER, **o).fingerprint() for o in options}) == 3


@pytest.mark.parametrize("given", ["tomorrow", "2025-02-30", "26 Jul 2024", ""])
def test_what_is_no_day_is_an_error_that_shows_one(given):
    with pytest.raises(ValueError, match=r"template_date.*is not a day.*2024-07-26"):
        EmbedderSettings().changed(template_date=given)


class TestSystemPrompt:
    """The value of --system_prompt and of data.system_prompt."""

    @pytest.mark.parametrize("given", ["Read the text.", "Embed", "Two\nlines, e.g. these", "and/or no file", "日本語"])
    def test_a_text_is_taken_as_it_is(self, given):
        assert read_system_prompt(given) == given

    @pytest.mark.parametrize("given", ["", "  \n"])
    def test_nothing_is_no_system_turn(self, given):
        assert read_system_prompt(given) == ""
        assert EmbedderSettings(system_prompt="").system_prompt is None

    def test_a_file_is_read_without_its_last_line_end(self, tmp_path, monkeypatch):
        (tmp_path / "my prompt").write_bytes("\ufeffÜber den Text.\nUnd mehr.\r\n".encode())
        assert read_system_prompt(str(tmp_path / "my prompt")) == "Über den Text.\nUnd mehr."
        monkeypatch.setenv("HOME", str(tmp_path))
        assert read_system_prompt("~/my prompt") == "Über den Text.\nUnd mehr."

    @pytest.mark.parametrize("given", ["prompt.txt", "/nowhere/prompt", "~/prompt.md", "my prompts/a.txt", "./p"])
    def test_a_misspelt_file_does_not_become_the_prompt(self, given):
        with pytest.raises(UserError, match=rf"{re.escape(given)!s}.* is not a file that exists"):
            read_system_prompt(given)

    @pytest.mark.parametrize(("content", "message"), [(b"\xff\xfe\x00", "cannot be read"), (b"\n \n", "is empty")])
    def test_a_file_without_a_text_is_an_error(self, tmp_path, content, message):
        (tmp_path / "p.txt").write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_system_prompt(str(tmp_path / "p.txt"))

    def test_half_a_character_is_an_error(self):
        with pytest.raises(UserError, match="half a character, at 3"):
            read_system_prompt("one\ud800 two")

    def test_process_data_writes_it_into_the_rows_and_the_manifest(self, tmp_path, capsys):
        source = write_texts(tmp_path / "in.txt", ["one", "system"])
        (tmp_path / "prompt.txt").write_text("Own words.\n")
        for given, system in (
            (["--system_prompt", tmp_path / "prompt.txt"], "Own words."),
            (["--system_prompt", "one"], "one"),
            ([], SYSTEM_PROMPT),
            (["--system_prompt", ""], None),
        ):
            assert process_data("unsupervised", source, tmp_path / "out", "--test_ratio", 0, *given) == 0
            prompts = [row["prompt"] for row in rows_of(tmp_path / "out", "train")]
            assert prompts == [rationale_messages(text, system) for text in ("one", "system")]
            manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
            assert manifest["arguments"]["system_prompt"] == (system or "")
        capsys.readouterr()
        assert process_data("unsupervised", source, tmp_path / "other", "--system_prompt", "gone.txt") == 2
        assert "'gone.txt' is not a file that exists" in one_line(capsys, "process_data")
        assert not (tmp_path / "other").exists()


def write_rows(path: Path, system: str | None = SYSTEM) -> str:
    rows = [
        {"data_source": "supervised", "prompt": rationale_messages(f"positive {i}", system), "reward_model": None,
         "extra_info": None, "multi_input": {"query": f"query {i}", "instruction": "", "negative_document": f"no {i}"}}
        for i in range(2)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize(
    ("data", "system"),
    [
        ({}, SYSTEM),
        ({"system_prompt": "Other words."}, "Other words."),
        ({"system_prompt": ""}, None),
        ({"system_prompt_in": "user", "template_date": "2025-03-04"}, SYSTEM),
        ({"system_prompt_in": "user", "system_prompt": "Other words."}, "Other words."),
    ],
)
def test_training_its_checkpoint_and_the_filter_see_the_same_prompts(tmp_path, data, system):
    """The ids of a step's rows, those of an encoder of the checkpoint's settings, and the lengths of the filter."""
    template = DATED["strftime_now"] + TURNS + HEADER
    folder, parquet = model_with(tmp_path / "model", template), write_rows(tmp_path / "train.parquet")
    config = RunConfig.model_validate({"data": data})
    training = renderer(
        template, system_prompt_in=config.data.system_prompt_in, template_date=config.data.template_date
    )
    dataset = PromptDataset([parquet], config.data, ("positive", "query", "negative"), training)
    collate = build_collate(config, dataset, training, HiddenRewardManager())
    rows = collate([dataset[0], dataset[1]])
    collate.settings.write(folder)
    assert EmbedderSettings.read(folder).template_date == data.get("template_date", "2024-07-26")
    encoder = GraceEncoder(folder, device="cpu")
    texts = ["positive 0", "query 0", "no 0", "positive 1", "query 1", "no 1"]
    served = encoder.renderer.render([rationale_messages(t, encoder.settings.system_prompt) for t in texts])
    day = date.fromisoformat(data.get("template_date", "2024-07-26")).strftime("%d %b %Y")
    asked = "" if system is None else f"{system}\n\n" if "system_prompt_in" in data else f"[system]{system}[/]"
    start = f"[{day}][user]{asked}" if "system_prompt_in" in data else f"[{day}]{asked}[user]"
    for row, (text, prompt) in enumerate(zip(texts, served, strict=True)):
        ids = rows.batch["prompts"][row, -int(rows.batch["prompt_length"][row]) :].tolist()
        assert ids == prompt.ids and int(rows.batch["pool_start"][row]) == prompt.text_start
        assert training.tokenizer.decode(ids) == f"{start}{text}[/][A]"
    flags = [f"--{name}={data[name]}" for name in ("system_prompt_in", "template_date") if name in data]
    if "system_prompt" not in data:
        lengths = filtered_lengths(tmp_path, folder, parquet, *flags)
        assert [length for row in lengths for length in row.values()] == rows.batch["prompt_length"].tolist()


def filtered_lengths(folder: Path, model: Path, parquet: str, *flags: str) -> list[dict[str, int]]:
    arguments = ["--train_parquet", parquet, "--out_dir", str(folder / "out"), "--tokenizer_path", str(model), *flags]
    assert offline_filter_data.main(arguments) == 0
    order = ("positive", "query", "negative")
    rows = pq.read_table(folder / "out" / "train.parquet")["prompt_lengths"].to_pylist()
    return [{name: row[name] for name in order} for row in rows]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (NO_SYSTEM_TURN["wants roles to alternate"][0], "--system_prompt_in user"),
        (NO_SYSTEM_TURN["drops it"][0], "--system_prompt_in user"),
        ("{{ 1 // 0 }}", "fails for the turns user (ZeroDivisionError: "),
    ],
)
def test_every_program_says_it_in_one_line(tmp_path, capsys, template, message):
    folder, parquet = model_with(tmp_path / "model", template), write_rows(tmp_path / "train.parquet")
    filtering = ["--train_parquet", parquet, "--out_dir", str(tmp_path / "out"), "--tokenizer_path", str(folder)]
    capsys.readouterr()  # the bar of saving the model
    assert offline_filter_data.main(filtering) == 2
    assert message in one_line(capsys, "offline_filter_data")
    assert not list((tmp_path / "out").iterdir())
    encoding = ["--model", str(folder), "--input", str(write_texts(tmp_path / "in.txt", ["a text"])), "--output",
                str(tmp_path / "out.parquet"), "--device", "cpu", "--max_new_tokens", "4"]  # fmt: skip
    assert encode.main(encoding) == 2
    assert message in one_line(capsys, "encode")
    if "system_prompt_in" in message:
        assert encode.main([*encoding, "--system_prompt_in", "user"]) == 0
        return
    (tmp_path / "questions.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n')
    asking = ["--model_path", str(folder), "--data", str(tmp_path / "questions.jsonl"), "--output_dir", str(tmp_path)]
    assert eval_generation.main(asking) == 2
    assert message in one_line(capsys, "eval_generation")


def test_questions_to_a_trained_model_are_dated_as_in_training(tmp_path):
    tokenizer = renderer(DATED["strftime_now"] + TURNS + HEADER).tokenizer
    question = Question("line 1", "1 + 1?", None)
    args = eval_generation.parse_args(["--model_path", "m", "--data", "d", "--instruction", ""])
    for given, day in ((None, "26 Jul 2024"), ("2025-03-04", "04 Mar 2025")):
        (ids,) = render(tokenizer, [question], args, EmbedderSettings(template_date=given))
        assert tokenizer.decode(ids) == f"[{day}][user]1 + 1?[/][A]"


def test_encode_says_which_system_prompt_it_uses_and_why(tiny_folder, tmp_path, capsys):
    def said(*more: str) -> str:
        arguments = ["--model", str(tiny_folder), "--input", str(write_texts(tmp_path / "in.txt", ["a text"])),
                     "--output", str(tmp_path / "out.parquet"), "--device", "cpu", "--no_thinking", *more]  # fmt: skip
        assert encode.main(arguments) == 0
        return capsys.readouterr().out.splitlines()[0]

    assert said() == (
        f"system prompt: {SYSTEM_PROMPT[:60] + '...'!r} (this project's own, because {tiny_folder} has no "
        "embedder_config.json; --system_prompt gives that of its training)"
    )
    assert said("--system_prompt", "Own [words].") == "system prompt: 'Own [words].' (--system_prompt)"
    assert said("--system_prompt", "") == "system prompt: none: there is no system turn (--system_prompt)"


def test_an_encoder_takes_a_system_prompt_in_place_of_the_settings(tiny_folder, tmp_path):
    EmbedderSettings(system_prompt="Own words.").write(model_with(tmp_path / "model", TURNS + HEADER))
    vectors = [
        GraceEncoder(tmp_path / "model", device="cpu", **given).encode("a text", think=False).tolist()
        for given in ({}, {"system_prompt": "Own words."}, {"system_prompt": "Other words."}, {"system_prompt": ""},
                      {"system_prompt_in": "user"})
    ]  # fmt: skip
    assert vectors[0] == vectors[1] and len(set(map(tuple, vectors))) == 4


@pytest.mark.parametrize(("system_prompt", "count"), [(None, 2), ("Other words.", 1)])
def test_rows_with_several_system_prompts_are_counted(tmp_path, system_prompt, count):
    files = [write_rows(tmp_path / f"{system}.parquet", system) for system in ("one", "two")]
    config = DataConfig(system_prompt=system_prompt)
    assert PromptDataset(files, config, ("positive",), renderer(TURNS + HEADER)).num_system_prompts == count


def test_the_table_of_a_run_shows_a_prompt_with_brackets(capsys):
    RunDisplay(1, 0, show_steps=True, show_bars=True).table("title", [("system prompt", "'[/think] as it [bold] is'")])
    assert "'[/think] as it [bold] is'" in capsys.readouterr().out


def test_a_run_keeps_the_text_of_a_prompt_file(tmp_path):
    (tmp_path / "prompt.txt").write_text("Own words.\n")
    assert DataConfig(system_prompt=str(tmp_path / "prompt.txt")).system_prompt == "Own words."

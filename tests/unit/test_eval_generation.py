"""verl.eval_generation: how numbers are read from answers, and that the results follow from the stored generations."""

import json
import math
import sys
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny import save_tiny, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from verl import eval_generation as program
from verl.encoder.backend import Backend
from verl.errors import UserError
from verl.evaluation import generation
from verl.evaluation.exact_match import Judged, compare, read_questions, score
from verl.evaluation.records import name_of
from verl.utils.answers import extract
from verl.workers.rollout.base import Response, RolloutError, row_seeds

ROOT = Path(__file__).resolve().parents[2]
ROWS = [
    {"question": "How much is 2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"},
    {"question": "A dozen dozens?\u2028In eggs.", "answer": "12 * 12, not 12\n#### 144"},
    {"question": "What is 4 less than 1?", "answer": "-3"},
    {"question": "  naïve café: 3 for 600 each?  ", "answer": "1,800 of them", "final_answer": "$1,800"},
    {"question": "Half of 5?", "answer": 2.5},
]
GOLD = ["5", "144", "-3", "1800", "2.5"]
PROMPT = "<|im_start|>user\n{}\n\n{}<|im_end|>\n<|im_start|>assistant\n"


def write_rows(folder: Path, rows=ROWS) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def run(model, data, output, *options) -> int:
    arguments = ["--model_path", model, "--data", data, "--output_dir", output, "--device", "cpu",
                 "--max_new_tokens", 16, *options]  # fmt: skip
    return program.main([str(argument) for argument in arguments])


def results(folder: Path) -> tuple[dict, list[dict]]:
    lines = (folder / "generations.jsonl").read_text().splitlines()
    return json.loads((folder / "generation.json").read_text()), [json.loads(line) for line in lines]


def answering(monkeypatch, *answers, truncated=False):
    """Replace generation: the n-th call returns the n-th of `answers`. Returns the calls with their arguments."""
    calls = []

    def generate(self, prompts, *sampling):
        texts = answers[len(calls)]
        calls.append(SimpleNamespace(prompts=prompts, sampling=sampling, spec=self.spec))
        tokenizer = tiny_tokenizer()
        for row in reversed(range(len(texts))):
            ids = tokenizer(texts[row])["input_ids"] + ([] if truncated else [tokenizer.eos_token_id])
            yield {row: Response(ids, [0.0] * len(ids), truncated)}

    monkeypatch.setattr(Backend, "generate", generate)
    return calls


@pytest.mark.parametrize(
    ("text", "number", "rule"),
    [
        ("so it is 7.\n#### 18", "18", "mark"),
        ("####18", "18", "mark"),
        ("#### 18 eggs on 3 days", "18", "mark"),
        ("#### 18\n#### 3\nThat was all 5.", "18", "mark"),
        ("so #### 18\n\nQuestion: Tom has 5 pens and buys 2.\nAnswer: 5 + 2 = 7\n#### 7", "18", "mark"),
        ("#### 18 #### 7", "18", "mark"),
        ("####\n\n18\n\nNext: 3 + 4\n#### 7", "18", "mark"),
        ("#### \\boxed{72}\n#### 3", "72", "mark"),
        ("#### **__72__**\n#### 3", "72", "mark"),
        ("#### Step 1: add\n2 + 3\n#### Step 2: double\n10\n#### 10\n\n#### 4", "10", "mark"),
        ("#### Answer: 18\nQuestion: 5 pens?\n#### Answer: 5", "18", "mark"),
        ("#### 3/4 = 0.75", "0.75", "mark"),
        ("#### unknown\nQuestion: 5 pens?", "5", "last"),
        ("#### **$1,234,567.50**.", "1234567.5", "mark"),
        ("#### -$5", "-5", "mark"),
        ("#### $-5.00", "-5", "mark"),
        ("#### \u22125", "-5", "mark"),
        ("####-5", "-5", "mark"),
        ("#### 20%", "20", "mark"),
        ("#### 18.", "18", "mark"),
        ("#### .5", "0.5", "mark"),
        ("#### 007", "7", "mark"),
        ("#### \\boxed{72}", "72", "mark"),
        ("it is 12\n#### unknown", "12", "last"),
        ("it is 12 #### 3/4", "12", "last"),
        ("She sells 9 eggs for $18.", "18", "last"),
        ("9 * 2 = 18", "18", "last"),
        ("16-3-4=9", "9", "last"),
        ("from 16 to 7-4", "4", "last"),
        ("f(2)-3", "3", "last"),
        ("from 2 to -3", "-3", "last"),
        ("x=-3", "-3", "last"),
        ("18 is 1/2 of it", "18", "last"),
        ("18 is 2 1/2 of it", "18", "last"),
        ("18, not 24 / 2", "18", "last"),
        ("18, not $24/$2/1", "18", "last"),
        ("24/2 = 12", "12", "last"),
        ("$3/day", "3", "last"),
        ("1,2,3", "3", "last"),
        ("1,2345", "2345", "last"),
        ("10,000.25 each", "10000.25", "last"),
        ("just 1/2", None, None),
        ("#### no idea", None, None),
        ("", None, None),
    ],
)
def test_the_number_of_an_answer(text, number, rule):
    assert extract(text) == (None if number is None else Decimal(number), rule)


class TestData:
    def test_gold_numbers_are_read_after_the_mark_or_from_final_answer_or_are_the_answer(self, tmp_path):
        questions = read_questions(write_rows(tmp_path), 100)
        assert [question.gold for question in questions] == [Decimal(gold) for gold in GOLD]
        assert [question.text for question in questions] == [row["question"].strip() for row in ROWS]

    def test_the_mark_comes_before_final_answer(self, tmp_path):
        row = {"question": "?", "answer": "#### 1", "final_answer": "2"}
        assert read_questions(write_rows(tmp_path, [row]), 1)[0].gold == 1

    def test_the_first_rows_are_used_and_blank_lines_are_skipped(self, tmp_path):
        path = tmp_path / "rows.jsonl"
        path.write_text('{"question": "a", "answer": "1"}\n\n{"question": "b", "answer": "2"}\nnot JSON\n')
        assert [(question.text, question.where) for question in read_questions(path, 2)] == [
            ("a", f"{path}, line 1"),
            ("b", f"{path}, line 3"),
        ]

    def test_parquet_is_read_by_column_names(self, tmp_path):
        path = tmp_path / "rows.parquet"
        pq.write_table(pa.table({"answer": ["#### 7", "#### 1,000"], "id": [1, 2], "question": ["a", "b"]}), path)
        assert [(question.text, question.gold) for question in read_questions(path, 9)] == [("a", 7), ("b", 1000)]
        pq.write_table(pa.table({"answer": ["1", "x"], "question": ["a", "b"]}), path)
        with pytest.raises(UserError, match=r"rows\.parquet, row 2: no gold number: 'x'"):
            read_questions(path, 9)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", r"rows\.jsonl has no rows"),
            ("\n\n", r"rows\.jsonl has no rows"),
            ('{"question": "a", "answer": "1"}\n{"question": ', r"line 2: not valid JSON"),
            ("[1]\n", r"line 1: a JSON list instead of an object"),
            ('{"query": "a", "answer": "1"}\n', r"line 1: no text in the column 'question' \(columns: query, answer\)"),
            ('{"question": " ", "answer": "1"}\n', r"line 1: no text in the column 'question'"),
            ('{"question": "a"}\n', r"line 1: no gold number: 'None' .*\(columns: question\)"),
            ('\n{"question": "a", "answer": "about 5"}\n', r"line 2: no gold number: 'about 5' is none"),
            ('{"question": "a", "answer": "5\\n#### five", "final_answer": 5}\n', r"no gold number: 'five'"),
            ('{"question": "a", "answer": "#### 1/2"}\n', r"no gold number: '1/2'"),
            ('{"question": "a", "answer": true}\n', r"no gold number: 'True'"),
        ],
    )
    def test_an_unusable_row_is_an_error_with_its_line(self, tiny_folder, tmp_path, capsys, text, message):
        path = tmp_path / "rows.jsonl"
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_questions(path, 5)
        assert run(tiny_folder, path, tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert error.startswith("eval_generation: ") and error.count("\n") == 1


class TestRun:
    """The tiny model from the command line to the files."""

    @pytest.fixture(scope="class")
    def greedy(self, tiny_folder, tmp_path_factory):
        folder = tmp_path_factory.mktemp("greedy")
        assert run(tiny_folder, write_rows(folder), folder, "--batch_size", 2) == 0
        return results(folder / "tiny")

    def test_the_results_follow_from_the_generations(self, greedy):
        record, rows = greedy
        assert [row["gold"] for row in rows] == GOLD
        for row in rows:
            number, rule = extract(row["text"])
            assert row["rule"] == rule and (row["extracted"] and Decimal(row["extracted"])) == number
            assert row["correct"] == (number is not None and number == Decimal(row["gold"]))
        count = len(rows)
        right = sum(row["correct"] for row in rows) / count
        assert record["count"] == count == len(ROWS)
        assert record["exact_match"] == pytest.approx(100 * right)
        assert record["standard_error"] == pytest.approx(100 * math.sqrt(right * (1 - right) / count))
        assert record["truncated"] == pytest.approx(100 * sum(row["truncated"] for row in rows) / count)
        assert record["no_number"] == pytest.approx(100 * sum(row["extracted"] is None for row in rows) / count)
        assert record["read_after_mark"] == sum(row["rule"] == "mark" for row in rows)
        assert record["read_last_number"] == sum(row["rule"] == "last" for row in rows)
        assert record["mean_tokens"] == pytest.approx(sum(row["tokens"] for row in rows) / count)
        assert record["tokens_per_s"] > 0

    def test_model_settings_and_versions_are_recorded(self, greedy, tiny_folder):
        record, _ = greedy
        assert record["model"]["name"] == "tiny" and len(record["model"]["revision"]) == 64
        expected = {"engine": "hf", "device": "cpu", "max_new_tokens": 16, "temperature": 0.0, "seed": 0,
                    "instruction": program.INSTRUCTION}  # fmt: skip
        assert record["settings"].items() >= expected.items()
        assert {"python", "torch", "transformers"} <= record["versions"].keys()

    def test_greedy_text_is_that_of_transformers(self, greedy, tiny_folder):
        tokenizer = tiny_tokenizer()
        model = AutoModelForCausalLM.from_pretrained(tiny_folder)
        for row in greedy[1][:2]:
            prompt = tokenizer(PROMPT.format(row["question"], program.INSTRUCTION), return_tensors="pt").input_ids
            ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False)
            new = ids[0, prompt.shape[1] :].tolist()
            assert row["text"] == tokenizer.decode(new, skip_special_tokens=True) and row["tokens"] == len(new)
            assert row["truncated"] == (new[-1] != tokenizer.eos_token_id)

    def test_seeds_decide_what_is_sampled(self, tiny_folder, tmp_path):
        texts = []
        for number, seed in enumerate((3, 3, 4)):
            output = tmp_path / str(number)
            assert run(tiny_folder, write_rows(tmp_path), output, "--temperature", 1, "--seed", seed) == 0
            texts.append([row["text"] for row in results(output / "tiny")[1]])
        assert texts[0] == texts[1] != texts[2]

    @pytest.mark.parametrize(("wrong", "percent"), [([], 100), ([0, 1, 2, 3, 4], 0), ([2], 80)])
    def test_right_answers_count_and_wrong_ones_do_not(self, tiny_folder, tmp_path, monkeypatch, wrong, percent):
        right = ["2 + 3\n#### 5", "so 144.0 eggs", "#### -3.", "#### $1,800.00", "#### 2.50"]
        answers = [text + "9" if row in wrong else text for row, text in enumerate(right)]
        calls = answering(monkeypatch, answers)
        assert run(tiny_folder, write_rows(tmp_path), tmp_path, "--seed", 2, "--temperature", 0.5) == 0
        record, rows = results(tmp_path / "tiny")
        assert record["exact_match"] == percent
        assert [row["text"] for row in rows] == answers
        assert (record["read_after_mark"], record["read_last_number"], record["truncated"]) == (4, 1, 0)
        assert record["mean_tokens"] == pytest.approx(sum(len(text.encode()) + 1 for text in answers) / 5)
        assert calls[0].sampling == (0.5, 16, row_seeds(2, 5), None)
        assert calls[0].spec.max_model_len == max(map(len, calls[0].prompts)) + 16

    def test_the_limit_and_missing_numbers_are_counted(self, tiny_folder, tmp_path, monkeypatch):
        answering(monkeypatch, ["I do not", "know", "#### -3"], truncated=True)
        assert run(tiny_folder, write_rows(tmp_path), tmp_path, "--num_examples", 3) == 0
        record, rows = results(tmp_path / "tiny")
        assert (record["truncated"], record["no_number"]) == (100, pytest.approx(200 / 3))
        assert [row["extracted"] for row in rows] == [None, None, "-3"]

    def test_the_prompt_is_the_question_and_the_instruction_and_nothing_of_the_embedder(
        self, tmp_path, tiny_folder, monkeypatch
    ):
        tokenizer = tiny_tokenizer()
        start = ("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>"))
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|im_start|> $A", special_tokens=[start])
        assert tokenizer("a")["input_ids"][0] == start[1]  # as many models do; the template has added it already
        monkeypatch.setattr(generation, "load_tokenizer", lambda _: tokenizer)
        calls = answering(monkeypatch, ["1"] * 5)
        assert run(tiny_folder, write_rows(tmp_path), tmp_path, "--instruction", "Be brief.") == 0
        shown = tiny_tokenizer().batch_decode(calls[0].prompts)
        assert shown == [PROMPT.format(row["question"].strip(), "Be brief.") for row in ROWS]


class TestBase:
    @pytest.fixture
    def in_this_process(self, monkeypatch):
        """The base model's run without a process of its own."""

        def run_here(command, check):
            assert command[:3] == [sys.executable, "-m", "verl.eval_generation"] and not check
            return SimpleNamespace(returncode=program.main(command[3:]))

        monkeypatch.setattr(generation.subprocess, "run", run_here)

    def test_both_run_with_the_same_settings_and_are_compared(
        self, tiny_folder, tmp_path, monkeypatch, in_this_process, capsys
    ):
        base = save_tiny(tmp_path / "base", seed=1)
        calls = answering(monkeypatch, ["9", "144", "-3", "1800", "9"], ["5", "9", "9", "1800", "9"])
        options = ["--base_model", base, "--temperature", 0.25, "--instruction", "-- brief?"]
        assert run(tiny_folder, write_rows(tmp_path), tmp_path / "out", *options) == 0
        first, second = calls
        assert first.spec.folder == str(base) and second.spec.folder == str(tiny_folder)
        assert (first.prompts, first.sampling) == (second.prompts, second.sampling)
        record = results(tmp_path / "out" / "tiny")[0]
        assert (results(tmp_path / "out" / "base")[0]["exact_match"], record["exact_match"]) == (60, 40)
        assert record["base"]["model"]["name"] == "base"
        assert {key: value for key, value in record["base"].items() if key != "model"} == {
            "exact_match": 60, "difference": -20, "only_base_right": 2, "only_model_right": 1,
        }  # fmt: skip
        out = capsys.readouterr().out
        assert "only base right: 2   only tiny right: 1" in out
        assert ["60.00", "40.00", "-20.00"] in [
            [cell.strip() for cell in line.split("│")[2:5]] for line in out.splitlines()
        ]

    def test_a_base_model_runs_in_another_process_and_its_failure_is_named(self, tiny_folder, tmp_path, capfd):
        missing = tmp_path / "missing"
        assert run(tiny_folder, write_rows(tmp_path), tmp_path, "--base_model", missing) == 2
        error = capfd.readouterr().err
        assert f"model path '{missing}' does not exist" in error
        assert f"--base_model {missing} could not be evaluated (exit code 2, see above)" in error

    def test_two_models_of_the_same_name_are_rejected(self, tiny_folder, tmp_path, capsys):
        assert run(tiny_folder, write_rows(tmp_path), tmp_path, "--base_model", "org/tiny") == 2
        assert "--base_model org/tiny has the name of --model_path" in capsys.readouterr().err

    def test_counts_of_a_comparison(self):
        def judged(pattern):
            return [Judged("", "", None, None, letter == "x", "", 1, False) for letter in pattern]

        assert compare(judged("xx.x.."), judged("x.x..x")) == {"only_base_right": 2, "only_model_right": 2}
        assert score(judged("x..."), 2.0)["standard_error"] == pytest.approx(100 * math.sqrt(0.25 * 0.75 / 4))


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--max_prompt_length", 60], "line 1: the prompt has 1"),
            (["--max_new_tokens", 4096], "beyond the model's context of 4096; lower it by "),
            (["--num_examples", 0], "--num_examples is 0; give 1 or more"),
            (["--temperature", "nan"], "--temperature is nan; give 0 or more"),
            (["--data", "nowhere.jsonl"], "--data nowhere.jsonl is not a file"),
            (["--model_path", "./nowhere"], "model path './nowhere' does not exist"),
        ],
    )
    def test_a_wrong_option_is_an_error_in_one_line(self, tiny_folder, tmp_path, capsys, options, message):
        assert run(tiny_folder, write_rows(tmp_path), tmp_path / "out", *options) == 2
        error = capsys.readouterr().err
        assert error.startswith("eval_generation: ") and message in error and error.count("\n") == 1
        assert not (tmp_path / "out").exists()

    def test_a_tokenizer_without_a_chat_template_is_rejected(self, tmp_path, capsys):
        folder = save_tiny(tmp_path / "plain")
        (folder / "chat_template.jinja").unlink()
        assert run(folder, write_rows(tmp_path), tmp_path / "out") == 2
        assert "has no chat template" in capsys.readouterr().err

    @pytest.mark.parametrize("failure", ["raise", "lose"])
    def test_an_engine_that_fails_ends_with_1_and_writes_nothing(
        self, tiny_folder, tmp_path, monkeypatch, capsys, failure
    ):
        def generate(*_):
            yield {1: Response([5], [0.0], True)}
            if failure == "raise":
                raise RolloutError("the engine ran out\nof cache blocks")

        monkeypatch.setattr(Backend, "generate", generate)
        assert run(tiny_folder, write_rows(tmp_path), tmp_path) == 1
        expected = {"raise": "the engine ran out of cache blocks", "lose": "the engine answered 1 of 5 questions"}
        assert capsys.readouterr().err == f"eval_generation: {expected[failure]}\n"
        assert not list((tmp_path / "tiny").iterdir())


def test_names_of_models(tmp_path, monkeypatch):
    assert name_of("runs/mine/global_step_8/huggingface/") == "mine-global_step_8"
    assert name_of("org/model-1.5B") == "model-1.5B"
    monkeypatch.chdir(tmp_path)
    assert name_of(".") == tmp_path.name

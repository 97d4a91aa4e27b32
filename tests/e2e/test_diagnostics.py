"""Diagnoses of whole runs: they change nothing, go on after a resume, and see a collapse and rationales of noise."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import numbers, prepare, read_metrics, recipe, train_here, weights_sha256, write_texts
from transformers import AutoModelForCausalLM, PreTrainedModel

from verl.protocol import DataProto
from verl.workers.group import ActorRolloutRefGroup

DIAGNOSED = ["trainer.diag_freq=2", "trainer.diag_texts=12", "actor_rollout_ref.actor.optim.lr=1e-4"]

COLLAPSE = '''
import torch
from verl.protocol import is_trained
from verl.workers.reward_manager.base import RewardOutput

class Collapse:
    """Pulls the embeddings of all texts together."""
    needs_embeddings = trains_anchors = exclude_system_prompt = True

    def __call__(self, rows):
        with torch.enable_grad():
            vectors = rows.batch["embeddings"].clone().requires_grad_()
            (grad,) = torch.autograd.grad(-(vectors @ vectors.detach().T).mean(), vectors)
        return RewardOutput(torch.zeros(int(is_trained(rows).sum())), embedding_grad=grad)
'''


@pytest.fixture(scope="module")
def diagnosed(tmp_path_factory, tiny_folder, triplets) -> Path:
    """Four steps with a checkpoint after two."""
    run_dir = tmp_path_factory.mktemp("runs") / "diagnosed"
    steps = ["trainer.total_training_steps=4", "trainer.save_freq=2"]
    done = train_here(*recipe(tiny_folder, triplets, run_dir), *DIAGNOSED, *steps)
    assert done.returncode == 0, done.stderr
    assert "3 of 12 texts of data.val_files=" in " ".join(done.stdout.split())
    return run_dir


def diagnoses(run_dir: Path) -> dict[int, dict]:
    return {m["step"]: m for m in read_metrics(run_dir) if "diag/texts" in m}


def alerts(run_dir: Path) -> list[tuple[int, str]]:
    return [(m["step"], alert["name"]) for m in read_metrics(run_dir) for alert in m.get("alerts", ())]


def lines(run_dir: Path, step: int) -> list[dict]:
    return [json.loads(line) for line in (run_dir / f"diagnostics/step_{step}.jsonl").read_text().splitlines()]


def trained(run_dir: Path) -> list[dict]:
    """What training itself logged."""
    return [m for m in numbers(run_dir) if "actor/grad_norm" in m]


def test_the_files_say_what_the_figures_say(diagnosed):
    found = diagnoses(diagnosed)
    assert sorted(found) == [0, 2, 4]
    texts = json.loads((diagnosed / "diagnostics/probe.json").read_text())["texts"]
    assert [text["role"] for text in texts] == ["positive", "query", "negative"] * 4
    assert len({text["text"] for text in texts}) == 12
    for step, figures in found.items():
        told = lines(diagnosed, step)
        assert [line["id"] for line in told] == list(range(12))
        for name in ("cos_without", "cos_other_rationale", "cos_second_rationale", "log_likelihood"):
            assert np.mean([line[name] for line in told]) == pytest.approx(figures[f"diag/{name}"], abs=1e-5)
        assert np.mean([line["tokens"] for line in told]) == pytest.approx(figures["diag/tokens_mean"])
    # Those of the first diagnosis and of the newest.
    assert sorted(f.name for f in (diagnosed / "diagnostics").glob("*.npz")) == [
        "vectors_step_0.npz", "vectors_step_4.npz",
    ]  # fmt: skip
    vectors = np.load(diagnosed / "diagnostics/vectors_step_4.npz")
    assert vectors["with"].dtype == np.float16 and vectors["with"].shape == (12, 64)
    own, without = vectors["with"].astype(np.float64), vectors["without"].astype(np.float64)
    cosines = [float(a @ b) for a, b in zip(own, without, strict=True)]
    assert cosines == pytest.approx([line["cos_without"] for line in lines(diagnosed, 4)], abs=2e-3)


def test_training_is_the_same_without_diagnoses(diagnosed, tmp_path, tiny_folder, triplets):
    run_dir = tmp_path / "plain"
    done = train_here(
        *recipe(tiny_folder, triplets, run_dir), "trainer.diag_freq=-1", DIAGNOSED[-1],
        "trainer.total_training_steps=4", "trainer.save_freq=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not (run_dir / "diagnostics").exists()
    assert trained(run_dir) == trained(diagnosed) and len(trained(run_dir)) == 4
    for step in (2, 4):
        assert weights_sha256(run_dir, step) == weights_sha256(diagnosed, step)
        assert (run_dir / f"samples/step_{step}.jsonl").read_text() == (
            diagnosed / f"samples/step_{step}.jsonl"
        ).read_text()


def test_a_resumed_run_keeps_the_probe_and_says_nothing_twice(diagnosed, tmp_path, tiny_folder, triplets):
    run_dir = Path(shutil.copytree(diagnosed, tmp_path / "resumed"))
    done = train_here(
        *recipe(tiny_folder, triplets, run_dir), DIAGNOSED[0], "trainer.diag_texts=6", DIAGNOSED[-1],
        "trainer.total_training_steps=4", "trainer.save_freq=2", "trainer.resume_mode=resume_path",
        f"trainer.resume_from_path={run_dir}/global_step_2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    probe, step_4 = "diagnostics/probe.json", "diagnostics/step_4.jsonl"
    assert (run_dir / probe).read_text() == (diagnosed / probe).read_text()
    assert (run_dir / step_4).read_text() == (diagnosed / step_4).read_text()
    assert alerts(run_dir) == alerts(diagnosed)
    assert sorted(diagnoses(run_dir)) == [0, 2, 4]


def test_the_reference_of_a_kl_term_is_the_untrained_model(diagnosed, tmp_path, tiny_folder, triplets):
    """A likelihood does not depend on which of them scores; its rationales are those of another run."""
    run_dir = tmp_path / "kl"
    done = train_here(
        *recipe(tiny_folder, triplets, run_dir), *DIAGNOSED, "actor_rollout_ref.actor.use_kl_loss=True",
        "actor_rollout_ref.actor.kl_loss_coef=1e-12", "trainer.total_training_steps=2", "trainer.save_freq=0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    same = [a == b for a, b in zip(lines(run_dir, 2), lines(diagnosed, 2), strict=True)]
    assert sum(same) > 6, "a weight of 1e-12 changes next to nothing"


def test_a_run_that_collapses_says_so_and_stops(tmp_path, tiny_folder, triplets):
    (tmp_path / "collapse.py").write_text(COLLAPSE)
    run_dir = tmp_path / "run"
    overrides = [o for o in recipe(tiny_folder, triplets, run_dir) if "reward_kwargs" not in o and "norm_adv" not in o]
    command = [
        *overrides, f"reward_model.reward_manager={tmp_path}/collapse.py:Collapse", "trainer.diag_freq=4",
        "trainer.diag_texts=12", "actor_rollout_ref.actor.embedding_grad_share=1", "trainer.total_training_steps=24",
        "actor_rollout_ref.actor.optim.lr=1e-2", "trainer.stop_on_alert=True", "trainer.diag_log_likelihood=False",
    ]  # fmt: skip
    done = train_here(*command)
    assert done.returncode == 1, done.stdout + done.stderr
    collapse = next(step for step, name in alerts(run_dir) if name == "collapse")
    assert f"stopped at step {collapse} by the alert" in done.stderr and f"ALERT at step {collapse}" in done.stdout
    found = diagnoses(run_dir)
    assert found[collapse]["diag/effective_rank"] < 0.5 * found[0]["diag/effective_rank"]
    assert "diag/log_likelihood" not in found[collapse]
    assert (run_dir / f"global_step_{collapse}" / "huggingface").is_dir()
    # The same command goes on, as the alert has been said.
    done = train_here(*command, f"trainer.total_training_steps={collapse + 1}")
    assert "collapse" not in [name for step, name in alerts(run_dir) if step > collapse]
    assert f"step {collapse + 1}/{collapse + 1}" in done.stdout


def test_a_healthy_run_says_nothing_of_it(diagnosed):
    assert not {"collapse", "gibberish", "hacking", "no_signal"} & {name for _, name in alerts(diagnosed)}


def test_rationales_of_noise_are_gibberish_and_not_used(tmp_path, tiny_folder, triplets, monkeypatch):
    write, calls = ActorRolloutRefGroup.generate, []
    noise = torch.Generator().manual_seed(5)

    def noisy(self, rows, *more):
        columns = write(self, rows, *more)
        calls.append(len(rows))
        if len(calls) > 1:  # the first one is the diagnosis before training
            shape = columns.batch["responses"].shape
            columns.batch["responses"] = torch.randint(0, 250, shape, generator=noise)
        return columns

    monkeypatch.setattr(ActorRolloutRefGroup, "generate", noisy)
    run_dir = tmp_path / "run"
    done = train_here(
        *recipe(tiny_folder, triplets, run_dir), "trainer.diag_freq=1", "trainer.diag_texts=54", "data.val_files=null",
        "trainer.total_training_steps=1", "trainer.save_freq=0", "data.max_response_length=48",
        "+reward_model.reward_kwargs.text_share=0.3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(alerts(run_dir)) == [(1, "gibberish"), (1, "not_used")]


@pytest.fixture
def written(monkeypatch) -> list[DataProto]:
    """What the probe of 7 texts was asked and wrote, a call each: the texts twice in a row."""
    generate, found = ActorRolloutRefGroup.generate, []

    def kept(self, rows, *more):
        columns = generate(self, rows, *more)
        if len(rows) == 14:
            found.append(rows.union(columns))
        return columns

    monkeypatch.setattr(ActorRolloutRefGroup, "generate", kept)
    return found


def test_plain_texts_are_embedded_and_scored_as_transformers_does(tmp_path, tiny_folder, written):
    data = prepare("unsupervised", write_texts(tmp_path / "raw.txt", 40), tmp_path / "data")
    run_dir, temperature = tmp_path / "run", 0.8
    done = train_here(
        *recipe(tiny_folder, data, run_dir, "unsupervised"), "trainer.diag_freq=1", "trainer.diag_texts=7",
        "trainer.total_training_steps=1", "trainer.save_freq=0", f"actor_rollout_ref.rollout.temperature={temperature}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found, (before, after) = diagnoses(run_dir), written
    model = AutoModelForCausalLM.from_pretrained(tiny_folder).float().eval()
    texts = [Told(model, before, 2 * i, temperature) for i in range(7)]
    seconds = [Told(model, before, 2 * i + 1, temperature) for i in range(7)]
    vectors = np.load(run_dir / "diagnostics/vectors_step_0.npz")
    squares = []
    for i, line in enumerate(lines(run_dir, 0)):
        own, second = texts[i].vector(texts[i].response), texts[i].vector(seconds[i].response)
        other, without = texts[i].vector(texts[(i + 1) % 7].response), texts[i].vector([])
        for name, vector in (("without", without), ("other_rationale", other), ("second_rationale", second)):
            assert line[f"cos_{name}"] == pytest.approx(float(own @ vector), abs=1e-4), name
        assert line["tokens"] == len(texts[i].response)
        assert line["log_likelihood"] == pytest.approx(texts[i].log_likelihood(), abs=1e-3)
        assert vectors["with"][i] == pytest.approx(own.numpy(), abs=1e-3)
        assert vectors["without"][i] == pytest.approx(without.numpy(), abs=1e-3)
        squares.append(sum(float(a - b) ** 2 for a, b in zip(own, second, strict=True)))
    assert found[0]["diag/alignment"] == pytest.approx(np.mean(squares), abs=1e-4)
    assert (found[0]["diag/texts"], found[0]["diag/samples"]) == (7, 7)
    assert not [name for name in found[0] if name.startswith("diag/mrr")]
    # After the step it is still the untrained model that says how likely the rationales are.
    for i, line in enumerate(lines(run_dir, 1)):
        assert line["log_likelihood"] == pytest.approx(
            Told(model, after, 2 * i, temperature).log_likelihood(), abs=1e-3
        )


def test_every_diagnosis_draws_by_the_same_seeds(tmp_path, tiny_folder, triplets):
    run_dir = tmp_path / "run"
    done = train_here(
        *recipe(tiny_folder, triplets, run_dir), "trainer.diag_freq=1", "trainer.diag_texts=6", "trainer.save_freq=0",
        "trainer.total_training_steps=2", "actor_rollout_ref.actor.optim.lr=1e-30", "trainer.test_freq=-1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rationales = [[line["rationale"] for line in lines(run_dir, step)] for step in range(3)]
    assert rationales[0] == rationales[1] == rationales[2] and len(set(rationales[0])) > 1


class Told:
    """A row of prompt and rationale, by plain transformers."""

    def __init__(self, model: PreTrainedModel, rows: DataProto, row: int, temperature: float) -> None:
        batch = rows.batch
        self.model, self.temperature, self.start = model, temperature, int(batch["pool_start"][row])
        self.prompt = batch["prompts"][row].tolist()[-int(batch["prompt_length"][row]) :]
        self.response = batch["responses"][row].tolist()[: int(batch["response_length"][row])]

    @torch.no_grad()
    def vector(self, response: list[int]) -> torch.Tensor:
        hidden = self.model.model(torch.tensor([self.prompt + response])).last_hidden_state[0]
        mean = hidden[self.start :].mean(0)
        return mean / mean.norm()

    @torch.no_grad()
    def log_likelihood(self) -> float:
        logits = self.model(torch.tensor([self.prompt + self.response])).logits[0]
        log_probs = (logits / self.temperature).log_softmax(-1)
        first = len(self.prompt)
        return float(np.mean([log_probs[first + i - 1, token] for i, token in enumerate(self.response)]))

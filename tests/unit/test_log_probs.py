"""Chunked log-probs with a backward of their own against autograd in float64."""

import pytest
import torch
from torch import nn

from verl.models.log_probs import token_log_probs
from verl.models.logits import LogitForm
from verl.models.onednn import TrainedLinear

VOCAB, HIDDEN, TOKENS = 53, 12, 29
TEMPERATURE = 0.7


FORMS = {
    "plain": LogitForm(temperature=TEMPERATURE),
    "scaled": LogitForm(scale=2.5, temperature=TEMPERATURE),
    "capped": LogitForm(scale=2.5, cap=1.5, temperature=TEMPERATURE),
}


def reference(
    head: nn.Linear, hidden: torch.Tensor, target: torch.Tensor, form: LogitForm
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies token by token."""
    pairs = []
    for h, t in zip(hidden, target, strict=True):
        logits = form.scale * head(h)
        logits = logits if form.cap is None else form.cap * torch.tanh(logits / form.cap)
        log_p = (logits / TEMPERATURE).log_softmax(-1)
        pairs.append((log_p[t], -(log_p.exp() * log_p).sum()))
    log_probs, entropies = zip(*pairs, strict=True)
    return torch.stack(log_probs), torch.stack(entropies)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("rows_per_chunk", [1, 4, 29, 1000])
@pytest.mark.parametrize("by_onednn", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients_are_those_of_autograd(monkeypatch, bias, entropy, rows_per_chunk, by_onednn, form):
    monkeypatch.setattr("verl.models.log_probs.CHUNK_BYTES", {"cpu": 4 * VOCAB * rows_per_chunk})
    torch.manual_seed(0)
    exact = nn.Linear(HIDDEN, VOCAB, bias=bias).double()
    head = nn.Linear(HIDDEN, VOCAB, bias=bias)
    head.load_state_dict(exact.state_dict())
    head = TrainedLinear(head) if by_onednn else head
    hidden = torch.randn(TOKENS, HIDDEN).requires_grad_()
    exact_hidden = hidden.detach().double().requires_grad_()
    target, weights = torch.randint(0, VOCAB, (TOKENS,)), torch.randn(2, TOKENS)

    log_probs, entropies = token_log_probs(head, hidden, target, FORMS[form], entropy)
    exact_log_probs, exact_entropies = reference(exact, exact_hidden, target, FORMS[form])
    torch.testing.assert_close(log_probs.double(), exact_log_probs, atol=1e-5, rtol=1e-5)
    loss, exact_loss = (log_probs * weights[0]).sum(), (exact_log_probs * weights[0]).sum()
    if entropy:
        torch.testing.assert_close(entropies.double(), exact_entropies, atol=1e-5, rtol=1e-5)
        loss, exact_loss = loss + (entropies * weights[1]).sum(), exact_loss + (exact_entropies * weights[1]).sum()
    else:
        assert entropies is None
    loss.backward()
    exact_loss.backward()
    for ours, theirs in zip((hidden, *head.parameters()), (exact_hidden, *exact.parameters()), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-5, rtol=1e-4)


def test_without_tokens_there_are_no_log_probs_and_gradients_are_zero():
    head, hidden = nn.Linear(HIDDEN, VOCAB, bias=False), torch.randn(0, HIDDEN, requires_grad=True)
    log_probs, _ = token_log_probs(head, hidden, torch.empty(0, dtype=torch.int64), LogitForm(), entropy=False)
    log_probs.sum().backward()
    assert log_probs.shape == (0,) and not head.weight.grad.any()


@pytest.mark.parametrize("chunks", [1, 37, 75])
def test_in_bfloat16_the_heads_gradient_does_not_lose_precision_with_the_number_of_chunks(monkeypatch, chunks):
    vocab, size, tokens = 512, 64, 75 * 8
    monkeypatch.setattr("verl.models.log_probs.CHUNK_BYTES", {"cpu": 4 * vocab * -(-tokens // chunks)})
    torch.manual_seed(0)
    head = nn.Linear(size, vocab).bfloat16()
    hidden = torch.randn(tokens, size).bfloat16()
    target, weights = torch.randint(0, vocab, (tokens,)), torch.randn(tokens)
    (token_log_probs(head, hidden, target, LogitForm(), entropy=False)[0] * weights).sum().backward()

    exact = nn.Linear(size, vocab).double()
    exact.load_state_dict(head.state_dict())
    log_probs = exact(hidden.double()).log_softmax(-1).gather(1, target.unsqueeze(1)).squeeze(1)
    (log_probs * weights).sum().backward()
    for own, theirs in zip(head.parameters(), exact.parameters(), strict=True):
        assert own.grad.dtype == torch.bfloat16
        assert (own.grad.double() - theirs.grad).norm() < 0.003 * theirs.grad.norm()

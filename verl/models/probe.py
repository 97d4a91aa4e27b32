"""The proof, at load, that the packed forward stands for transformers' own: both score two short rows.

Dropout is part of it. Old and new log-probs of a row must come from one function of the weights, so a model is trained
without, and the proof runs in training mode too.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Rows = list[tuple[int, ...]]

_LARGEST_GAP = 1e-3
# Settings that begin to matter in long rows, and what they are during the proof, so that they matter in its short ones.
_WINDOWS = ("sliding_window", "attention_chunk_size")
_WINDOW = 5
# What a forward raises that does not know the arguments of the packed one, or what it stands on.
_NOT_MADE_FOR_IT = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError)


def why_unsupported(lm: Any, attention: str, packed_log_probs: Callable[[Rows], Tensor]) -> str | None:
    """Give the model packed attention; return why it then computes something else than before, or None.

    Args:
        lm: with transformers' plain attention; left in evaluation mode.
        attention: name of the packed attention.
        packed_log_probs: of all tokens of the rows but their first two, by the model's packed forward.
    """
    rows = [tuple((7 * i + j) % min(_vocabulary(lm), 97) for j in range(3 + 4 * i)) for i in (1, 2)]
    if lm.base_model is lm:
        return "transformers names no part of it that computes hidden states without logits"
    try:
        with _short_windows(lm), torch.no_grad():
            expected = torch.cat([_plain_log_probs(lm.eval(), ids) for ids in rows])
            lm.set_attn_implementation(attention)
            if lm.config._attn_implementation != attention:
                return "transformers cannot replace the attention of this type"
            found = packed_log_probs(rows)
            before = torch.get_rng_state()
            in_training = packed_log_probs(rows) if lm.train() else found
            draws = not torch.equal(before, torch.get_rng_state())
    except _NOT_MADE_FOR_IT as error:
        return " ".join(str(error).split()).removesuffix(".")[:300] or type(error).__name__
    finally:
        lm.eval()
    if not (gap := float((expected - found).abs().max())) < _LARGEST_GAP:
        return (
            f"the packed forward differs from the model's own by {gap:.3g} in log-prob, so the model computes "
            "something that the packed forward does not"
        )
    if draws:
        return (
            "in training mode it draws random numbers besides dropout's; if its config has a rate for that, set it to "
            "0 in actor_rollout_ref.model.override_config"
        )
    if not (gap := float((in_training - found).abs().max())) < _LARGEST_GAP:
        return f"in training mode its log-probs differ by {gap:.3g} from those in evaluation mode"
    return None


def dropout_of(config: Any) -> dict[str, float]:
    """The config's rates of dropout that are not 0, by name.

    Not the noise of routers (jitter): one family uses its size in evaluation too.
    """
    return {
        name: value
        for name, value in vars(config.get_text_config()).items()
        if "drop" in name
        and isinstance(value, float)
        and value > 0
        # Of heads that a language model does not have.
        and not name.startswith(("classifier", "summary"))
    }


def set_dropout(config: Any, rates: dict[str, float]) -> None:
    """Set rates by name; a model takes them over when it is built."""
    _set_all(config.get_text_config(), rates)


@contextmanager
def _short_windows(lm: Any) -> Iterator[None]:
    configs = {id(m.config): m.config for m in lm.modules() if hasattr(m, "config")}
    before = [
        (owner, {name: value})
        for owner in (*configs.values(), *lm.modules())
        for name, value in vars(owner).items()
        if name in _WINDOWS and isinstance(value, int) and value > _WINDOW
    ]
    for owner, windows in before:
        _set_all(owner, dict.fromkeys(windows, _WINDOW))
    try:
        yield
    finally:
        for owner, windows in before:
            _set_all(owner, windows)


def _set_all(owner: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(owner, name, value)


def _vocabulary(lm: Any) -> int:
    return lm.config.get_text_config().vocab_size


def _plain_log_probs(lm: Any, ids: tuple[int, ...]) -> Tensor:
    logits = lm(input_ids=torch.tensor([ids])).logits[0, 1:-1].float()
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids[2:]).unsqueeze(-1)).squeeze(-1)

"""The vectors of a model, in all the ways in which it can be asked for them, from one generation.

The states of a prompt do not see what comes after it. So the mean over a text's states and the mean over its
rationale's make every mixture of the two, and other rationales cost a forward and no generation.

Letters: N texts, H hidden size.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from verl import GraceEncoder
from verl.embedding.pooling import average, unit, without_direction
from verl.embedding.prompts import Prompt, rationale_messages
from verl.embedding.settings import Mix
from verl.encoder.call import row_seed
from verl.models.packing import Row
from verl.workers.rollout.base import finish

# Pools what comes after the prompt alone.
_ANSWER_ALONE = Mix(text_share=0.0)
_BATCH = 64


class Answers(NamedTuple):
    """What stands after the prompts of N texts."""

    means: torch.Tensor
    """[N,H] float32, means of its hidden states."""
    tokens: torch.Tensor
    """[N] float32, how many."""


@dataclass(frozen=True)
class States:
    texts: list[str]
    means: torch.Tensor
    """[N,H] float32, of the hidden states of the texts."""
    tokens: torch.Tensor
    """[N] float32, how many states that is; the end of the prompt is among them."""
    answers: dict[str, Answers]
    """By name: `rationale`, `shuffled` (that of another text), `echo` (the text itself)."""
    generated: int = 0
    """Tokens generated."""


class Variant(NamedTuple):
    """A way to make one vector of a text."""

    answer: str | None = None
    """Name of what stands after the prompt; None = nothing."""
    mix: Mix = Mix()
    """How the two become one vector."""
    centre: bool = False
    """Whether the direction of the mean vector of training texts is taken out."""

    @property
    def name(self) -> str:
        if self.answer is None:
            words = ["without"]
        else:
            words = [self.answer]
            words += [] if self.mix.text_share is None else [f"text {self.mix.text_share:g}"]
            words += [f"without {self.mix.no_rationale_weight:g}"] if self.mix.no_rationale_weight else []
        return " + ".join([*words, *(["centre"] if self.centre else [])])


WITHOUT = Variant()


def read_states(encoder: GraceEncoder, texts: Sequence[str], answers: Sequence[str], seed: int = 0) -> States:
    """The states of N different texts.

    Args:
        encoder: of whose settings the prompt and the length and temperature of rationales are used.
        answers: names of what to put after the prompts, see `States`.
        seed: of the rationales, and of the texts that they are shuffled to.
    """
    settings = encoder.settings
    prompts = encoder.renderer.render([rationale_messages(text, settings.system_prompt) for text in texts])
    starts = [settings.pool_start(prompt, has_rationale=False) for prompt in prompts]
    rows = [Row(tuple(prompt.ids), (), start, False) for prompt, start in zip(prompts, starts, strict=True)]
    means = torch.from_numpy(encoder.backend.embed(rows, _BATCH))
    tokens = torch.tensor([len(prompt.ids) - start for prompt, start in zip(prompts, starts, strict=True)])
    made: dict[str, Answers] = {}
    generated = 0
    if "rationale" in answers or "shuffled" in answers:
        generation = encoder.backend.generate(
            [prompt.ids for prompt in prompts], settings.temperature, settings.max_new_tokens,
            [row_seed(seed, prompt.ids) for prompt in prompts], _BATCH,
        )  # fmt: skip
        written = [tuple(response.ids) for response in finish(generation)]
        generated = sum(map(len, written))
        made["rationale"] = _answered(encoder, prompts, starts, written)
        others = [written[other] for other in another_each(len(texts), seed)]
        made["shuffled"] = _answered(encoder, prompts, starts, others)
    if "echo" in answers:
        repeated = [
            tuple(encoder.tokenizer(prompt.text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
            for prompt in prompts
        ]
        made["echo"] = _answered(encoder, prompts, starts, repeated)
    return States(list(texts), means, tokens.float(), made, generated)


def another_each(count: int, seed: int) -> list[int]:
    """For each of `count` positions another one, each once: one random circle through all of them.

    Raises:
        ValueError: there are fewer than two.
    """
    if count < 2:
        raise ValueError(f"{count} rationales cannot be shuffled")
    circle = list(range(count))
    random.Random(seed).shuffle(circle)
    other = dict(zip(circle, [*circle[1:], circle[0]], strict=True))
    return [other[position] for position in range(count)]


def vectors_of(states: States, variant: Variant, centre_texts: States | None = None) -> torch.Tensor:
    """[N,H] float32 of unit length: the vectors that an encoder with these settings gives.

    Args:
        centre_texts: the states of the texts whose mean vector is taken out, with `variant.centre`.
    """
    vectors = states.means
    if variant.answer is not None:
        answer, (share, weight) = states.answers[variant.answer], variant.mix
        # By length every token counts the same.
        text = (
            states.tokens / (states.tokens + answer.tokens) if share is None else torch.full_like(answer.tokens, share)
        )
        vectors = text.unsqueeze(1) * states.means + (1 - text).unsqueeze(1) * answer.means
        if weight:
            vectors = average(vectors, states.means, torch.full_like(answer.tokens, weight).unsqueeze(1))
    if variant.centre:
        assert centre_texts is not None, "the mean is that of other texts"
        mean = vectors_of(centre_texts, variant._replace(centre=False)).mean(0)
        vectors = without_direction(vectors, mean)
    return unit(vectors)


def lookup(texts: Sequence[str], vectors: np.ndarray) -> Callable[[Sequence[str]], np.ndarray]:
    """The vectors [N,H] of N texts out of those of all `texts`."""
    position = {text: number for number, text in enumerate(texts)}
    return lambda wanted: vectors[[position[text] for text in wanted]]


def _answered(
    encoder: GraceEncoder, prompts: Sequence[Prompt], starts: Sequence[int], answers: Sequence[tuple[int, ...]]
) -> Answers:
    rows = [
        Row(tuple(prompt.ids), answer, start, False, _ANSWER_ALONE)
        for prompt, start, answer in zip(prompts, starts, answers, strict=True)
    ]
    return Answers(
        torch.from_numpy(encoder.backend.embed(rows, _BATCH)), torch.tensor([len(a) for a in answers]).float()
    )

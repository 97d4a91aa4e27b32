"""The vectors of a model, in all the ways in which it can be asked for them, from one generation.

The states of a prompt do not see what comes after it. So the mean over a text's states and the mean over its
rationale's make every mixture of the two, and other rationales cost a forward and no generation.

Letters: N texts, H hidden size.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
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

# Pools what comes after the prompt alone, or the text where nothing does.
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

    @property
    def generated(self) -> int:
        """Tokens generated."""
        return int(self.answers["rationale"].tokens.sum()) if "rationale" in self.answers else 0

    def part(self, rows: slice) -> "States":
        """Those of some of the texts."""
        answers = {name: Answers(means[rows], tokens[rows]) for name, (means, tokens) in self.answers.items()}
        return States(self.texts[rows], self.means[rows], self.tokens[rows], answers)


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


def read_states(
    encoder: GraceEncoder, groups: Sequence[Sequence[str]], answers: Sequence[str], seed: int = 0
) -> list[States]:
    """The states of the texts of each group.

    Args:
        encoder: of whose settings the prompt and the length and temperature of rationales are used.
        groups: of different texts; rationales are shuffled inside of each.
        answers: names of what to put after the prompts, see `States`.
        seed: of the rationales, and of the texts that they are shuffled to.
    """
    settings = encoder.settings
    texts = [text for group in groups for text in group]
    prompts = encoder.renderer.render([rationale_messages(text, settings.system_prompt) for text in texts])
    starts = [settings.pool_start(prompt, has_rationale=False) for prompt in prompts]
    tokens = torch.tensor([len(prompt.ids) - start for prompt, start in zip(prompts, starts, strict=True)]).float()
    put: dict[str, list[tuple[int, ...]]] = {}
    if "rationale" in answers:
        put["rationale"] = _write(encoder, prompts, seed)
    if "shuffled" in answers:
        put["shuffled"] = [put["rationale"][other] for other in _others(groups, seed)]
    if "echo" in answers:
        put["echo"] = [_repeated(encoder, prompt) for prompt in prompts]
    # In one call, which computes a prompt once for all that follow it.
    nothing: tuple[int, ...] = ()
    kinds = [[nothing] * len(texts), *put.values()]
    rows = [
        Row(tuple(prompt.ids), answer, start, False, _ANSWER_ALONE)
        for kind in kinds
        for prompt, start, answer in zip(prompts, starts, kind, strict=True)
    ]
    means, *of_answers = torch.from_numpy(encoder.backend.embed(rows, _BATCH)).split(len(texts))
    made = {
        name: Answers(vectors, torch.tensor([len(own) for own in put[name]]).float())
        for name, vectors in zip(put, of_answers, strict=True)
    }
    ends = list(accumulate(map(len, groups), initial=0))
    whole = States(texts, means, tokens, made)
    return [whole.part(slice(start, end)) for start, end in pairwise(ends)]


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


def _write(encoder: GraceEncoder, prompts: Sequence[Prompt], seed: int) -> list[tuple[int, ...]]:
    """Rationales, each from a seed of its own, as the encoder draws them."""
    settings = encoder.settings
    generation = encoder.backend.generate(
        [prompt.ids for prompt in prompts], settings.temperature, settings.max_new_tokens,
        [row_seed(seed, prompt.ids) for prompt in prompts], _BATCH,
    )  # fmt: skip
    return [tuple(response.ids) for response in finish(generation)]


def _others(groups: Sequence[Sequence[str]], seed: int) -> list[int]:
    """For each text the position of another one of its group."""
    starts = accumulate(map(len, groups), initial=0)
    return [
        start + other for start, group in zip(starts, groups, strict=False) for other in another_each(len(group), seed)
    ]


def _repeated(encoder: GraceEncoder, prompt: Prompt) -> tuple[int, ...]:
    return tuple(encoder.tokenizer(prompt.text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

"""Samples become prompt rows: their chats are rendered, with what their roles put around the texts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from verl.embedding.chat_template import Message
from verl.embedding.prompts import PromptRenderer, rationale_messages
from verl.embedding.settings import EmbedderSettings
from verl.protocol import DataProto, left_padded
from verl.text_roles import ROLES, Around, Role

Sample = dict[str, Any]
"""A row with its `uid`, `chats` (by role), `text_roles` (as what each text is embedded), `more_negatives` (their chats)
and `other_positives` (their chats, which are not embedded); a sample without the last two has none."""


def around_text(sample: Sample, role: Role | None, settings: EmbedderSettings) -> Around:
    """What the user's turn holds besides a text of a sample.

    Args:
        role: as what the text is embedded.
    """
    source = (sample["extra_info"] or {}).get("source")
    return settings.around(role, source if source in settings.instructions else None)


@dataclass(frozen=True)
class PromptCollator:
    """Renders samples to prompt rows: a row per sample and role, and one per further negative; the trained row first.

    Args:
        settings: what stands around a text, whether it gets a rationale, and how a row is pooled; the same settings are
            written for the encoder.
        reward_fn_key: the column that `data_source` is taken from.
        trained_text: the role of the trained rows.
    """

    renderer: PromptRenderer
    settings: EmbedderSettings
    reward_fn_key: str
    trained_text: str = "positive"

    def __call__(self, samples: Sequence[Sample]) -> DataProto:
        """See verl/protocol.py for the columns."""
        owners = [(sample, role, chat) for sample in samples for role, chat in rows_of(sample)]
        prompts = self.renderer.render([chat for _, _, chat in owners], [self._around(*owner[:2]) for owner in owners])
        limits = [self._limits[sample["text_roles"].get(role)] for sample, role, _ in owners]
        starts = [
            self.settings.pool_start(prompt, has_rationale=bool(limit))
            for prompt, limit in zip(prompts, limits, strict=True)
        ]
        tensors = {
            "prompts": left_padded([prompt.ids for prompt in prompts], self.renderer.tokenizer.pad_token_id),
            "prompt_length": torch.tensor([len(prompt.ids) for prompt in prompts]),
            "text_start": torch.tensor([prompt.text_start for prompt in prompts]),
            "pool_start": torch.tensor(starts),
            "trained": torch.tensor([role == self.trained_text for _, role, _ in owners]),
            "max_new_tokens": torch.tensor(limits),
        }
        share, weight = self.settings.mix
        if share is not None:
            tensors["text_share"] = torch.full((len(prompts),), share, dtype=torch.float64)
        if weight:
            tensors["no_rationale_weight"] = torch.full((len(prompts),), weight, dtype=torch.float64)
        columns = {
            "uid": [sample["uid"] for sample, _, _ in owners],
            "role": [role for _, role, _ in owners],
            "text": [prompt.text for prompt in prompts],
            "data_source": [sample[self.reward_fn_key] for sample, _, _ in owners],
            "reward_model": [sample["reward_model"] for sample, _, _ in owners],
            "extra_info": [sample["extra_info"] for sample, _, _ in owners],
            "other_positives": self._other_positives(samples),
        }
        return DataProto.from_dict(tensors, columns, {"num_shortened": sum(p.shortened for p in prompts)})

    def build_sample(self, uid: int, texts: Mapping[str, str], source: str, text_roles: Mapping[str, Role]) -> Sample:
        """A sample of texts that no file of prompts holds; they get the settings' system prompt.

        Args:
            texts: by role.
            source: its `data_source`.
            text_roles: as what each text is embedded.
        """
        chats = {role: rationale_messages(text, self.settings.system_prompt) for role, text in texts.items()}
        return {
            "uid": uid, "chats": chats, "text_roles": text_roles, self.reward_fn_key: source, "reward_model": None,
            "extra_info": None,
        }  # fmt: skip

    def _around(self, sample: Sample, role: str) -> Around:
        return around_text(sample, sample["text_roles"].get(role), self.settings)

    @cached_property
    def _limits(self) -> dict[Role | None, int]:
        """Most tokens of a rationale, by what a text is embedded as; 0 = none is written."""
        found = {role: self.settings.of_role(role) for role in (None, *ROLES)}
        return {role: own.max_new_tokens * own.think for role, own in found.items()}

    def _other_positives(self, samples: Sequence[Sample]) -> list[tuple[str, ...]]:
        """For every row the texts of its sample's other positives, as they would be in a prompt."""
        others = [(sample, chat) for sample in samples for chat in sample.get("other_positives", ())]
        around = [self._around(sample, "positive") for sample, _ in others]
        texts = iter([prompt.text for prompt in self.renderer.render([chat for _, chat in others], around)])
        of_samples = [tuple(next(texts) for _ in sample.get("other_positives", ())) for sample in samples]
        return [found for sample, found in zip(samples, of_samples, strict=True) for _ in rows_of(sample)]


def without_repeats(sample: Sample) -> Sample:
    """A sample with each of its texts once: the second role of a plain text is the same text."""
    chats = sample["chats"]
    return sample if "negative" in chats else {**sample, "chats": {"positive": chats["positive"]}}


def rows_of(sample: Sample) -> list[tuple[str, list[Message]]]:
    """The role and the chat of each row of a sample."""
    return [*sample["chats"].items(), *(("negative", chat) for chat in sample.get("more_negatives", ()))]

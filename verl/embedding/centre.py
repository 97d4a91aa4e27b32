"""The mean vectors of a model's data, in a file of its folder; their direction is taken out of what the model embeds.

The vectors of a language model lie in a narrow cone, so that all their cosines are high; what is left without the
common direction tells texts apart.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from verl.embedding.settings import EmbedderSettings
from verl.errors import UserError
from verl.text_roles import INSTRUCTION
from verl.utils.files import replace_file

# In a folder of its own: every *.safetensors beside config.json is taken for weights, by vLLM among others.
FILE_NAME = "embedder_centre/mean.safetensors"
# With another value of one of these, or another template, the vectors have another mean.
_DECIDING = (
    "pooling", "span", "pool_system_prompt", "text_share", "no_rationale_weight", "system_prompt", "system_prompt_in",
)  # fmt: skip
_WITH, _WITHOUT, _SETTINGS = "with_rationale", "without_rationale", "settings"
_WAY_OUT = "make it again with python3 -m verl.centre, or embed without it (--no_centre, centre=False)"


@dataclass(frozen=True)
class Centre:
    """Means of unit vectors."""

    with_rationale: np.ndarray | None
    """[H] float32; None of a model that embeds without (think=False)."""
    without_rationale: np.ndarray | None
    """[H] float32; None with span=rationale, which has no such vectors."""

    def mean(self, thinks: bool) -> np.ndarray:
        """[H]: of the vectors with rationales, or of those without.

        Raises:
            UserError: it has no mean of these.
        """
        mean = self.with_rationale if thinks else self.without_rationale
        if mean is None:
            has, wanted = ("without", "with") if thinks else ("with", "without")
            raise UserError(
                f"the model's centre is that of vectors {has} rationales, and these are {wanted}; {_WAY_OUT}"
            )
        return mean

    def write(self, folder: Path, settings: EmbedderSettings) -> None:
        """Write it into a model folder.

        Args:
            settings: by which the vectors were made.
        """
        both = {_WITH: self.with_rationale, _WITHOUT: self.without_rationale}
        means = {name: mean for name, mean in both.items() if mean is not None}
        (folder / FILE_NAME).parent.mkdir(exist_ok=True)
        replace_file(folder / FILE_NAME, save(means, {_SETTINGS: json.dumps(_decided_by(settings))}))

    @classmethod
    def read(cls, folder: Path, settings: EmbedderSettings) -> "Centre":
        """The centre of a model folder.

        Raises:
            UserError: there is none, it is damaged, or it is that of vectors by other settings than `settings`.
        """
        file = folder / FILE_NAME
        if not file.is_file():
            raise UserError(f"centre=True, and {file} does not exist; {_WAY_OUT}")
        try:
            with safe_open(file, framework="np") as opened:
                made_by = json.loads((opened.metadata() or {})[_SETTINGS])
                means = {name: opened.get_tensor(name) for name in opened.keys()}
            if not means.keys() & {_WITH, _WITHOUT}:
                raise KeyError(_WITH)
            centre = cls(means.get(_WITH), means.get(_WITHOUT))
        except (SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"{file} is damaged or no centre ({error!r}); {_WAY_OUT}") from error
        for name, value in _decided_by(settings).items():
            if made_by.get(name) != value:
                raise UserError(
                    f"{file} holds the mean of vectors by {name}={made_by.get(name)!r}, and it is {value!r} now; "
                    f"{_WAY_OUT}"
                )
        return centre


def _decided_by(settings: EmbedderSettings) -> dict[str, Any]:
    """What decides the vectors of texts without a role, of which a centre is the mean."""
    template = settings.template.replace(INSTRUCTION, settings.instruction(None, None))
    return {**settings.model_dump(include=set(_DECIDING)), "template": template}

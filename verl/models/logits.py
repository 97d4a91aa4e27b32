"""What becomes of the numbers of the LM head before they are logits: a scale, a soft cap, and the temperature."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class LogitForm:
    """logits = cap x tanh(scale x number / cap) / temperature, or scale x number / temperature without a cap."""

    scale: float = 1.0
    cap: float | None = None
    temperature: float = 1.0

    def logits(self, numbers: Tensor) -> Tensor:
        """The logits of the head's float32 numbers, in place."""
        if self.cap is None:
            return numbers.div_(self.temperature / self.scale)
        return numbers.mul_(self.scale / self.cap).tanh_().mul_(self.cap / self.temperature)

    def slope(self, logits: Tensor) -> Tensor | float:
        """The derivative of logits by the head's numbers, where these logits came out."""
        slope = self.scale / self.temperature
        if self.cap is None:
            return slope
        return (logits * (self.temperature / self.cap)).square_().neg_().add_(1).mul_(slope)


def logit_form(config: Any, temperature: float = 1.0) -> LogitForm:
    """The form that a model's config asks for: Cohere multiplies logits, Granite divides them, Gemma caps them.

    Whether the model's family means the same by these names is proved at load (`probe.py`).
    """
    text = config.get_text_config()
    scale = getattr(text, "logit_scale", None) or 1.0
    return LogitForm(
        scale=scale / (getattr(text, "logits_scaling", None) or 1.0),
        cap=getattr(text, "final_logit_softcapping", None),
        temperature=temperature,
    )

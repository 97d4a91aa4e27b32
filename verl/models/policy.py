"""The model forward: one pass over a packed micro-batch gives log-probs, entropies and embeddings.

Shapes: N rows, K packed tokens, S scored tokens, H hidden size, V vocabulary. Nothing of
size [S,V] is kept (`log_probs`), and the LM head runs on scored positions only.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from verl.embedding.pooling import average, mean_pool
from verl.errors import UserError
from verl.models.attention import ATTENTION, ATTENTIONS
from verl.models.log_probs import token_log_probs
from verl.models.logits import logit_form
from verl.models.packing import PackedBatch


@dataclass
class PolicyOutput:
    log_probs: Tensor | None
    """[S] float32, log-prob of each scored token at the given temperature; None if not asked for."""
    entropy: Tensor | None
    """[S] float32, entropy in nats of the distribution of each scored token; None if not asked for."""
    embeddings: Tensor | None
    """[N,H] float32, see `pool`; None if not asked for."""


class PolicyModel(nn.Module):
    """A transformers causal language model that runs on packed micro-batches."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm
        # Where forwards run. The weights do not say it: offloaded ones are in host memory between forwards.
        self.device = lm.device

    @property
    def shares_prompts(self) -> bool:
        """Whether `pack` should share prompts: yes where attention runs segment by segment on a CPU."""
        return self.device.type == "cpu"

    def forward(
        self, packed: PackedBatch, temperature: float = 1.0, log_probs: bool = True, entropy: bool = False,
        embeddings: bool = False,
    ) -> PolicyOutput:  # fmt: skip
        """Run the model once.

        Args:
            packed: the micro-batch, on the model's device.
            temperature: divides the logits; the one that the tokens were sampled with.
            log_probs: compute log-probs of the scored tokens.
            entropy: compute entropies too (needs log_probs).
            embeddings: pool the hidden states of each row.

        Raises:
            RuntimeError: the model's attention is not `grace_attention`.
            UserError: see `check_longest_row`.
        """
        if self.lm.config._attn_implementation not in ATTENTIONS.values():
            # Any other attention would let rows attend to each other, without an error.
            raise RuntimeError(f"the policy's attention is {self.lm.config._attn_implementation!r}, not {ATTENTION!r}")
        check_longest_row(self.lm.config, packed.longest_row)
        hidden = self.lm.base_model(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            use_cache=False,
            packed_segments=packed.segments,
        ).last_hidden_state[0]  # [K,H]
        vectors = pool(hidden, packed) if embeddings else None
        if not log_probs:
            return PolicyOutput(None, None, vectors)
        # Rows of a shared prompt score at its last token. Indexing would add the gradients of such a token in any order
        # of the threads, and round differently from run to run. (On a GPU no prompt is shared, and no index repeats.)
        scoring = hidden.index_select(0, packed.score_token)
        head, form = self.lm.get_output_embeddings(), logit_form(self.lm.config, temperature)
        scored, entropies = token_log_probs(head, scoring, packed.score_target, form, entropy)
        return PolicyOutput(scored, entropies, vectors)


def pool(hidden: Tensor, packed: PackedBatch) -> Tensor:
    """[N,H] float32: the vector of each row, by its `Mix`; without one the mean of its pooled hidden states.

    Args:
        hidden: [K,H].
    """
    num_rows, averaged = packed.num_rows, packed.averaged
    vectors = mean_pool(
        hidden, packed.pool_token, packed.pool_row, num_rows + len(averaged), packed.pool_weight
    )  # fmt: skip
    if not len(averaged):
        return vectors
    whole, texts = vectors[:num_rows], vectors[num_rows:]
    mixed = average(whole.index_select(0, averaged), texts, packed.average_weight.unsqueeze(1))
    return whole.index_copy(0, averaged, mixed)


def context_of(config: Any) -> int | None:
    """Most positions of a row, where a model's config has a limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_longest_row(config: Any, length: int) -> None:
    """Check that the positions of a row of `length` tokens do not depend on other rows.

    Raises:
        UserError: the row is longer than the original context of a model that then changes the positions of all rows
            that are computed together.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    # Some types have settings of their own for each kind of layer.
    for found in (rope, *(own for own in rope.values() if isinstance(own, dict))):
        limit = found.get("original_max_position_embeddings") or text.max_position_embeddings
        if found.get("rope_type") in ("dynamic", "longrope") and length > limit:
            raise UserError(
                f"a row of {length} tokens is longer than the {limit} tokens up to which this model's positions "
                f"(rope_type {found['rope_type']}) are the same for all rows; shorten prompts or rationales "
                "(data.max_prompt_length + data.max_response_length in training)"
            )

"""The model forward: one pass over a packed micro-batch gives log-probs, entropies and embeddings.

Shapes: N rows, K packed tokens, S scored tokens, H hidden size, V vocabulary. Nothing of
size [S,V] is kept (`log_probs`), and the LM head runs on scored positions only.
"""

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from verl.embedding.pooling import average, mean_pool
from verl.errors import UserError
from verl.models.attention import ATTENTION, ATTENTIONS, Kernel
from verl.models.families import FAMILIES
from verl.models.log_probs import token_log_probs
from verl.models.logits import logit_form
from verl.models.lora import base_of_adapter, merge_adapter
from verl.models.onednn import pack_linears, replace_linears
from verl.models.packing import PackedBatch, Row, pack
from verl.models.probe import Rows, dropout_of, set_dropout, why_unsupported


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
        scored, entropies = token_log_probs(
            self.lm.get_output_embeddings(), scoring, packed.score_target, temperature, entropy,
            logit_form(self.lm.config),
        )  # fmt: skip
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


def load_causal_lm(
    path: str, trust_remote_code: bool = False, override_config: dict[str, Any] | None = None, kernel: Kernel = "auto"
) -> Any:
    """The model of a folder or hub name in float32, on the CPU, with packed attention and without dropout.

    Of an adapter it is the adapter's model, with the adapter merged into its weights.

    Args:
        kernel: what computes attention on CUDA.

    Its config keeps the dtype that the folder is stored in, in which checkpoints are written.

    Raises:
        UserError: transformers cannot load the model, its files lack a weight, or the packed forward cannot stand for
            the model's own.
        OSError: there is no model at `path`.
    """
    with explained_load(path):
        lm = _load_eager(path, trust_remote_code, override_config or {})
    prove(lm, path, kernel)
    replace_linears(lm)
    return lm


def prove(lm: Any, path: str, kernel: Kernel) -> None:
    """Give a model with transformers' plain attention the packed one, and prove it; see `why_unsupported`.

    Raises:
        UserError: the packed forward cannot stand for the model's own.
    """
    reason = why_unsupported(lm, ATTENTIONS[kernel], lambda rows: _packed_log_probs(lm, rows))
    if reason:
        raise UserError(
            f"{path!r} (a model of type {lm.config.model_type!r}) is not supported: {reason}. "
            f"Types that are: {', '.join(FAMILIES)}; see docs/models.md"
        )


@contextmanager
def explained_load(path: str) -> Iterator[None]:
    """Make transformers' errors about a model a UserError."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        problem = " ".join(str(error).split())[:500]
        raise UserError(f"{path!r}: transformers loads no causal language model from it: {problem}") from error


@dataclass(frozen=True)
class Blueprint:
    """What a model is built from."""

    config: Any
    """Without dropout."""
    dropout: dict[str, float]
    """The rates that the stored config has."""
    dtype: torch.dtype | None
    """That the weights are stored in, by the stored config."""

    def finish(self, lm: Any) -> None:
        """Let the model's config, which checkpoints get, be the stored one; its layers have no dropout, and float32."""
        set_dropout(lm.config, self.dropout)
        lm.config.dtype = self.dtype


def read_blueprint(path: str, trust_remote_code: bool, override_config: dict[str, Any]) -> Blueprint:
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **override_config)
    dropout = dropout_of(config)
    set_dropout(config, dict.fromkeys(dropout, 0.0))
    return Blueprint(config, dropout, config.dtype)


def refuse_names(path: str, problem: str, names: Collection[str]) -> NoReturn:
    """Raise the UserError about names of weights in a model's files."""
    shown = ", ".join(sorted(names)[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    raise UserError(f"the weights of {path!r} {problem} {shown}{more}; get the model's files anew, or another model")


def _load_eager(path: str, trust_remote_code: bool, override_config: dict[str, Any]) -> Any:
    """The model without dropout, with transformers' plain attention: the fused one leaves out Gemma 2's soft cap."""
    if base := base_of_adapter(path):
        return merge_adapter(_load_eager(base, trust_remote_code, override_config), path)
    blueprint = read_blueprint(path, trust_remote_code, override_config)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path, config=blueprint.config, dtype=torch.float32, attn_implementation="eager",
        trust_remote_code=trust_remote_code, output_loading_info=True,
    )  # fmt: skip
    lm, found = loaded
    if found["missing_keys"]:
        # transformers has made them up, and warned.
        refuse_names(path, "lack", found["missing_keys"])
    blueprint.finish(lm)
    return lm


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


def round_weights(lm: nn.Module, dtype: torch.dtype) -> None:
    """Give the weights of a model another dtype, in place, and leave its buffers, such as rotary frequencies, float32.

    So training computes, whose weights alone are gathered in another dtype.
    """
    for weight in lm.parameters():
        weight.data = weight.data.to(dtype)


def build_twin(lm: Any, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False) -> Any:
    """A model of the same architecture that the hf engine decodes with; its weights are random until a sync."""
    # A copy, because from_config changes the config that it is given.
    config = copy.deepcopy(lm.config)
    # There at once, or every rank would build a whole model in host memory.
    with device:
        twin = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=lm.config._attn_implementation, trust_remote_code=trust_remote_code
        )
    twin.requires_grad_(False)
    pack_linears(twin)
    return twin


def _packed_log_probs(lm: Any, rows: Rows) -> Tensor:
    output = PolicyModel(lm)(pack([Row(ids[:2], ids[2:], 0, True) for ids in rows], share_prompts=True))
    assert output.log_probs is not None
    return output.log_probs

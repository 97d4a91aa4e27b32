"""The model forward: one pass over a packed micro-batch gives log-probs, entropies and embeddings.

Shapes: N rows, K packed tokens, S scored response tokens, H hidden size, V vocabulary. Nothing of
size [S,V] is kept (`log_probs`), and the LM head runs on scored positions only.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from verl.embedding.pooling import mean_pool
from verl.models.attention import ATTENTION
from verl.models.log_probs import token_log_probs
from verl.models.onednn import pack_linears, replace_linears
from verl.models.packing import PackedBatch, Row, pack


@dataclass
class PolicyOutput:
    log_probs: Tensor | None
    """[S] float32, log-prob of each scored token at the given temperature; None if not asked for."""
    entropy: Tensor | None
    """[S] float32, entropy in nats of the distribution of each scored token; None if not asked for."""
    embeddings: Tensor | None
    """[N,H] float32, means of the hidden states at the pooled positions; None if not asked for."""


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
        """
        if self.lm.config._attn_implementation != ATTENTION:
            # Any other attention would let rows attend to each other, without an error.
            raise RuntimeError(f"the policy's attention is {self.lm.config._attn_implementation!r}, not {ATTENTION!r}")
        hidden = self.lm.base_model(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            use_cache=False,
            packed_segments=packed.segments,
        ).last_hidden_state[0]  # [K,H]
        vectors = mean_pool(hidden, packed.pool_token, packed.pool_row, packed.num_rows) if embeddings else None
        if not log_probs:
            return PolicyOutput(None, None, vectors)
        head = self.lm.get_output_embeddings()
        scored, entropies = token_log_probs(head, hidden[packed.score_token], packed.score_target, temperature, entropy)
        return PolicyOutput(scored, entropies, vectors)


def load_causal_lm(path: str, trust_remote_code: bool = False, override_config: dict[str, Any] | None = None) -> Any:
    """The model of a folder or hub name in float32, on the CPU, with packed attention.

    Its config keeps the dtype that the folder is stored in, in which checkpoints are written.

    Raises:
        ValueError: the packed forward differs from the model's own, or transformers cannot load the model.
        OSError: there is no model at `path`.
    """
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **(override_config or {}))
    stored_dtype = config.dtype
    lm = AutoModelForCausalLM.from_pretrained(
        path,
        config=config,
        dtype=torch.float32,
        attn_implementation="sdpa",
        trust_remote_code=trust_remote_code,
    )
    # transformers has set it to float32.
    lm.config.dtype = stored_dtype
    plain = _probe_plain(lm)
    lm.set_attn_implementation(ATTENTION)
    packed = _probe_packed(lm)
    gap = (plain - packed).abs().max().item()
    if not gap < 1e-3:
        raise ValueError(
            f"{path!r}: the packed forward differs from the model's own by {gap:.3g} in log-prob; models of type "
            f"{config.model_type!r} do something between hidden states and log-probs that is not supported"
        )
    replace_linears(lm)
    return lm


def build_twin(lm: Any, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False) -> Any:
    """A model of the same architecture that the hf engine decodes with; its weights are random until a sync."""
    # A copy, because from_config changes the config that it is given.
    config = copy.deepcopy(lm.config)
    twin = AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation=ATTENTION, trust_remote_code=trust_remote_code
    )
    twin = twin.to(device).requires_grad_(False)
    pack_linears(twin)
    return twin


def _probe_rows(vocab_size: int) -> list[tuple[int, ...]]:
    return [tuple((7 * i + j) % min(vocab_size, 97) for j in range(3 + 4 * i)) for i in (1, 2)]


@torch.no_grad()
def _probe_plain(lm: Any) -> Tensor:
    lm.eval()
    scores = []
    for ids in _probe_rows(lm.config.get_text_config().vocab_size):
        logits = lm(input_ids=torch.tensor([ids])).logits[0, :-1].float()
        scores.append(logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:]).unsqueeze(-1)).squeeze(-1)[1:])
    return torch.cat(scores)


@torch.no_grad()
def _probe_packed(lm: Any) -> Tensor:
    rows = [Row(ids[:2], ids[2:], 0, True) for ids in _probe_rows(lm.config.get_text_config().vocab_size)]
    output = PolicyModel(lm)(pack(rows, share_prompts=True))
    assert output.log_probs is not None
    return output.log_probs

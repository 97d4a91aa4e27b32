"""Building models: their configs, whole ones in host memory with the packed attention and its proof, and the twin that
the hf engine decodes with.
"""

import copy
from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from verl.config import Kernel, ModelConfig
from verl.errors import UserError, as_user_error
from verl.models.attention import ATTENTIONS
from verl.models.families import FAMILIES
from verl.models.lora import base_of_adapter, merge_adapter
from verl.models.onednn import pack_linears, replace_linears
from verl.models.packing import Row, pack
from verl.models.policy import PolicyModel
from verl.models.probe import Rows, dropout_of, set_dropout, why_unsupported


def load_causal_lm(
    path: str, trust_remote_code: bool = False, override_config: dict[str, Any] | None = None, kernel: Kernel = "auto"
) -> Any:
    """The model of a folder or hub name in float32, on the CPU, with packed attention and without dropout.

    Of an adapter it is the adapter's model, with the adapter merged into its weights. Its config keeps the dtype that
    the folder is stored in, in which checkpoints are written.

    Args:
        kernel: what computes attention on CUDA.

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


def explained_load(path: str) -> AbstractContextManager[None]:
    """Make transformers' errors about a model a UserError."""

    def say(error: Exception) -> str:
        problem = " ".join(str(error).split())[:500]
        return f"{path!r}: transformers loads no causal language model from it: {problem}"

    return as_user_error(ValueError, say=say)


@dataclass(frozen=True)
class Blueprint:
    """What a model is built from."""

    config: Any
    """Without dropout."""
    dropout: dict[str, float]
    """The rates that the stored config has."""
    dtype: torch.dtype | None
    """The dtype that the weights are stored in, by the stored config."""

    def finish(self, lm: Any) -> None:
        """Make its config, which checkpoints get, the stored one; the layers stay in float32, without dropout."""
        set_dropout(lm.config, self.dropout)
        lm.config.dtype = self.dtype


def read_blueprint(path: str, trust_remote_code: bool, override_config: dict[str, Any]) -> Blueprint:
    """What the model in a folder, or of a name on Hugging Face, is built from.

    Args:
        trust_remote_code: run code that comes with the model.
        override_config: values that replace those of its config.

    Raises:
        OSError, ValueError: transformers finds no config, or does not know the model's type; see `explained_load`.
    """
    config = _read_config(path, trust_remote_code, override_config)
    dropout = dropout_of(config)
    set_dropout(config, dict.fromkeys(dropout, 0.0))
    return Blueprint(config, dropout, config.dtype)


def read_model_config(model: ModelConfig) -> Any:
    """The config.json of the model that is trained, with `override_config`.

    Raises:
        OSError, ValueError: transformers finds none.
        UserError: the model is an adapter.
    """
    assert model.path is not None
    if base := base_of_adapter(model.path):
        raise UserError(
            f"actor_rollout_ref.model.path={model.path} is a LoRA adapter. To go on training it, set model.path={base} "
            f"and model.lora_adapter_path={model.path}; to train all weights, make a whole model of it with "
            "python3 -m verl.merge_model"
        )
    return _read_config(model.path, model.trust_remote_code, model.override_config)


def _read_config(path: str, trust_remote_code: bool, override_config: dict[str, Any]) -> Any:
    return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **override_config)


def refuse_names(path: str, problem: str, names: Collection[str], kind: type[UserError] = UserError) -> NoReturn:
    """Raise the error about names of weights in a model's files."""
    shown = ", ".join(sorted(names)[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    raise kind(f"the weights of {path!r} {problem} {shown}{more}; get the model's files anew, or another model")


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

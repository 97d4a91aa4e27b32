"""Loading a model into its shards: each rank reads from the safetensors files what it keeps, and no rank reads all.

The model is built without numbers, on torch's meta device, and sharded; then torch's reader of safetensors fills the
shards, converting from the files' dtype to float32 on the way. The proof of the packed forward needs numbers, so it
runs on a small model of the same config. A model whose files are not simply its weights under its own names is loaded
whole by `load_causal_lm`, which can convert them.

An encoder, which shards nothing, has its model read onto its GPU in the same way.
"""

import copy
import re
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from verl.config import Kernel
from verl.errors import UserError
from verl.models.attention import ATTENTIONS
from verl.models.families import FAMILIES
from verl.models.fsdp import LM_PREFIX, is_sharded
from verl.models.load import explained_load, load_causal_lm, prove, read_blueprint, refuse_names, round_weights
from verl.models.lora import base_of_adapter, is_part, plain_name
from verl.models.onednn import replace_linears
from verl.models.policy import PolicyModel

# Sizes of the small model of the proof. Both are free: no family derives another size from them.
_SMALL = {"vocab_size": 256, "intermediate_size": 64}
# Buffers that old files hold and models now compute; transformers leaves them out too.
_COMPUTED = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")


@dataclass(frozen=True)
class Loaded:
    lm: Any
    """Whole, on the CPU; or with a source, on the meta device but for its computed buffers."""
    source: "Source | None" = None
    """Of the weights, once the model is sharded."""
    why_whole: str | None = None
    """Why it is whole although it will be sharded."""


@dataclass(frozen=True)
class Source:
    """Where the weights of a model that was built without numbers are."""

    files: tuple[str, ...]
    """Safetensors files."""
    names: dict[str, str]
    """By name of a parameter or buffer in the model without adapters, the name in the files."""

    def fill(self, policy: PolicyModel, device: torch.device, alone: bool = False) -> None:
        """Read this rank's shards. All ranks call it.

        Args:
            policy: sharded, with weights on the meta device, and adapters with numbers.
            device: of the shards.
            alone: the policy is not sharded, and no other rank calls it.
        """
        # What `to_empty` does, which would empty the adapters and the computed buffers too.
        policy._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
        state = {}
        for own_name, tensor in [*policy.named_parameters(), *policy.named_buffers()]:
            name = plain_name(own_name.removeprefix(LM_PREFIX))
            if not is_part(name) and name in self.names:
                state[self.names[name]] = tensor.detach()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it should be, alone
            dcp.load(state, storage_reader=_Reader(self.files), no_dist=alone)


class _Reader(HuggingFaceStorageReader):
    """torch's reader, of these files of a folder alone; others may hold other weights under the same names."""

    def __init__(self, files: Sequence[str]) -> None:
        super().__init__(str(Path(files[0]).parent))
        self.fs = _Files(files)


class _Files(FileSystem):
    def __init__(self, files: Sequence[str]) -> None:
        self._files = list(files)

    def ls(self, path: Any) -> list[str]:
        return self._files


class _NotByShards(Exception):
    """The model cannot be read into its shards; the message says why."""


class _UnexpectedWeights(UserError):
    """The files have weights that the model has not."""


def load_to_shard(
    path: str, trust_remote_code: bool, override_config: dict[str, Any], kernel: Kernel, device: torch.device
) -> Loaded:
    """The model of `load_causal_lm`, for `shard` on that device: without numbers, wherever its files can fill shards.

    Raises:
        UserError: as `load_causal_lm`; or the files lack a weight, have one that the model has not, or one of another
            shape.
        OSError: as `load_causal_lm`.
    """
    why_whole = None
    if is_sharded(device.type):
        try:
            return _build_empty(path, trust_remote_code, override_config, kernel)
        except _NotByShards as reason:
            why_whole = str(reason)
    return Loaded(load_causal_lm(path, trust_remote_code, override_config, kernel), why_whole=why_whole)


def load_rounded(path: str, trust_remote_code: bool, dtype: torch.dtype, device: torch.device) -> Any:
    """The model of `load_causal_lm` on a device, its weights rounded to another dtype; for forwards alone.

    Its weights are read there one after the other, so that the host never holds the model. Where its files cannot be
    read so, it is loaded whole, in float32, and rounded on the host.

    Raises:
        UserError, OSError: as `load_causal_lm`.
    """
    try:
        loaded = _build_empty(path, trust_remote_code, {}, "auto")
    # An encoder on a CPU takes files with weights that the model has not, so one on a GPU does too.
    except (_NotByShards, _UnexpectedWeights):
        loaded = Loaded(load_causal_lm(path, trust_remote_code))
    round_weights(loaded.lm, dtype)
    if loaded.source:
        loaded.source.fill(PolicyModel(loaded.lm), device, alone=True)
        # A weight of two names has got a tensor for each, and numbers for one.
        loaded.lm.tie_weights()
    return loaded.lm.to(device)


def why_loaded_whole(config: Any, trust_remote_code: bool) -> str | None:
    """Why a model of this config is loaded whole; None where its files decide."""
    kind = config.model_type
    if kind not in FAMILIES or (trust_remote_code and getattr(config, "auto_map", None)):
        return "reading into shards is tested for the types in docs/models.md alone, without code of their own"
    if getattr(config, "quantization_config", None):
        return "its weights are quantized"
    if any(get_checkpoint_conversion_mapping(name) for name in (kind, *(config.architectures or ()))):
        return f"transformers converts the weights of type {kind!r} while it loads them"
    return None


def small_config(config: Any) -> Any:
    """The config of the proof's model: as few layers as have every kind of layer, at least two, and small free sizes.

    Widths of states, heads and positions are the model's own, so that its settings keep their meaning.
    """
    small = copy.deepcopy(config)
    text = small.get_text_config()
    layers = text.num_hidden_layers
    of_layers = {name: own for name, own in vars(text).items() if isinstance(own, list | tuple) and len(own) == layers}
    kinds = [repr([own[i] for own in of_layers.values()]) for i in range(layers)]
    text.num_hidden_layers = kept = min(layers, max(2, *(kinds.index(kind) + 1 for kind in kinds)))
    for name, own in of_layers.items():
        setattr(text, name, own[:kept])
    for name, size in _SMALL.items():
        if (getattr(text, name, None) or 0) > size:
            setattr(text, name, size)
    if (text.pad_token_id or 0) >= text.vocab_size:
        text.pad_token_id = None
    return small


def empty_lm(config: Any) -> Any:
    """A model in float32 with transformers' plain attention, on the meta device; the buffers it computes are real."""
    with init_empty_weights(include_buffers=False):
        lm = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
        )
    lm.tie_weights()
    return lm.eval()


def _build_empty(path: str, trust_remote_code: bool, override_config: dict[str, Any], kernel: Kernel) -> Loaded:
    if base := base_of_adapter(path):
        raise _NotByShards(f"it is an adapter, which is merged into {base}")
    with explained_load(path):
        blueprint = read_blueprint(path, trust_remote_code, override_config)
    if reason := why_loaded_whole(blueprint.config, trust_remote_code):
        raise _NotByShards(reason)
    lm = empty_lm(blueprint.config)
    files = _weight_files(path)
    names = _match(lm, path, _read_shapes(path, files))
    prove(_small_lm(blueprint.config), path, kernel)
    lm.set_attn_implementation(ATTENTIONS[kernel])
    lm.generation_config = _generation_config(path)
    blueprint.finish(lm)
    replace_linears(lm)
    return Loaded(lm, Source(files, names))


def _small_lm(config: Any) -> Any:
    """A small model of random numbers with which every layer, bias, norm and cap matters to the result."""
    small = small_config(config)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        lm = AutoModelForCausalLM.from_config(small, dtype=torch.float32, attn_implementation="eager").eval()
        for weight in lm.parameters():
            if weight.ndim == 1:
                weight.add_(0.3 * torch.randn_like(weight))
            else:
                weight.normal_(std=1.5 * weight.shape[-1] ** -0.5)
    return lm


def _weight_files(path: str) -> tuple[str, ...]:
    """The safetensors files that transformers would read."""
    found = {"_raise_exceptions_for_missing_entries": False}
    if single := cached_file(path, SAFE_WEIGHTS_NAME, **found):
        return (single,)
    if index := cached_file(path, SAFE_WEIGHTS_INDEX_NAME, **found):
        return tuple(get_checkpoint_shard_files(path, index)[0])
    raise _NotByShards(f"it has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}")


def _read_shapes(path: str, files: Sequence[str]) -> dict[str, torch.Size]:
    try:
        found = _Reader(files).read_metadata().state_dict_metadata
    except SafetensorError as error:
        raise UserError(f"a file of weights of {path!r} is damaged: {error}; get the model's files anew") from error
    return {name: stored.size for name, stored in found.items() if isinstance(stored, TensorStorageMetadata)}


def _match(lm: Any, path: str, shapes: dict[str, torch.Size]) -> dict[str, str]:
    """By name in the model, the name in the files.

    Raises:
        UserError: see `load_to_shard`.
    """
    wanted, stored = _stored_tensors(lm), {}
    for name, others in wanted.items():
        present = [one for one in (name, *others) if one in shapes]
        if len(present) > 1:
            raise _NotByShards(f"its config ties {' and '.join(present)}, and its files have both")
        if present:
            stored[name] = present[0]
    missing = wanted.keys() - stored.keys()
    ignored = re.compile("|".join((*_COMPUTED, *(lm._keys_to_ignore_on_load_unexpected or ()))))
    unexpected = {name for name in shapes.keys() - set(stored.values()) if not ignored.search(name)}
    if missing and unexpected:
        raise _NotByShards(f"its files name weights otherwise ({min(unexpected)}, and no {min(missing)})")
    if missing:
        refuse_names(path, "lack", missing)
    if unexpected:
        refuse_names(path, "hold weights that the model in config.json does not have:", unexpected, _UnexpectedWeights)
    own = lm.state_dict()
    for name, key in stored.items():
        if own[name].shape != shapes[key]:
            raise UserError(
                f"the weights of {path!r} have {key} in the shape {list(shapes[key])}, and by the config it is "
                f"{list(own[name].shape)}; get the model's files anew, or check override_config"
            )
    return stored


def _stored_tensors(lm: Any) -> dict[str, list[str]]:
    """Names of the parameters and of the buffers that are stored, each with the other names that it has (tied)."""
    persistent = set(lm.state_dict())
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in [*lm.named_parameters(remove_duplicate=False), *lm.named_buffers(remove_duplicate=False)]:
        if name in persistent:
            names[id(tensor)].append(name)
    return {first: others for first, *others in names.values()}


def _generation_config(path: str) -> GenerationConfig:
    """As transformers finds it when it loads a model."""
    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:
        return GenerationConfig.from_pretrained(path, config_file_name="config.json", _from_model_config=True)

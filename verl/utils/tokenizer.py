"""Loading a tokenizer, and the token ids that end a response."""

from pathlib import Path
from typing import Any

from verl.utils.hub_names import is_hub_name


def load_tokenizer(path: str, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a model folder or hub name; its pad token falls back to eos.

    Raises:
        ValueError: `path` looks like a folder and does not exist, or no tokenizer can be read from it.
    """
    from transformers import AutoTokenizer

    if not is_hub_name(path) and not Path(path).expanduser().exists():
        raise ValueError(f"model path {path!r} does not exist; give a folder that holds a model, or a hub name")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:
        # Its files are read by two libraries, and its folder may bring code: anything may be raised.
        raise ValueError(
            f"no tokenizer could be loaded from {path!r}: {error}\n"
            "Give a folder that exists here, or a hub name on a machine that reaches the hub."
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def stop_token_ids(tokenizer: Any, *configs: Any) -> list[int]:
    """Every id that ends a response: the tokenizer's eos and those of the model's configs, sorted.

    The union, because a model and its tokenizer may name different tokens (Qwen base and chat).

    Args:
        configs: objects with an `eos_token_id` that is None, an int or a list (config, generation config).

    Raises:
        ValueError: none of them names an eos token.
    """
    ids: set[int] = set()
    for source in (tokenizer, *configs):
        eos = getattr(source, "eos_token_id", None)
        ids.update([] if eos is None else [eos] if isinstance(eos, int) else eos)
    if not ids:
        raise ValueError("neither the tokenizer nor the model's config names an eos token; generation could not stop")
    return sorted(ids)

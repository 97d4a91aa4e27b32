"""The parts of `gpu_check.py`: each runs in a process of its own, and returns figures or says why it was skipped.

Shapes: K tokens of a packed line, H hidden size.
"""

import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import MODEL, REPO, get_model, prepare_examples
from one_worker import StepSize, build_config, prompt_rows, run_step, workers_of
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

from verl.config import RunConfig
from verl.models.attention import ATTENTIONS, Kernel, grace_attention
from verl.models.packing import Row, pack
from verl.models.policy import PolicyModel
from verl.models.varlen import varlen_problem
from verl.planning.plan import Machines, make_plan
from verl.trainer.memory_plan import find_work

sys.path.insert(0, str(REPO / "tests"))

from tiny import tiny_tokenizer

Found = dict[str, Any]


class Skipped(Exception):
    """The message says why a part cannot run here."""


@dataclass(frozen=True)
class Form:
    """How much is measured."""

    model: dict[str, Any]
    """What the config of the random Qwen2 model has."""
    step: StepSize
    lengths: tuple[int, ...]
    """Tokens of the rows of a packed line."""
    product: int
    """Rows and columns of the matrices whose product is the device's rate."""
    rounds: int


_QWEN2_1_5B = {
    "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2,
}  # fmt: skip
_TINY = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
FORMS = {
    "small": Form(_TINY, StepSize(2, 2, 4), (5, 17, 9), 256, 1),
    "full": Form(_QWEN2_1_5B, StepSize(16, 8, 256), (700, 90, 300, 512, 1200, 64, 450, 780), 8192, 5),
}


def rate(form: Form, device: str, folder: Path) -> Found:
    """FLOP/s of a large product: what MFU is a share of."""
    dtype = _dtype(device)
    a, b = (torch.randn(form.product, form.product, device=device, dtype=dtype) for _ in range(2))
    seconds = _seconds(lambda: a @ b, device, 4 * form.rounds)
    return {"dtype": str(dtype), "flop_per_s": 2 * form.product**3 / seconds}


def tests(form: Form, device: str, folder: Path) -> Found:
    """The tests that need a GPU."""
    if find_spec("pytest") is None:
        raise Skipped("pytest is not installed (pip install -e '.[dev]')")
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests/gpu"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    (folder / "tests.log").write_text(done.stdout + done.stderr)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    counts = {what: int(count) for count, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)}
    if done.returncode or not counts:
        raise RuntimeError(f"{last or done.stderr.strip()[-300:]} (see {folder / 'tests.log'})")
    reasons = sorted(set(re.findall(r"^SKIPPED \[\d+\] [^:]+:\d*:? ?(.+)$", done.stdout, re.MULTILINE)))
    return {**counts, "skipped_because": reasons}


def attention(form: Form, device: str, folder: Path) -> Found:
    """A packed line's attention, forward and backward: milliseconds of each kernel, and how far they are apart."""
    heads, key_heads = form.model["num_attention_heads"], form.model["num_key_value_heads"]
    size, dtype = form.model["hidden_size"] // heads, torch.bfloat16
    found: Found = {"tokens": sum(form.lengths), "rows": len(form.lengths)}
    outputs = {}
    for window in (None, min(256, max(form.lengths) // 2)):
        problem = varlen_problem(torch.device(device), dtype, heads, key_heads, size, window)
        kernels: list[Kernel] = ["sdpa"] if problem else ["sdpa", "varlen"]
        for kernel in kernels:
            run = partial(_attend, form.lengths, (heads, key_heads, size), kernel, window, device)
            outputs[kernel] = run()
            found[f"{kernel}_ms{'_window' if window else ''}"] = 1e3 * _seconds(run, device, form.rounds)
        if problem:
            found["varlen_problem"] = problem
        else:
            gaps = [float((a - b).abs().max()) for a, b in zip(outputs["sdpa"], outputs["varlen"], strict=True)]
            found[f"largest_gap{'_window' if window else ''}"] = max(gaps)
    return found


def _attend(
    lengths: tuple[int, ...], shape: tuple[int, int, int], kernel: Kernel, window: int | None, device: str
) -> list[torch.Tensor]:
    """The output [1, K, heads, head size] and the gradients by query, key and value, float32."""
    generator, (heads, key_heads, size) = torch.Generator().manual_seed(0), shape
    query, key, value = (
        torch.randn(1, n, sum(lengths), size, generator=generator).to(device, torch.bfloat16).requires_grad_()
        for n in (heads, key_heads, key_heads)
    )
    segments = pack([Row((0,) * n, (), 0, False) for n in lengths], share_prompts=False).segments
    out, _ = grace_attention(
        torch.nn.Module(), query, key, value, None, kernel=kernel, packed_segments=segments, sliding_window=window
    )
    gradients = torch.autograd.grad(out.float().square().mean(), (query, key, value))
    return [x.detach().float() for x in (out, *gradients)]


def packing(form: Form, device: str, folder: Path) -> Found:
    """Forward and backward of a line of rows, packed and padded, in the model's shape; how far log-probs are apart."""
    lm = AutoModelForCausalLM.from_config(_config(form), dtype=_dtype(device), attn_implementation="sdpa")
    lm = lm.to(device).eval()
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 250, (n,), generator=generator).tolist() for n in form.lengths]
    padded = partial(_padded, lm, rows, device)
    found: Found = {"tokens": sum(form.lengths), "padded_tokens": len(rows) * max(form.lengths)}
    with torch.no_grad():
        expected = padded()
    found["padded_ms"] = 1e3 * _seconds(lambda: padded().sum().backward(), device, form.rounds)
    lm.set_attn_implementation(ATTENTIONS["auto"])
    policy = PolicyModel(lm)
    packed = pack([Row(tuple(ids[:1]), tuple(ids[1:]), 0, True) for ids in rows], policy.shares_prompts)
    packed = packed.to(torch.device(device))

    def log_probs() -> torch.Tensor:
        scored = policy(packed).log_probs
        assert scored is not None
        return scored

    with torch.no_grad():
        found["mean_gap"] = float((log_probs() - expected).abs().mean())
    found["packed_ms"] = 1e3 * _seconds(lambda: log_probs().sum().backward(), device, form.rounds)
    return found


def _padded(lm: Any, rows: list[list[int]], device: str) -> torch.Tensor:
    """Log-probs of all tokens of the rows but their first, float32, by transformers' own forward."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    logits = lm(input_ids=ids, attention_mask=mask).logits
    parts = []
    for logit, row in zip(logits, rows, strict=True):
        target = torch.tensor(row[1:], device=device)
        parts.append(-F.cross_entropy(logit[: len(row) - 1].float(), target, reduction="none"))
    return torch.cat(parts)


@dataclass(frozen=True)
class Steps:
    """Training steps of one kind."""

    demo: bool = False
    """Of SmolLM2-135M; else of the random model."""
    offload: bool = False
    engine: str = "hf"

    def config(self, form: Form, folder: Path) -> RunConfig:
        """With gradient checkpointing; all weights are read back after each sync.

        Raises:
            Skipped: the demo model is not there.
        """
        model = _demo_model() if self.demo else _random_model(form, folder.parent)
        fsdp = {"param_offload": self.offload, "optimizer_offload": self.offload}
        rollout = {"name": self.engine, "check_weight_sync": "full", "gpu_memory_utilization": 0.3}
        return build_config(str(model), form.step, recompute=True, fsdp=fsdp, rollout=rollout)

    def why_not(self, form: Form, device: str) -> str | None:
        """Why they cannot be run here."""
        if self.demo and form is FORMS["small"]:
            return "the small form has the random model alone"
        if self.engine == "vllm" and find_spec("vllm") is None:
            return "vllm is not installed (pip install -e '.[vllm]')"
        if self.engine == "vllm" and device == "cpu":
            return "on a CPU vllm has no sleep mode"
        return None


STEPS = {
    "random step": Steps(),
    "random step, offload": Steps(offload=True),
    # vLLM sleeps while the policy trains.
    "vllm step": Steps(offload=True, engine="vllm"),
    "SmolLM2 step": Steps(demo=True),
    "SmolLM2 step, offload": Steps(demo=True, offload=True),
}


def _random_model(form: Form, folder: Path) -> Path:
    """The model that the parts share."""
    model = folder / f"random_model_{form.model['hidden_size']}"
    if not (model / "tokenizer.json").is_file():  # it is written last
        AutoModelForCausalLM.from_config(_config(form), dtype=torch.bfloat16).save_pretrained(model)
        tiny_tokenizer().save_pretrained(model)
    return model


def _demo_model() -> Path:
    try:
        get_model()
    except subprocess.CalledProcessError as error:
        raise Skipped(f"{MODEL} is missing and cannot be made (python3 -m verl.get_demo_model)") from error
    return REPO / MODEL


def plan(form: Form, device: str, folder: Path) -> Found:
    """Of each kind of steps, GiB of each phase by the plan of its config, for prompts as long as its longest."""
    gpu_bytes = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else 0
    train_file = prepare_examples(folder / "data")
    found: Found = {}
    for name, steps in STEPS.items():
        if steps.why_not(form, device):
            continue
        try:
            config = steps.config(form, folder)
        except Skipped:  # as the steps themselves are
            continue
        longest = int(prompt_rows(config, train_file).batch["prompt_length"].max())
        data = config.data.model_copy(update={"max_prompt_length": longest})
        config = config.model_copy(update={"data": data})
        stages = make_plan(config, Machines(gpu_bytes, 1), find_work(config)).stages
        found[name] = {phase: sum(stages[stage].values()) / 2**30 for phase, stage in _STAGES.items()}
    return found


# Of the plan, by the phases that are measured.
_STAGES = {"load": "start", "sync": "sync", "gen": "generation", "score": "score", "update": "update"}


def step(form: Form, device: str, folder: Path, steps: Steps) -> Found:
    """Three steps by one worker: seconds and peaks of the last one's phases."""
    if reason := steps.why_not(form, device):
        raise Skipped(reason)
    config = steps.config(form, folder)
    train_file = prepare_examples(folder / "data")
    seconds: dict[str, float] = {}
    peaks: dict[str, float] = {}

    def measure(name: str, work: Callable[[], Any]) -> Any:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        result = work()
        _wait(device)
        seconds[name] = time.perf_counter() - start
        if device == "cuda":
            peaks[name] = torch.cuda.max_memory_allocated() / 2**30
        return result

    with workers_of(config, device) as workers:
        facts = measure("load", workers.init_model)
        prompts = prompt_rows(config, train_file)
        for number in range(3):
            trained, metrics = run_step(workers, prompts, number, measure)
        memory = workers.memory()
    tokens = int((trained.batch["prompt_length"] + trained.batch["response_length"]).sum())
    scored = int(trained.batch["response_length"].sum())
    return {
        "attention": facts["attention"], **asdict(steps), "size": asdict(form.step),
        "update_tokens": tokens, "update_tokens_per_s": tokens / seconds["update"],
        "update_flop": _update_flop(config, tokens, scored), "generated_tokens": prompts_written(form.step),
        "grad_norm": metrics["grad_norm"], "seconds": seconds, "peak_gib": peaks,
        "free_gib": {name: value for name, value in memory.items() if name.startswith("free_gb/")},
    }  # fmt: skip


def prompts_written(size: StepSize) -> int:
    """Tokens that the engine writes in a step: of the trained text's rationales, the query's and the negative's."""
    return size.triplets * (size.n + 2) * size.tokens


def _update_flop(config: RunConfig, tokens: int, scored: int) -> float:
    """FLOP of an update's matrix products: forward and twice as many backward; attention's products are left out.

    Args:
        tokens: in all rows, which go through the layers.
        scored: those of them that go through the LM head.
    """
    path = config.actor_rollout_ref.model.path
    assert path is not None
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    head = lm.get_output_embeddings().weight.numel()
    layers = sum(weight.numel() for weight in lm.base_model.parameters()) - lm.get_input_embeddings().weight.numel()
    return 6.0 * (layers * tokens + head * scored)


def _config(form: Form) -> Qwen2Config:
    tokenizer = tiny_tokenizer()
    return Qwen2Config(
        **form.model, max_position_embeddings=4096, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip


def _dtype(device: str) -> torch.dtype:
    """What the trainer computes in."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def _seconds(work: Callable[[], Any], device: str, rounds: int) -> float:
    """The shortest of some rounds, after one that is not counted."""
    work()
    spent = []
    for _ in range(rounds):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        spent.append(time.perf_counter() - start)
    return min(spent)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


PARTS: dict[str, Callable[[Form, str, Path], Found]] = {
    "rate": rate,
    "attention": attention,
    "packed against padded": packing,
    **{name: partial(step, steps=steps) for name, steps in STEPS.items()},
    "plan": plan,
    "tests": tests,
}
"""In the order in which they run; the first ones say most."""

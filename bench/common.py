"""Shared by the benchmarks: the description of the machine, results as JSON and markdown, and one training run."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from verl.utils.cpus import usable_cpus, waiting_environment
from verl.utils.versions import installed_versions

REPO = Path(__file__).parent.parent
MODEL = "models/SmolLM2-135M-Instruct"


def machine() -> dict[str, Any]:
    """The machine and the versions that figures were measured on."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": usable_cpus(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "versions": installed_versions(),
    }


def installed_engines() -> list[str]:
    """The rollout engines that can be measured here."""
    return ["hf", *(["vllm"] if find_spec("vllm") else [])]


# What a work beside others is compared with: itself, without them.
ALONE = "it alone"


@dataclass(frozen=True)
class Comparison:
    """One line of the first table of docs/performance.md: seconds of a piece of work, here and elsewhere."""

    what: str
    ours: float
    other: str = ""
    """Who else does the work, in how many seconds."""
    theirs: float | None = None
    floor: float | None = None
    """The least seconds possible."""
    bar: float | None = None
    """What `ours` may be at most: a share of `theirs` if there are any, otherwise of `floor`, otherwise seconds."""

    @property
    def ratio(self) -> float:
        """What the bar limits."""
        return self.ours / (self.theirs or self.floor or 1)

    @property
    def verdict(self) -> str:
        if self.bar is None:
            return "-"
        of = self.other if self.theirs else "the floor" if self.floor else "s"
        limit = f"{self.bar:.3g} s" if of == "s" else f"{self.bar:.3g} of {of}"
        return f"at most {limit}: {'met' if self.ratio <= self.bar else f'**missed** ({self.ratio:.3g})'}"


def write_json(path: Path | None, results: dict[str, Any], comparisons: Iterable[Comparison] = ()) -> None:
    """Write a benchmark's numbers, if `path` is given, and print which bars are met."""
    comparisons = list(comparisons)
    for found in comparisons:
        if found.bar is not None:
            print(f"\nBar of {found.what}: {found.verdict}.")
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = {"machine": machine(), "comparisons": [asdict(found) for found in comparisons], **results}
        path.write_text(json.dumps(whole, indent=1) + "\n")


def markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in GitHub's markdown."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def seconds(work: Any) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The median, and the smallest and largest value in brackets."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def get_model() -> None:
    """Download the demo model, unless that is done already."""
    subprocess.run([sys.executable, "-m", "verl.get_demo_model"], check=True, cwd=REPO, stdout=subprocess.DEVNULL)


def prepare_data(folder: Path) -> Path:
    """The demo model, and the example triplets as parquet; returns the training file."""
    get_model()
    return prepare_examples(folder)


def prepare_examples(folder: Path) -> Path:
    """The example triplets as parquet; returns the training file."""
    prepare = ["process_data.py", "--mode", "supervised", "--input_file", "examples/triplets.jsonl"]
    subprocess.run(
        [sys.executable, *prepare, "--local_dir", str(folder)], check=True, cwd=REPO, stdout=subprocess.DEVNULL
    )
    return folder / "train.parquet"


def example_texts(count: int) -> list[str]:
    """`count` different short texts: the example sentences, and beyond them what the example triplets are made of.

    Raises:
        SystemExit: the examples have fewer.
    """
    examples = REPO / "examples"
    triplets = map(json.loads, (examples / "triplets.jsonl").read_text().splitlines())
    roles = ("query", "positive", "negative")
    texts = (examples / "sentences.txt").read_text().splitlines()
    texts = list(dict.fromkeys([*texts, *(triplet[role] for triplet in triplets for role in roles)]))
    if count > len(texts):
        raise SystemExit(f"{count} texts: examples/ has {len(texts)} different ones; ask for so many at most")
    return texts[:count]


def train(
    train_file: Path, out: Path, shape: tuple[int, int, int], steps: int, *overrides: str, warm_up: int = 1
) -> list[dict]:
    """Train the demo model on a CPU for `warm_up` + `steps` steps; the metrics of the last `steps`, with `wall_s`.

    Without diagnoses, which only some steps make; docs/diagnostics.md says what they cost.

    Args:
        shape: triplets per step, rationales per triplet, and the number of new tokens that every row gets.
        warm_up: steps that are not counted: in the first two the kernel clears memory pages for the graph and the
            optimizer's state, which later steps reuse.
    """
    triplets, n, tokens = shape
    settings = [
        f"data.train_batch_size={triplets}", f"actor_rollout_ref.actor.ppo_mini_batch_size={triplets}",
        f"actor_rollout_ref.rollout.n={n}", "data.max_prompt_length=160", f"data.max_response_length={tokens}",
        "actor_rollout_ref.rollout.ignore_eos=True", "data.shuffle=False", f"data.train_files={train_file}",
        f"actor_rollout_ref.model.path={MODEL}", "actor_rollout_ref.model.enable_gradient_checkpointing=False",
        f"trainer.default_local_dir={out}", "trainer.save_freq=0", "trainer.device=cpu",
        "trainer.diag_freq=-1",
        "+reward_model.reward_kwargs.enable_length_penalty=False", f"trainer.total_training_steps={steps + warm_up}",
    ]  # fmt: skip
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *settings, *overrides]
    subprocess.run(command, check=True, cwd=REPO, stdout=subprocess.DEVNULL)
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    # A step writes its samples last, so the time between the samples of two steps is the time of a whole step.
    ends = [(out / f"samples/step_{record['step']}.jsonl").stat().st_mtime for record in metrics]
    spent = zip(metrics[1:], ends[:-1], ends[1:], strict=True)
    return [{**record, "wall_s": end - previous} for record, previous, end in spent][warm_up - 1 :]


class EncoderProcess:
    """A process that encodes the same texts with rationales whenever it is asked, so that several can take turns.

    Args:
        texts: how many of the `example_texts`.
        new_tokens: tokens of every rationale.
        checkout: whose `verl` it imports.
        waiting: environment variables that decide how its threads wait; None = those that this project's programs set.
    """

    def __init__(
        self, texts: int, new_tokens: int, engine: str = "hf", checkout: Path = REPO,
        waiting: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        command = [sys.executable, "-c", _ENCODE, engine, str(new_tokens), json.dumps(example_texts(texts))]
        here = {**os.environ, "PYTHONPATH": str(checkout), **(waiting or waiting_environment())}
        self._process = subprocess.Popen(
            command, cwd=REPO, env=here, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.seconds(0)  # starts the engine

    def seconds(self, seed: int) -> float:
        """Seconds of encoding all texts once."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{seed}\n")
        for line in self._process.stdout:
            if line.startswith("seconds "):
                return float(line.split()[1])
        raise SystemExit(f"an encoding process ended with exit code {self._process.wait()}")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


_ENCODE = f"""
import json, sys, time
engine, new_tokens, texts = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
from verl import GraceEncoder
encoder = GraceEncoder(
    {MODEL!r}, device="cpu", engine=engine, max_prompt_length=160, max_new_tokens=new_tokens, ignore_eos=True
)
for line in sys.stdin:
    start = time.perf_counter()
    encoder.encode(texts, seed=int(line), show_progress_bar=False)
    print("seconds", time.perf_counter() - start, flush=True)
"""

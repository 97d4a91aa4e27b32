"""What a person sees of a run: a bar for the steps, a bar for the rationales, one line per step."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

_PHASES = ("gen", "score", "ref", "reward", "update", "sync")


class RunDisplay:
    """Plain lines, with bars on a terminal.

    Args:
        show_steps: a line for every step.
        show_bars: False = never; they would overwrite a debugger's prompt.
    """

    def __init__(self, total_steps: int, first_step: int, show_steps: bool, show_bars: bool) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.total_steps = total_steps
        self.show_steps = show_steps
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), console=self.console, disable=not (show_bars and self.console.is_terminal),
        )  # fmt: skip
        self._run = self._progress.add_task("training", total=total_steps, completed=first_step)
        self._rationales = self._progress.add_task("rationales", total=None, visible=False)

    def start(self) -> None:
        self._progress.start()

    def stop(self) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def table(self, title: str, lines: list[tuple[str, str]]) -> None:
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
        for what, value in lines:
            table.add_row(what, Text(value))  # as it is: a prompt may hold brackets
        self.console.print(table)

    @contextmanager
    def generating(self, count: int) -> Iterator[Callable[[int], None]]:
        """A bar for `count` rationales; yields what advances it."""
        self._progress.reset(self._rationales, total=count, visible=True)
        yield lambda finished: self._progress.advance(self._rationales, finished)
        self._progress.update(self._rationales, visible=False)

    def step_done(self, step: int, metrics: dict[str, float]) -> None:
        self._progress.update(self._run, completed=step)
        if self.show_steps:
            self.say(step_line(step, self.total_steps, metrics))


def model_lines(path: str, facts: Mapping[str, Any]) -> Iterator[str]:
    """What the workers loaded.

    Args:
        facts: of `ActorRolloutRefWorker.init_model`.
    """
    reference = "not needed (no KL term has weight)"
    if facts["reference"]:
        reference = "this one without its adapter" if facts["adapter"] else "loaded"
    yield (
        f"{path}: {facts['parameters'] / 1e6:.1f}M parameters, {facts['device']}, {facts['attention']}, "
        f"reference model {reference}"
    )
    if facts["why_whole"]:
        yield f"every worker loaded the whole model into host memory before it was sharded: {facts['why_whole']}"
    if facts["adapter"]:
        yield facts["adapter"]
    if facts["dropout"]:
        dropout = ", ".join(f"{name}={value:g}" for name, value in facts["dropout"].items())
        yield f"trained without the dropout of the model's config ({dropout})"


def step_line(step: int, total: int, m: dict[str, float]) -> str:
    """One step in one line: what is learned first, the loss last (near 0 is normal on policy)."""
    if "reward/mean" not in m:
        return (
            f"step {step}/{total}  without rationales{_contrast(m)}{_kl(m)}  grad {m['actor/grad_norm']:.2f}"
            f"  {_times(m)}"
        )
    parts = [
        f"{name.split('/')[1]} {value:+.2f}"
        for name, value in m.items()
        if name.startswith("reward/") and name.endswith("/weighted")
    ]
    return (
        f"step {step}/{total}  reward {m['reward/mean']:+.3f}"
        + (f" ({', '.join(parts)})" if parts else "")
        + _contrast(m)
        + _kl(m)
        + (f"  group std {m['group/std_median']:.3f}" if "group/std_median" in m else "")
        + f"  grad {m['actor/grad_norm']:.2f}"
        + f"  tokens {m['rationale/trained_tokens_mean']:.0f}"
        + f" ({m['rationale/trained_truncated']:.0%} cut)  {m['perf/tokens_per_s']:.0f} tok/s"
        + f"  {_times(m)}"
        + (f"  loss {m['actor/pg_loss']:+.4f}{nothing_learned(m)}" if "actor/pg_loss" in m else "")
    )


def _contrast(m: dict[str, float]) -> str:
    """The contrastive loss, where the reward manager has one."""
    if "reward/contrastive/loss" not in m:
        return ""
    return f"  contrastive {m['reward/contrastive/loss']:.3f} ({m['reward/contrastive/accuracy']:.0%} found)"


def _kl(m: dict[str, float]) -> str:
    """The KL term of the loss without its weight, where there is one."""
    return f"  KL {m['actor/kl_loss']:.2g}" if "actor/kl_loss" in m else ""


def _times(m: dict[str, float]) -> str:
    phases = [f"{phase} {m[f'time/{phase}_s']:.1f}" for phase in _PHASES if m.get(f"time/{phase}_s", 0) >= 0.05]
    return f"{m['time/step_s']:.1f} s: {', '.join(phases)}"


def nothing_learned(m: dict[str, float]) -> str:
    """Why the gradient of a step that trains the policy was exactly 0, where it was; else nothing."""
    if m["actor/grad_norm"] != 0:
        return ""
    if m["rationale/trained_truncated"] == 1:
        why = "every rationale was cut at data.max_response_length, and the rewards of each group are equal"
    elif m["group/duplicate_share"] == 1:
        why = "the rationales of each group are equal"
    else:
        why = "the rewards of each group are equal"
    return f"  NOTHING LEARNED: the gradient is 0; {why}"

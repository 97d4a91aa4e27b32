"""Alerts: one plain sentence when the figures of a run say that training goes wrong, and what to do.

They follow from the lines of metrics.jsonl alone, so that a resumed run goes on with them. Each is said once when it
begins. docs/diagnostics.md says where the limits come from.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from statistics import mean, variance
from typing import Any

# Collapse: effective rank below this share of the first diagnosis'.
_RANK_LEFT = 0.5
# Rationale not used: a cosine above this; or a gain of the own rationale that is below this by two standard errors.
_SAME_VECTOR, _LEAST_GAIN = 0.98, 0.01
# Gibberish: the log-likelihood fell by this many nats per token, and to this multiple.
_LEAST_NATS, _MULTIPLE = 1.0, 1.5
# No signal and length drift: steps that are averaged.
_SHORT, _FEWEST = 10, 3
_MOST_FLAT = 0.5
_LONGER = 2.0
# Hacking: steps of the window, and the fewest rewards in it.
_WINDOW, _LEAST_WINDOW = 100, 20
_LEAST_FALL = 0.05
# Noise threshold: 0.6 / sqrt(number of probe queries), about two standard errors of the mean MRR.
_PROBE_NOISE = 0.6
# An alert whose condition has not held for this many measurements may begin again.
_OVER_AFTER = 10

_HELD_OUT = ("val/triplet_accuracy", "val/sts_spearman", "diag/mrr_thinking")


@dataclass(frozen=True)
class Alert:
    name: str
    text: str
    """One sentence: what was seen, and what to do."""


class AlertError(RuntimeError):
    """The run ends because an alert began and trainer.stop_on_alert is set."""


class History:
    """The figures that rules look at, by name: their steps and values in order."""

    def __init__(self) -> None:
        self._series: dict[str, list[tuple[int, float]]] = {name: [] for rule in RULES for name in rule.figures}

    def add(self, line: Mapping[str, Any]) -> set[str]:
        """Take over a line of metrics.jsonl; return the names of the figures that it had."""
        found = {
            name for name in self._series.keys() & line.keys() if line[name] is not None and math.isfinite(line[name])
        }
        for name in found:
            self._series[name].append((line["step"], float(line[name])))
        return found

    def series(self, name: str) -> list[tuple[int, float]]:
        return self._series[name]

    def values(self, name: str) -> list[float]:
        return [value for _, value in self._series[name]]

    def last(self, name: str) -> float | None:
        series = self._series[name]
        return series[-1][1] if series else None


@dataclass(frozen=True)
class Rule:
    name: str
    measured_by: tuple[str, ...]
    """A line with one of these is a new measurement."""
    check: Callable[[History], str | None]
    """The alert's sentence, if its condition holds."""
    also: tuple[str, ...] = ()
    """Other figures that it looks at."""

    @property
    def figures(self) -> tuple[str, ...]:
        return self.measured_by + self.also


@dataclass
class AlertWatch:
    """Watches the lines of a run; with the same lines it says the same alerts."""

    history: History = field(default_factory=History)
    _quiet: dict[str, int] = field(default_factory=dict)
    """Measurements since the condition of an alert last held."""
    _begun: list[Alert] = field(default_factory=list)

    def replay(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Take over what was logged before, of which a line with alerts says all that have begun until then."""
        for line in lines:
            self.add(line)
            if "alerts" in line:
                self._begun.clear()

    def add(self, line: Mapping[str, Any]) -> None:
        """Take over a line of metrics.jsonl."""
        found = self.history.add(line)
        for rule in RULES:
            if found.isdisjoint(rule.measured_by):
                continue
            quiet = self._quiet.get(rule.name, _OVER_AFTER)
            if (text := rule.check(self.history)) is None:
                self._quiet[rule.name] = quiet + 1
                continue
            if quiet >= _OVER_AFTER:
                self._begun.append(Alert(rule.name, text))
            self._quiet[rule.name] = 0

    def take(self) -> list[Alert]:
        """The alerts that began since the last call."""
        begun, self._begun = self._begun, []
        return begun


def collapse(history: History) -> str | None:
    """The vectors of the probe use less than half of the dimensions that they used in the first diagnosis."""
    ranks = history.values("diag/effective_rank")
    first, now = ranks[0], ranks[-1]
    if now >= _RANK_LEFT * first:
        return None
    return (
        f"embeddings collapse: the effective rank of the probe's vectors is {now:.1f}, and was {first:.1f} in the "
        "first diagnosis; go back to an earlier checkpoint and lower actor_rollout_ref.actor.optim.lr or "
        "reward_model.reward_kwargs.clustering_weight."
    )


def not_used(history: History) -> str | None:
    """Rationales hardly change the vectors, or another text's rationale does as well as its own."""
    cosine = history.last("diag/cos_without")
    if cosine is not None and cosine > _SAME_VECTOR:
        return (
            f"rationales are not used: with and without them the probe's vectors have a cosine of {cosine:.3f}; lower "
            "reward_model.reward_kwargs.text_share or raise data.max_response_length, or embed without rationales, "
            "which costs nothing."
        )
    gain, error = history.last("diag/own_rationale_gain"), history.last("diag/own_rationale_gain_error")
    if gain is None or error is None or gain + 2 * error >= _LEAST_GAIN:
        return None
    other, second = history.last("diag/cos_other_rationale"), history.last("diag/cos_second_rationale")
    # The negatives' and the other groups' terms of grace are equal for all rationales of a text.
    way_out = (
        "reward_model.reward_kwargs.objective=infonce pays for what tells a text from others, which grace does not"
        if history.last("reward/positive/raw") is not None
        else "or embed without rationales, which costs nothing"
    )
    return (
        "rationales are not used: that of another text leaves a vector as near to its own (cosine "
        f"{other:.3f}) as a second one of the same text does ({second:.3f}); read diagnostics/step_N.jsonl, whether "
        f"they say anything about their texts; {way_out}."
    )


def gibberish(history: History) -> str | None:
    """The untrained model finds the rationales far less likely than it found those of the first diagnosis."""
    values = history.values("diag/log_likelihood")
    first, now = values[0], values[-1]
    if now > min(first - _LEAST_NATS, _MULTIPLE * first):
        return None
    return (
        f"rationales turn to gibberish: the untrained model gives them a log-likelihood of {now:.2f} per token, and "
        f"{first:.2f} in the first diagnosis; read diagnostics/step_N.jsonl, and add a KL term "
        "(actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_coef=0.1) or lower "
        "actor_rollout_ref.actor.optim.lr."
    )


def no_signal(history: History) -> str | None:
    """In most groups of the last steps with a policy gradient all rewards are equal."""
    # Rewards teach in the steps that follow a policy gradient alone.
    follow = {step for step, _ in history.series("actor/pg_loss")[-_SHORT:]}
    flat = [share for step, share in history.series("group/flat_share")[-_SHORT:] if step in follow]
    if len(flat) < _FEWEST or mean(flat) <= _MOST_FLAT:
        return None
    cut = history.last("rationale/trained_truncated") or 0.0
    return (
        f"no signal: in {mean(flat):.0%} of the groups of the last {len(flat)} steps all rewards are equal, so that "
        f"they teach nothing ({cut:.0%} of the rationales are cut); raise actor_rollout_ref.rollout.temperature, "
        "or data.max_response_length where rationales are cut."
    )


def length_drift(history: History) -> str | None:
    """The rationales of the last steps are more than twice as long as those of the first ones, or less than half."""
    tokens = history.values("rationale/trained_tokens_mean")
    if len(tokens) < 2 * _SHORT:
        return None
    first, now = mean(tokens[:_SHORT]), mean(tokens[-_SHORT:])
    if first / _LONGER <= now <= _LONGER * first:
        return None
    correlation = history.last("group/length_reward_correlation") or 0.0
    cut = history.last("rationale/trained_truncated") or 0.0
    return (
        f"length drift: rationales have {now:.0f} tokens in the last {_SHORT} steps and had {first:.0f} in the first "
        f"{_SHORT} (correlation of length and reward {correlation:+.2f}, {cut:.0%} cut); read samples/step_N.jsonl, "
        "whether the longer or shorter ones are better, and see reward_model.reward_kwargs.enable_length_penalty."
    )


def hacking(history: History) -> str | None:
    """The reward rose over the last steps while a figure of held-out texts, the first one that there is, fell."""
    name = next((name for name in _HELD_OUT if len(history.series(name)) > 1), None)
    if name is None:
        return None
    held_out = history.series(name)
    last_step, now = held_out[-1]

    def rewards_since(begin: int) -> list[float]:
        return [value for step, value in history.series("reward/mean") if begin < step <= last_step]

    # Not every step has a reward: those without rationales have none.
    before_step, before = next(
        (
            found for found in reversed(held_out)
            if found[0] <= last_step - _WINDOW and len(rewards_since(found[0])) >= _LEAST_WINDOW
        ),
        held_out[0],
    )  # fmt: skip
    rewards = rewards_since(before_step)
    least = _LEAST_FALL
    if name.startswith("diag/"):
        least = max(least, _PROBE_NOISE / math.sqrt(history.last("diag/samples") or 1.0))
    if len(rewards) < _LEAST_WINDOW or before - now < least or not _has_risen(rewards):
        return None
    return (
        f"reward hacking: from step {before_step} to {last_step} the reward rose, and {name} of held-out texts fell "
        f"from {before:.3f} to {now:.3f}; go on from a checkpoint before that (trainer.save_best keeps the best), and "
        "look in samples/step_N.jsonl for what the reward pays for."
    )


def _has_risen(values: list[float]) -> bool:
    """Whether the last third lies above the first by two standard errors of the difference of their means."""
    third = len(values) // 3
    first, last = values[:third], values[-third:]
    error = math.sqrt((variance(first) + variance(last)) / third)
    return mean(last) - mean(first) > 2 * error


RULES = (
    Rule("collapse", ("diag/effective_rank",), collapse),
    Rule("not_used", ("diag/cos_without",), not_used, (
        "diag/own_rationale_gain", "diag/own_rationale_gain_error", "diag/cos_other_rationale",
        "diag/cos_second_rationale", "reward/positive/raw",
    )),
    Rule("gibberish", ("diag/log_likelihood",), gibberish),
    Rule("no_signal", ("group/flat_share",), no_signal, ("actor/pg_loss", "rationale/trained_truncated")),
    Rule("length_drift", ("rationale/trained_tokens_mean",), length_drift,
         ("group/length_reward_correlation", "rationale/trained_truncated")),
    Rule("hacking", _HELD_OUT, hacking, ("reward/mean", "diag/samples")),
)  # fmt: skip

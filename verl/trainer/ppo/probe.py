"""The probe: texts that a run embeds again and again while it trains, so that what training does to them is seen.

Chosen once by seed and kept in the run folder, `diagnostics/probe.json`.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from verl.batch_plan import BatchPlan
from verl.config import RunConfig
from verl.data.collator import PromptCollator, Sample, without_repeats
from verl.data.dataset import PromptDataset
from verl.embedding.chat_template import last_user_turn
from verl.errors import UserError
from verl.protocol import DataProto
from verl.text_roles import TRIPLET_ROLES
from verl.utils.files import replace_file
from verl.utils.run_files import PROBE

# With trainer.diag_texts=null: share of the run's rationales that probe texts may write, and limits of the probe.
_SHARE_OF_RATIONALES = 0.03
_LEAST_SAMPLES, _MOST_TEXTS = 3, 512
RATIONALES_PER_TEXT = 2


@dataclass(frozen=True)
class ProbeText:
    id: int
    """0, 1, 2 ... in the order of the probe."""
    sample: int
    """Number of its sample in the file. The texts of a sample stand together: positive, query, negative."""
    role: str
    text: str


@dataclass(frozen=True)
class Probe:
    seed: int
    source: str
    """The setting that names the file, and the file."""
    texts: tuple[ProbeText, ...]

    @property
    def roles(self) -> list[str]:
        return [text.role for text in self.texts]

    @property
    def texts_per_sample(self) -> int:
        return len(set(self.roles))

    def other_texts(self) -> list[int]:
        """For every text the position of the one whose rationale it borrows: the same role in the next sample."""
        count = len(self.texts)
        return [(i + self.texts_per_sample) % count for i in range(count)]

    def prompts(self, collate: PromptCollator) -> DataProto:
        """A prompt row for every text, as an encoder would ask for its rationale."""
        roles = TRIPLET_ROLES if "negative" in self.roles else {}
        # Uids are the texts', so that rows of one text, whose prompt is computed once, go to one worker.
        return collate([collate.build_sample(text.id, {text.role: text.text}, "probe", roles) for text in self.texts])

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / PROBE, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Probe | None":
        """The probe of a run; None if it has none.

        Raises:
            UserError: the file is damaged.
        """
        file = folder / PROBE
        if not file.is_file():
            return None
        try:
            found = json.loads(file.read_text())
            return cls(found["seed"], found["source"], tuple(ProbeText(**text) for text in found["texts"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file} is damaged ({error!r}); remove {folder}, and the run goes on with a new probe."
            ) from error


def choose_probe(dataset: PromptDataset, source: str, num_texts: int, seed: int) -> Probe:
    """Draw whole samples of a file until they have `num_texts` texts; what repeats a drawn text is passed over.

    Raises:
        UserError: the file does not have two samples of different texts.
    """
    texts: list[ProbeText] = []
    seen: set[str] = set()
    for index in np.random.default_rng(seed).permutation(len(dataset)).tolist():
        found = dict(_texts_of(dataset[index]))
        if len(texts) + len(found) > max(num_texts, 2 * len(found)):
            break
        if not seen & set(found.values()):
            texts += [ProbeText(len(texts) + i, index, *pair) for i, pair in enumerate(found.items())]
            seen |= set(found.values())
    if len({text.sample for text in texts}) < 2:
        raise UserError(
            f"the diagnoses need two samples of different texts, and {source} does not have them; turn them off with "
            "trainer.diag_freq=-1."
        )
    return Probe(seed, source, tuple(texts))


def _texts_of(sample: Sample) -> Iterator[tuple[str, str]]:
    for role, chat in without_repeats(sample)["chats"].items():
        yield role, chat[last_user_turn(chat)]["content"].strip()


def diagnosed_steps(config: RunConfig, plan: BatchPlan) -> list[int]:
    """The steps of a run that are diagnosed, from 0."""
    frequency, total = config.trainer.diag_freq, plan.total_steps
    return sorted({*range(0, total, frequency), total}) if frequency > 0 else []


def wanted_texts(config: RunConfig, plan: BatchPlan, texts_per_sample: int) -> int:
    """trainer.diag_texts, or the number that its null stands for."""
    if config.trainer.diag_texts is not None:
        return config.trainer.diag_texts
    rationales = plan.rows_per_step * plan.schedule.steps_with_rationales(plan.total_steps)
    written_per_text = RATIONALES_PER_TEXT * len(diagnosed_steps(config, plan))
    affordable = int(_SHARE_OF_RATIONALES * rationales / written_per_text)
    return min(max(affordable, _LEAST_SAMPLES * texts_per_sample), _MOST_TEXTS)

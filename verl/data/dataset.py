"""The training data: rows of a parquet file of process_data.py become the prompt rows of a step.

Which samples make up a step follows from the seed and the step number alone. So a resumed run sees the same samples
without any saved loader state, on any number of workers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader, Dataset

from verl.config import DataConfig
from verl.embedding.chat_template import Message, system_prompt_of, with_system_prompt
from verl.embedding.prompts import PromptRenderer, rationale_messages
from verl.embedding.settings import EmbedderSettings
from verl.errors import UserError, WorkerError
from verl.protocol import DataProto, left_padded
from verl.utils.files import sha256_of_all

Sample = dict[str, Any]


class PromptDataset(Dataset):
    """Samples with their texts as chats, by role.

    Args:
        files: parquet files.
        roles: which texts a sample gives: `positive` alone, or anchors too.
        renderer: measures prompts for data.filter_overlong_prompts.

    Raises:
        UserError: a file is not parquet, lacks a column, or no sample is left.
    """

    def __init__(
        self, files: Sequence[str], config: DataConfig, roles: Sequence[str], renderer: PromptRenderer
    ) -> None:
        self.config = config
        self.roles = roles
        self.supervised = (config.train_mode or "supervised") == "supervised"
        self.table = pa.concat_tables([self._read(name) for name in files], promote_options="permissive")
        self.sha256 = sha256_of_all(map(Path, files))
        """Hex, over the training files."""
        self.num_dropped = 0
        if config.filter_overlong_prompts:
            self._drop_overlong(renderer)
        if not len(self):
            raise UserError(f"{', '.join(files)}: no samples to train on.")

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def num_system_prompts(self) -> int:
        """How many different system texts the rows have, or 1 where data.system_prompt replaces them."""
        if self.config.system_prompt is not None:
            return 1
        turns = pc.list_flatten(self.table[self.config.prompt_key])
        is_system = pc.equal(pc.struct_field(turns, "role"), "system")
        return len(pc.unique(pc.struct_field(turns, "content").filter(is_system)))

    def __getitem__(self, index: int) -> Sample:
        row = self.table.slice(index, 1).to_pylist()[0]
        return {**row, "uid": index, "chats": self._chats(row)}

    def _read(self, name: str) -> pa.Table:
        try:
            available = pq.read_schema(name).names
        except pa.ArrowInvalid as error:
            raise UserError(f"{name} is not a parquet file: {error}") from None
        wanted = [self.config.prompt_key, self.config.reward_fn_key, "reward_model", "extra_info"]
        if self.supervised and "query" in self.roles:
            wanted.append("multi_input")
        missing = [column for column in wanted if column not in available]
        if missing:
            hint = "; for plain texts set +data.train_mode=unsupervised" if missing == ["multi_input"] else ""
            raise UserError(
                f"{name} lacks the column {', '.join(missing)} (it has {', '.join(available)}); "
                f"make it with process_data.py{hint}."
            )
        return pq.read_table(name, columns=wanted)

    def _chats(self, row: Sample) -> dict[str, list[Message]]:
        """The chat of each role; anchors get the system turn of the sample's own prompt."""
        prompt: list[Message] = row[self.config.prompt_key]
        if self.config.system_prompt is not None:
            prompt = with_system_prompt(prompt, self.config.system_prompt or None)
        if self.roles == ("positive",):
            return {"positive": prompt}
        if not self.supervised:
            return {role: prompt for role in self.roles}
        system = system_prompt_of(prompt)
        texts = {"query": row["multi_input"]["query"], "negative": row["multi_input"]["negative_document"]}
        anchors = {role: rationale_messages(texts[role], system) for role in self.roles if role in texts}
        return {"positive": prompt, **anchors}

    def _drop_overlong(self, renderer: PromptRenderer) -> None:
        keep = []
        for start in range(0, len(self), 1000):
            samples = [self[i] for i in range(start, min(start + 1000, len(self)))]
            chats = [chat for sample in samples for chat in sample["chats"].values()]
            lengths = iter(renderer.lengths(chats))
            keep += [max([next(lengths) for _ in s["chats"]]) <= self.config.max_prompt_length for s in samples]
        self.num_dropped = keep.count(False)
        self.table = self.table.filter(pa.array(keep))


class StepBatches:
    """The dataset positions of every remaining step: a new shuffled pass for each epoch."""

    def __init__(self, num_samples: int, batch_size: int, first_step: int, num_steps: int, seed: int | None) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.steps = range(first_step, num_steps)
        self.seed = seed
        self.steps_per_epoch = num_samples // batch_size

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, list(range(self.num_samples))
        for step in self.steps:
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                if self.seed is not None:
                    generator = torch.Generator().manual_seed(self.seed + epoch)
                    order = torch.randperm(self.num_samples, generator=generator).tolist()
            start = (step % self.steps_per_epoch) * self.batch_size
            yield order[start : start + self.batch_size]

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class PromptCollator:
    """Renders samples to prompt rows: a row per sample and role, samples in order, the trained row first.

    Args:
        settings: where pooling starts in a row; the same settings are written for the encoder.
        reward_fn_key: the column that `data_source` is taken from.
    """

    renderer: PromptRenderer
    settings: EmbedderSettings
    reward_fn_key: str

    def __call__(self, samples: Sequence[Sample]) -> DataProto:
        """See verl/protocol.py for the columns."""
        owners = [(sample, role) for sample in samples for role in sample["chats"]]
        prompts = self.renderer.render([sample["chats"][role] for sample, role in owners])
        tensors = {
            "prompts": left_padded([prompt.ids for prompt in prompts], self.renderer.tokenizer.pad_token_id),
            "prompt_length": torch.tensor([len(prompt.ids) for prompt in prompts]),
            "pool_start": torch.tensor([self.settings.pool_start(prompt, response_length=0) for prompt in prompts]),
        }
        columns = {
            "uid": [sample["uid"] for sample, _ in owners],
            "role": [role for _, role in owners],
            "text": [prompt.text for prompt in prompts],
            "data_source": [sample[self.reward_fn_key] for sample, _ in owners],
            "reward_model": [sample["reward_model"] for sample, _ in owners],
            "extra_info": [sample["extra_info"] for sample, _ in owners],
        }
        return DataProto.from_dict(tensors, columns, {"num_shortened": sum(p.shortened for p in prompts)})


def prompt_batches(
    dataset: PromptDataset, batches: StepBatches, collate: PromptCollator, num_workers: int, timeout_s: int
) -> Iterator[DataProto]:
    """The prompt rows of each step.

    Args:
        num_workers: processes that prepare them; 0 = none but this one.
        timeout_s: longest time without a batch from them; 0 = no limit.

    Raises:
        WorkerError: one of the processes died, or none gave a batch in time.
    """
    loader = DataLoader(
        dataset, batch_sampler=batches, num_workers=num_workers, collate_fn=collate,
        timeout=timeout_s if num_workers else 0,
        # A fork of this process would wait for ever for locks of threads that it does not have, as tokenizers' are.
        multiprocessing_context="spawn" if num_workers else None,
    )  # fmt: skip
    try:
        yield from loader
    except RuntimeError as error:
        if not num_workers:
            raise
        raise WorkerError(
            f"the processes of data.dataloader_num_workers={num_workers} gave no batch ({error}). With 0 the driver "
            "prepares the batches itself, which takes milliseconds a step."
        ) from error

"""Plain contrastive fine-tuning by sentence-transformers, as a careful user of it would do it.

MultipleNegativesRankingLoss with hard negatives, bare texts, mean pooling, float32, no text twice in a batch, gradients
clipped at 1. The rate is constant from the first step, as in the rows that it is compared with: a run here has a few
dozen steps, which a warm-up would mostly use up, and a rate that does not fall gives a model at every budget. Rate and
batch size are chosen on dev.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import BatchSamplers
from sentence_transformers.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import PrinterCallback, TrainerCallback

from comparison.states import States
from comparison.training import Cost

_EPOCHS = 1000
# Most tokens of a training text; the prompts of train.sh may have as many.
_TRAINED_LENGTH = 160
_TEXTS_AT_ONCE = 64
# By default sentence-transformers puts a text into the model's chat template, with its own system prompt.
_BARE_TEXT: Any = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}


@dataclass(frozen=True)
class Setting:
    lr: float
    batch: int

    @property
    def name(self) -> str:
        return f"lr {self.lr:g} batch {self.batch}"


class _Budgets(TrainerCallback):
    """Ends a training after so many seconds of steps, and saves the model when each of several budgets is spent."""

    def __init__(self, model: SentenceTransformer, budgets: dict[Path, float], batch: int) -> None:
        self.model, self.batch = model, batch
        self.left = sorted(budgets.items(), key=lambda item: item[1])
        self.costs: dict[Path, Cost] = {}
        self.seconds: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.last = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # From the end of a step to that of the next, so that making the batch counts.
        self.seconds.append(time.perf_counter() - self.last)
        spent, steps = sum(self.seconds), len(self.seconds)
        while self.left and spent + self.seconds[-1] / 2 >= self.left[0][1]:
            folder, _budget = self.left.pop(0)
            self.model.save(str(folder), create_model_card=False)
            median = sorted(self.seconds)[steps // 2]
            self.costs[folder] = Cost(spent, steps, steps * self.batch, 0, median)
        control.should_training_stop = not self.left
        self.last = time.perf_counter()


def load(folder: Path, max_length: int) -> SentenceTransformer:
    """The model of a folder in float32 on the CPU, with mean pooling of at most `max_length` tokens of bare texts."""
    transformer = Transformer(
        str(folder), max_seq_length=max_length, model_kwargs={"dtype": torch.float32},
        modality_config=_BARE_TEXT, module_output_name="token_embeddings",
    )  # fmt: skip
    pooling = Pooling(transformer.get_embedding_dimension(), "mean")
    return SentenceTransformer(modules=[transformer, pooling], device="cpu")


def train(
    base: Path, triplets: Sequence[tuple[str, str, str]], setting: Setting, budgets: dict[Path, float], seed: int,
    scratch: Path,
) -> dict[Path, Cost]:  # fmt: skip
    """Train one model, and save it whenever a budget is spent.

    Args:
        budgets: seconds of steps by the folder that the model is saved in then.
        scratch: a folder for the trainer.

    Returns:
        What each of the saved models has been trained with.
    """
    model = load(base, _TRAINED_LENGTH)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(scratch), per_device_train_batch_size=setting.batch, learning_rate=setting.lr,
        num_train_epochs=_EPOCHS, lr_scheduler_type="constant", seed=seed,
        batch_sampler=BatchSamplers.NO_DUPLICATES, max_grad_norm=1.0, use_cpu=True, save_strategy="no",
        report_to="none", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    anchors, positives, negatives = (list(column) for column in zip(*triplets, strict=True))
    dataset = datasets.Dataset.from_dict({"anchor": anchors, "positive": positives, "negative": negatives})
    watch = _Budgets(model, budgets, setting.batch)
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, callbacks=[watch], loss=MultipleNegativesRankingLoss(model), train_dataset=dataset
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return watch.costs


def read_states(model: SentenceTransformer, texts: Sequence[str]) -> States:
    """The states of bare texts: no answers follow them."""
    means = model.encode(list(texts), batch_size=_TEXTS_AT_ONCE, convert_to_tensor=True, show_progress_bar=False)
    return States(list(texts), means, torch.ones(len(texts)), {})

"""The same training step written for TRL's GRPOTrainer, as its users would: what bench/step_vs_trl.py compares with.

    python3 bench/trl_grace.py --train_file train.parquet --triplets 4 --n 4 --new_tokens 48 --steps 4 --out steps.jsonl

TRL trains the rationales of the positives. The reward function generates the rationales of queries and negatives,
pools the hidden states of all rows, and returns their similarities (the terms of `objective=grace`).
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

ROWS_PER_FORWARD = 16


def load_triplets(path: Path) -> Dataset:
    table = pq.read_table(path, columns=["prompt", "multi_input"]).to_pylist()
    rows = []
    for row in table:
        system = [message for message in row["prompt"] if message["role"] == "system"]
        texts = {"query": row["multi_input"]["query"], "negative": row["multi_input"]["negative_document"]}
        anchors = {name: [*system, {"role": "user", "content": text.strip()}] for name, text in texts.items()}
        rows.append({"prompt": row["prompt"], **anchors})
    return Dataset.from_list(rows)


class SimilarityReward:
    """The reward function: generates the anchors' rationales and embeds all rows with the current weights."""

    __name__ = "similarity"

    def __init__(self, tokenizer: Any, n: int, new_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.n = n
        self.new_tokens = new_tokens
        self.model: Any = None
        """The trainer's, which takes this object before it has one."""
        self.generated_tokens = self.prompt_tokens = 0
        self.seconds: dict[str, float] = {}

    @torch.no_grad()
    def __call__(
        self, prompts: list[Any], completion_ids: list[list[int]], query: list[Any], negative: list[Any], **_: Any
    ) -> list[float]:
        self.model.eval()
        start = time.perf_counter()
        positives = self._render(prompts)
        queries, negatives = (self._render(chats[:: self.n]) for chats in (query, negative))
        anchors = [*queries, *negatives]
        rationales = self._generate(anchors)
        generated = time.perf_counter()
        self.generated_tokens = sum(map(len, completion_ids)) + sum(map(len, rationales))
        self.prompt_tokens = sum(map(len, positives)) + sum(map(len, anchors))
        # All prompts begin with the same tokens: the system turn and the header of the user's turn.
        text_start = len(os.path.commonprefix([*positives, *anchors]))
        m = self._embed(positives, completion_ids, text_start)
        q, n = self._embed(anchors, rationales, text_start).chunk(2)
        self.seconds = {"anchors": generated - start, "embed": time.perf_counter() - generated}
        self.model.train()
        return self._rewards(m, q, n).tolist()

    def _render(self, chats: list[Any]) -> list[list[int]]:
        texts = self.tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def _generate(self, prompts: list[list[int]]) -> list[list[int]]:
        batch = self.tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        ids = self.model.generate(
            **batch, max_new_tokens=self.new_tokens, min_new_tokens=self.new_tokens, do_sample=True, temperature=0.5,
            top_k=0, top_p=1.0, pad_token_id=self.tokenizer.pad_token_id,
        )  # fmt: skip
        return ids[:, batch["input_ids"].shape[1] :].tolist()

    def _embed(self, prompts: list[list[int]], responses: list[list[int]], text_start: int) -> torch.Tensor:
        """Means over text and rationale; the model without its head, as no logits are needed."""
        vectors = []
        for start in range(0, len(prompts), ROWS_PER_FORWARD):
            pairs = list(zip(prompts, responses, strict=True))[start : start + ROWS_PER_FORWARD]
            ids = [prompt + response for prompt, response in pairs]
            batch = self.tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt")
            hidden = self.model.model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1).float()
            mask[:, :text_start] = 0
            vectors.append((hidden * mask).sum(1) / mask.sum(1))
        return F.normalize(torch.cat(vectors), dim=-1)

    def _rewards(self, m: torch.Tensor, q: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
        """The terms of objective=grace: positive and negative similarity, clustering, cross-group."""
        groups = len(q)
        m = m.view(groups, self.n, -1)
        positive = torch.einsum("gnh,gh->gn", m, q)
        negative = -(q * negatives).sum(1, keepdim=True)
        within = torch.einsum("gnh,gmh->gnm", m, m)
        clustering = (within.sum(2) - within.diagonal(dim1=1, dim2=2)) / (self.n - 1)
        largest = torch.einsum("gh,knh->gkn", q, m).amax(2)
        cross = -((largest.sum(1) - largest.diagonal()) / (groups - 1)).unsqueeze(1)
        return ((positive + negative + 0.2 * clustering + 0.2 * cross) / 0.1).flatten()


class StepLog(TrainerCallback):
    """Writes JSON lines: seconds from the end of the step before to the end of this one, and the step's tokens."""

    def __init__(self, path: Path, reward: SimilarityReward) -> None:
        self.path = path
        self.reward = reward
        self.last = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.perf_counter()
        record = {
            "step": state.global_step,
            "wall_s": now - self.last,
            "generated_tokens": self.reward.generated_tokens,
            "prompt_tokens": self.reward.prompt_tokens,
            "embedded_s": self.reward.seconds["embed"],
            "anchors_s": self.reward.seconds["anchors"],
        }
        self.last = now
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train_file", type=Path, required=True)
    parser.add_argument("--triplets", type=int, default=4)
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--new_tokens", type=int, default=48)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    reward = SimilarityReward(tokenizer, args.n, args.new_tokens)
    rows = args.triplets * args.n
    config = GRPOConfig(
        output_dir=str(args.out.parent / "trl"), use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=min(rows, ROWS_PER_FORWARD),
        gradient_accumulation_steps=max(1, rows // ROWS_PER_FORWARD),
        num_generations=args.n, max_completion_length=args.new_tokens, temperature=1.0, beta=0.0,
        generation_kwargs={"min_new_tokens": args.new_tokens}, scale_rewards="none", shuffle_dataset=False,
        learning_rate=1e-6, lr_scheduler_type="constant", max_grad_norm=1.0, weight_decay=0.01,
        max_steps=args.steps, logging_steps=1, save_strategy="no", report_to=[], seed=0,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model, reward, config, load_triplets(args.train_file), processing_class=tokenizer,
        callbacks=[StepLog(args.out, reward)],
    )  # fmt: skip
    reward.model = trainer.model
    trainer.train()


if __name__ == "__main__":
    main()

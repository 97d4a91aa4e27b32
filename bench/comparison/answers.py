"""Does a model still answer questions? The log-likelihood of answers that it was not trained on."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from comparison.measured import Measured
from verl.embedding.prompts import PromptRenderer
from verl.models.load import load_causal_lm
from verl.models.packing import Row, pack
from verl.models.policy import PolicyModel
from verl.utils.seqlen_balancing import pack_rows
from verl.utils.tokenizer import load_tokenizer

METRIC = "log-likelihood"
# Most tokens of a forward.
_TOKENS = 2048


def likelihood(folder: Path, answers: Sequence[tuple[str, str]]) -> Measured:
    """Of each answer the mean log-likelihood of its tokens in nats, after its question in the model's chat template.

    Args:
        folder: a model in transformers' format; one without a head gets that of its token embedding, if it is tied.
        answers: question and answer of each item.
    """
    tokenizer = load_tokenizer(str(folder))
    # The model is asked as a chat model, without the embedder's system prompt.
    prompts = PromptRenderer(tokenizer).render([[{"role": "user", "content": question}] for question, _ in answers])
    rows = [
        Row(tuple(prompt.ids), tuple(tokenizer(answer, add_special_tokens=False)["input_ids"]), 0, True)
        for prompt, (_, answer) in zip(prompts, answers, strict=True)
    ]
    policy = PolicyModel(load_causal_lm(str(folder)).eval())
    sums = torch.zeros(len(rows))
    for part in pack_rows(
        [row.prompt for row in rows], [len(row.prompt) for row in rows], [len(row.response) for row in rows], _TOKENS
    ):
        packed = pack([rows[i] for i in part], policy.shares_prompts)
        with torch.no_grad():
            log_probs = policy(packed).log_probs
        sums.index_add_(0, torch.tensor(part)[packed.score_row], log_probs)
    return Measured((sums / torch.tensor([len(row.response) for row in rows])).numpy().astype(np.float64))

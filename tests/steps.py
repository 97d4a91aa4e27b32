"""A small trained batch and an actor on the tiny model, for the tests of the update."""

import torch
from tiny import tiny_model

from verl.config import ActorConfig, MicroBatchLimit
from verl.models.attention import ATTENTION
from verl.models.policy import PolicyModel
from verl.protocol import DataProto
from verl.workers.actor import Actor
from verl.workers.scoring import score

TEMPERATURE = 0.9
MAX_RESPONSE = 24


def trained_rows(seed: int = 0, groups: int = 4, n: int = 3) -> DataProto:
    """groups x n rows whose prompts have a common beginning, with advantages and two mini-batches."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> torch.Tensor:
        return torch.randint(0, 250, (count,), generator=generator)

    system, width = ids(15), 40
    prompts, lengths, uids = [], [], []
    for group in range(groups):
        prompt = torch.cat([system, ids(5 + 4 * group)])
        prompts += [torch.nn.functional.pad(prompt, (width - len(prompt), 0))] * n
        lengths += [len(prompt)] * n
        uids += [group] * n
    count = groups * n
    response_length = torch.randint(1, MAX_RESPONSE + 1, (count,), generator=generator)
    return DataProto.from_dict(
        {
            "prompts": torch.stack(prompts),
            "prompt_length": torch.tensor(lengths),
            "text_start": torch.full((count,), 15),
            "pool_start": torch.full((count,), 15),
            "responses": torch.stack([ids(MAX_RESPONSE) for _ in range(count)]),
            "response_length": response_length,
            "advantages": torch.randn(count, 1, generator=generator).repeat(1, MAX_RESPONSE),
            "old_log_probs": torch.zeros(count, MAX_RESPONSE),
            "ref_log_prob": torch.zeros(count, MAX_RESPONSE),
            "trained": torch.ones(count, dtype=torch.bool),
            "mini_batch": torch.arange(groups).repeat_interleave(n) * 2 // groups,
        },
        {"role": ["positive"] * count, "uid": uids},
    )


def whole_step(seed: int = 0, groups: int = 4, n: int = 3, negatives: bool = True) -> DataProto:
    """As `trained_rows`, with a query and a negative after each group, which are anchors; all in one mini-batch.

    Some texts of different groups are equal: the first two have one query, the first and the last one positive, and the
    third's negative is the first one's positive. Without negatives, a query is the group's own text once more.
    """
    roles = ["positive"] * n + ["query"] + ["negative"] * negatives
    rows = trained_rows(seed, groups, len(roles))
    texts = []
    for group in range(groups):
        text = {"positive": f"positive {group % (groups - 1)}", "query": f"query {max(group, 1)}"}
        text["negative"] = "positive 0" if group == 2 else f"negative {group}"
        texts += [text[role] if negatives else text["positive"] for role in roles]
    anchor = torch.tensor([role != "positive" for role in roles] * groups)
    if negatives:  # their prompts are others
        rows.batch["prompts"][:, -1] += anchor * (1 + torch.arange(len(rows)) % 5)
    rows.batch["advantages"][anchor] = 0
    rows.batch["mini_batch"].zero_()
    tensors = {name: rows.batch[name] for name in rows.batch.keys()}
    tensors["trained"] = ~anchor
    tensors["truncated"] = torch.zeros(len(rows), dtype=torch.bool)
    columns = {"role": roles * groups, "uid": rows.non_tensor_batch["uid"], "text": texts}
    return DataProto.from_dict(tensors, columns, {"step": 1})


def tiny_policy(seed: int = 0) -> PolicyModel:
    lm = tiny_model(seed=seed)
    lm.set_attn_implementation(ATTENTION)
    return PolicyModel(lm)


def with_log_probs(rows: DataProto, policy: PolicyModel) -> DataProto:
    """The rows with log-probs of an old policy and of a reference, each a little off the policy's own."""
    own = score(policy, rows, MicroBatchLimit(10_000, None), TEMPERATURE, embed=False, entropy=False)
    generator = torch.Generator().manual_seed(9)
    for key in ("old_log_probs", "ref_log_prob"):
        noise = 0.1 * torch.randn(own.batch["log_probs"].shape, generator=generator)
        rows.batch[key] = own.batch["log_probs"] + noise
    return rows


def actor_config(**changes) -> ActorConfig:
    values = {"use_kl_loss": True, "kl_loss_coef": 0.05, "entropy_coeff": 0.01, "optim": {"lr": 1e-3}}
    return ActorConfig.model_validate({**values, **changes})


def build_actor(policy: PolicyModel, one_mini_batch: bool = False, **changes) -> Actor:
    return Actor(
        policy, actor_config(**changes), TEMPERATURE, MAX_RESPONSE, total_steps=10, one_mini_batch=one_mini_batch
    )

"""What is trained, as overrides of `train.sh`. A new idea is one line of RECIPES.

Everything that a row is defined by is in its overrides, so that a changed default of `train.sh` changes no row.
"""

from typing import NamedTuple

_REWARDS, _ACTOR = "+reward_model.reward_kwargs", "actor_rollout_ref.actor"


def _joint(weight: float = 1.0, share: float | None = 0.5, anchors: bool = False, tokens: int = 32) -> tuple[str, ...]:
    """The policy gradient beside that of the contrastive loss; docs/objectives.md has the settings.

    Args:
        share: of the embedding gradient; None = both as they come. With a share the weight has no effect but for 0.
        tokens: most tokens of a rationale.
    """
    return (
        f"{_REWARDS}.contrastive_weight={weight}", f"{_REWARDS}.contrastive_anchors={anchors}",
        f"{_ACTOR}.embedding_grad_share={'null' if share is None else share}", f"data.max_response_length={tokens}",
    )  # fmt: skip


class Trained(NamedTuple):
    title: str
    overrides: tuple[str, ...]
    mode: str = "supervised"


ROWS = {
    "embedding": Trained("the contrastive gradient on rationale embeddings, no policy gradient", _joint(share=1)),
    "grace": Trained(
        "GRACE, the policy gradient alone", (f"{_REWARDS}.contrastive_weight=0", "data.max_response_length=32")
    ),
    "joint": Trained("both gradients, half of the step each", _joint()),
}

RECIPES = {
    **{
        f"weight {weight:g}{' anchors' if anchors else ''}": Trained(
            "gradients as they come", _joint(weight, None, anchors)
        )
        for weight in (0.1, 1.0)
        for anchors in (False, True)
    },
    **{f"share {share:g}": Trained("another share", _joint(share=share)) for share in (0.2, 0.8)},
    "anchors": Trained("queries and negatives trained too", _joint(anchors=True)),
    **{
        f"text {share:g}": Trained("a fixed share of the text", (*_joint(), f"{_REWARDS}.text_share={share}"))
        for share in (0.3, 0.5, 0.7)
    },
    **{f"{tokens} tokens": Trained("shorter rationales", _joint(tokens=tokens)) for tokens in (8, 16)},
    "warm start": Trained(
        "20 steps without rationales first", (*_joint(anchors=True), "trainer.contrastive_warmup_steps=20")
    ),
    "unsupervised": Trained("texts alone", _joint(), "unsupervised"),
}
"""Tried by --recipes on the dev part."""

"""What is trained, as overrides of `train.sh`. A new idea is one line of RECIPES.

What rows differ by is in their overrides, so that a changed default of `train.sh` changes none of that. What none of
them sets (the prompt's length, the reward's temperature and weights) is the CPU recipe of `train.sh`: where that
changes, raise `study._VERSION`.
"""

from typing import NamedTuple

_REWARDS, _ACTOR = "+reward_model.reward_kwargs", "actor_rollout_ref.actor"
# More steps than any run here makes.
_ALWAYS = 1_000_000


def _shape(samples: int = 12, rationales: int = 2, tokens: int = 16, lr: float = 5e-5) -> tuple[str, ...]:
    """Triplets of a step, rationales of each, most tokens of one, and the learning rate."""
    return (
        f"data.train_batch_size={samples}", f"{_ACTOR}.ppo_mini_batch_size={samples}",
        f"actor_rollout_ref.rollout.n={rationales}", f"data.max_response_length={tokens}", f"{_ACTOR}.optim.lr={lr}",
    )  # fmt: skip


_USUAL = _shape()


def _joint(
    shape: tuple[str, ...] = _USUAL, weight: float = 1.0, share: float | None = 0.5, anchors: bool = True,
    between: int = 8, warm_up: int = 0,
) -> tuple[str, ...]:  # fmt: skip
    """The policy gradient beside that of the contrastive loss; docs/objectives.md has the settings.

    Args:
        share: of the embedding gradient; None = both as they come. With a share the weight has no effect but for 0.
        between: steps without rationales after each one with them.
        warm_up: first steps without rationales.
    """
    return (
        *shape, f"{_REWARDS}.contrastive_weight={weight}", f"{_REWARDS}.contrastive_anchors={anchors}",
        f"{_ACTOR}.embedding_grad_share={'null' if share is None else share}",
        f"trainer.contrastive_steps_between={between}", f"trainer.contrastive_warmup_steps={warm_up}",
    )  # fmt: skip


def _grace(lr: float = 5e-5, samples: int = 6, tokens: int = 16) -> tuple[str, ...]:
    return (*_shape(samples, 4, tokens, lr), f"{_REWARDS}.contrastive_weight=0")


def _text(share: float) -> tuple[str, ...]:
    """A fixed share of the text in the mean over text and rationale."""
    return (f"{_REWARDS}.text_share={share}",)


def _kl(weight: float) -> tuple[str, ...]:
    """The KL divergence from the untrained model in the loss: on rationales, in steps without them on the texts."""
    return (f"{_ACTOR}.use_kl_loss=True", f"{_ACTOR}.kl_loss_coef={weight}")


# More rationales of a text, whose rewards make better advantages.
_FOUR = _shape(4, 4, 8)
_FOUR_NO_POLICY = _joint(_FOUR, share=1, between=0, warm_up=20)
_FOUR_POLICY = _joint(_FOUR, between=0, warm_up=20)
# In a group the paper's reward differs by the similarity with the query alone; this one by those with other texts too.
_INFONCE = (f"{_REWARDS}.objective=infonce", f"{_REWARDS}.clustering_weight=0")


class Trained(NamedTuple):
    title: str
    overrides: tuple[str, ...]
    mode: str = "supervised"


ROWS = {
    "plain": Trained("the contrastive loss on texts alone, no rationale in training", _joint(warm_up=_ALWAYS)),
    "embedding": Trained(
        "the contrastive loss on texts and rationales with a KL term, no policy gradient", (*_joint(share=1), *_kl(1.0))
    ),
    # The best of four rates for the short form's seconds; the full form has another.
    "grace": Trained("GRACE, the policy gradient alone", _grace()),
    "joint": Trained("both: in steps with rationales, half of the gradient each", _joint()),
    "held": Trained("the same with a KL term", (*_joint(), *_kl(0.3))),
    "held_1": Trained("with a stronger one", (*_joint(), *_kl(1.0))),
}

RECIPES = {
    "plain": ROWS["plain"],
    "joint": ROWS["joint"],
    "grace": ROWS["grace"],
    **{f"joint, lr {lr:g}": Trained("another rate", _joint(_shape(lr=lr))) for lr in (1e-5, 2e-5, 1e-4)},
    **{f"plain, lr {lr:g}": Trained("another rate", _joint(_shape(lr=lr), warm_up=_ALWAYS)) for lr in (2e-5, 1e-4)},
    **{f"grace, lr {lr:g}": Trained("another rate", _grace(lr)) for lr in (1e-5, 2e-5, 1e-4)},
    **{
        f"weight {weight:g}{'' if anchors else ', anchors constant'}": Trained(
            "gradients as they come", _joint(weight=weight, share=None, anchors=anchors)
        )
        for weight in (0.1, 1.0)
        for anchors in (True, False)
    },
    **{f"share {share:g}": Trained("another share", _joint(share=share)) for share in (0.2, 0.8, 0.9)},
    "anchors constant": Trained("queries and negatives not trained", _joint(anchors=False)),
    **{f"{k} between": Trained("more or fewer steps with rationales", _joint(between=k)) for k in (0, 2, 4, 16)},
    **{
        f"text {share:g}": Trained("a fixed share of the text", (*_joint(), *_text(share))) for share in (0.3, 0.5, 0.7)
    },
    **{f"{tokens} tokens": Trained("other rationales", _joint(_shape(tokens=tokens))) for tokens in (8, 32)},
    "infonce": Trained("another reward", (*_joint(), *_INFONCE)),
    "KL 0.3": ROWS["held"],
    "KL 1": ROWS["held_1"],
    **{f"KL {weight:g}": Trained("a weaker or stronger one", (*_joint(), *_kl(weight))) for weight in (0.1, 3.0)},
    "6 x 4": Trained("fewer triplets, more rationales", _joint(_shape(6, 4))),
    "warm start": Trained("20 steps without rationales first", _joint(warm_up=20)),
    "no policy, 4 x 4": Trained("rationales in every step, no policy gradient", _FOUR_NO_POLICY),
    "GRACE, 4 x 4": Trained("as many steps, the policy gradient alone", _grace(samples=4, tokens=8)),
    "policy, 4 x 4": Trained("the same steps, half of the gradient the policy's", _FOUR_POLICY),
    "policy 0.1, 4 x 4": Trained(
        "a tenth of the gradient the policy's", _joint(_FOUR, share=0.9, between=0, warm_up=20)
    ),
    "policy by infonce, 4 x 4": Trained("the same as half, rewarded by another objective", (*_FOUR_POLICY, *_INFONCE)),
    "policy by infonce, KL 0.1, 4 x 4": Trained(
        "the same, and what is written stays near the untrained model's", (*_FOUR_POLICY, *_INFONCE, *_kl(0.1))
    ),
    "no policy, KL 1, 4 x 4": Trained("the likelihood of rationales and texts held", (*_FOUR_NO_POLICY, *_kl(1.0))),
    "no policy, 4 x 4, text 0.3": Trained("most of a vector the rationale's", (*_FOUR_NO_POLICY, *_text(0.3))),
    "policy by infonce, 4 x 4, text 0.3": Trained(
        "the same, half of the gradient the policy's", (*_FOUR_POLICY, *_INFONCE, *_text(0.3))
    ),
    "no rationale, 4 x 4": Trained("the same triplets, no rationale in training", _joint(_FOUR, warm_up=_ALWAYS)),
    "unsupervised": Trained("texts alone", _joint(between=0), "unsupervised"),
}
"""Tried by --recipes on the dev part."""

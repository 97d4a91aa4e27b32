"""The name under which users of verl look for the algorithms; they are in `verl.algorithm`."""

from verl.algorithm.advantage import get_adv_estimator_fn, register_adv_est
from verl.algorithm.groups import group_index, group_mean_std
from verl.algorithm.loss import ClipRange, KlController, kl_penalty, policy_loss, token_weights

__all__ = [
    "ClipRange", "KlController", "get_adv_estimator_fn", "group_index", "group_mean_std", "kl_penalty", "policy_loss",
    "register_adv_est", "token_weights",
]  # fmt: skip

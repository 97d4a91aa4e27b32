"""Embeddings that are trained to be cut: rewards and the contrastive loss at several numbers of first dimensions."""

import warnings

import pytest
import torch
from steps import whole_step
from torch import Tensor

from verl import GraceEncoder
from verl.embedding.settings import EmbedderSettings
from verl.protocol import DataProto
from verl.workers.reward_manager.hidden import HiddenRewardManager

DIMS = [8, 3]


@pytest.fixture
def rows() -> DataProto:
    free = torch.randn(len(whole_step(n=3)), 8, generator=torch.Generator().manual_seed(3))
    return whole_step(n=3).with_tensors(embeddings=torch.nn.functional.normalize(free, dim=1))


def cut(vectors: Tensor, count: int) -> Tensor:
    first = vectors[:, :count]
    return first / first.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("kwargs", [{}, {"objective": "infonce"}, {"enable_clustering": False, "with_scale": False}])
def test_the_reward_is_the_mean_of_those_of_cut_vectors(rows, kwargs):
    kwargs = {**kwargs, "enable_length_penalty": False}
    found = HiddenRewardManager(**kwargs, matryoshka_dims=DIMS)(rows)
    cuts = [rows.with_tensors(embeddings=cut(rows.batch["embeddings"], d)) for d in DIMS]
    alone = [HiddenRewardManager(**kwargs)(one) for one in cuts]
    assert not torch.allclose(alone[0].scores, alone[1].scores)
    torch.testing.assert_close(found.scores, torch.stack([one.scores for one in alone]).mean(0))
    for name, column in found.columns.items():
        torch.testing.assert_close(column, torch.stack([one.columns[name] for one in alone]).mean(0))


def test_vectors_are_cut_after_their_common_direction_is_taken_out(rows):
    """As an encoder does it."""
    embeddings = rows.batch["embeddings"] + 0.5
    mean = embeddings.mean(0) / embeddings.mean(0).norm()
    left = torch.stack([vector - (vector @ mean) * mean for vector in embeddings])
    expected = HiddenRewardManager()(rows.with_tensors(embeddings=cut(left, 3))).scores
    found = HiddenRewardManager(centre=True, matryoshka_dims=[3])(rows.with_tensors(embeddings=embeddings)).scores
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("anchors", [True, False])
def test_the_gradient_is_the_mean_of_those_through_each_cut(rows, anchors):
    kwargs = {"contrastive_weight": 0.7, "contrastive_anchors": anchors}
    found = HiddenRewardManager(**kwargs, matryoshka_dims=DIMS)(rows)
    vectors, expected, losses = rows.batch["embeddings"], torch.zeros(len(rows), 8), []
    for d in DIMS:
        alone = HiddenRewardManager(**kwargs)(rows.with_tensors(embeddings=cut(vectors, d)))
        grad, unit = alone.embedding_grad, cut(vectors, d)
        # The derivative of v / |v|, row by row.
        for i in range(len(rows)):
            along = (grad[i] @ unit[i]) * unit[i]
            expected[i, :d] += (grad[i] - along) / vectors[i, :d].norm() / len(DIMS)
        losses.append(alone.metrics["contrastive/loss"])
    assert expected.norm() > 0.1
    torch.testing.assert_close(found.embedding_grad, expected)
    assert found.metrics["contrastive/loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_an_encoder_warns_once_of_dimensions_that_were_not_trained(tiny_folder):
    with GraceEncoder(tiny_folder, settings=EmbedderSettings(matryoshka_dims=[16, 64])) as encoder:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("default")
            for count in (None, 16, 64, 17, 17):
                encoder.encode(["a text"], think=False, truncate_dim=count)
    (warning,) = said
    assert "truncate_dim=17: this model was trained to be used with 16 or 64 dimensions" in str(warning.message)

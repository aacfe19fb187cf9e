"""The loss of alike items: what it is, what it does to codes, and that a codebook without it keeps its bits."""

import numpy as np
import pytest
import torch

from features.content.encoder import unit
from features.errors import DatasetError
from models.semantic_id.codebook import rqvae, rqvae_fit
from models.semantic_id.codebook.alike import AlikePairs, alike_loss
from tests.build import SMALL_CODEBOOK

HALF = 200


def test_the_loss_is_least_where_each_item_is_nearest_to_its_partner() -> None:
    eye = torch.eye(4)
    assert alike_loss(eye, eye) < 0.001
    assert alike_loss(eye, eye[[1, 0, 2, 3]]) > 4
    assert float(alike_loss(torch.ones(4, 3), torch.ones(4, 3))) == pytest.approx(np.log(4))


def test_alike_items_get_near_codes_and_others_keep_their_bits() -> None:
    rng = np.random.default_rng(0)
    vectors = unit(rng.normal(size=(2 * HALF, 16)))
    pairs = np.stack([np.arange(HALF), np.arange(HALF) + HALF], axis=1)
    config = rqvae.RqVaeConfig(levels=2, codes=8, latent=8, hidden=(32,), steps=400, batch=64)
    plain, again = rqvae_fit.fit(vectors, config), rqvae_fit.fit(vectors, config, alike=None)
    assert plain.id == again.id
    joined = rqvae_fit.fit(vectors, config, alike=AlikePairs(pairs, 20.0))
    assert joined.id != plain.id

    def same(codebook: rqvae.RqVae) -> float:
        codes = codebook.encode(vectors)[:, 0]
        return float((codes[:HALF] == codes[HALF:]).mean())

    assert same(plain) < 0.25
    assert same(joined) > 2 * same(plain)


def test_pairs_of_rows_that_are_not_there_are_refused() -> None:
    vectors = unit(np.random.default_rng(0).normal(size=(40, 8)))
    for pairs in (np.zeros((0, 2), dtype=np.int64), np.array([[0, 40]]), np.array([[-1, 3]])):
        with pytest.raises(DatasetError, match="pairs of rows 0 to 39"):
            rqvae_fit.fit(vectors, SMALL_CODEBOOK, alike=AlikePairs(pairs, 1.0))

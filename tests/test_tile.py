"""Tiles and masks round a model."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.inpaint import inpainted
from jaxdiff.diffusion.tile import tile_starts, tiled


def test_tiles_cover_every_pixel_and_overlap_by_half_or_more():
    for length in range(1, 60):
        for tile in range(1, 20):
            starts = tile_starts(length, tile)
            covered = set()
            for start in starts:
                covered |= set(range(start, start + min(tile, length)))
            assert covered == set(range(length))
            steps = np.diff(starts)
            assert (steps <= max(1, tile // 2)).all()
            assert (steps > 0).all()


@pytest.mark.parametrize("size", [(8, 8), (8, 21), (13, 9), (5, 30)])
def test_a_network_that_looks_at_each_pixel_alone_is_the_same_through_tiles(size):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, *size, 4)), jnp.float32)

    def network(x_in, t):
        return jnp.sin(x_in[..., :3]) * t

    np.testing.assert_allclose(tiled(network, (8, 8))(x, jnp.float32(3.0)), network(x, 3.0), rtol=1e-6)


def test_where_tiles_overlap_their_answers_are_averaged():
    x = jnp.zeros((1, 4, 6, 1))

    def network(x_in, t):
        return jnp.broadcast_to(jnp.arange(x_in.shape[2], dtype=jnp.float32)[:, None], x_in.shape)

    out = tiled(network, (4, 4))(x, jnp.float32(0.0))
    np.testing.assert_allclose(out[0, 0, :, 0], [0, 1, (2 + 0) / 2, (3 + 1) / 2, 2, 3])


def test_a_masked_model_knows_what_is_kept_and_sees_it_with_its_own_noise():
    rng = np.random.default_rng(0)
    x, known, noise = (jnp.asarray(rng.standard_normal((4, 4, 3)), jnp.float32) for _ in range(3))
    mask, sigma = jnp.zeros((4, 4, 1)).at[:, 2:].set(1), jnp.float32(2.0)
    seen = []

    def denoise(x, sigma):
        seen.append(x)
        return jnp.full_like(x, 7.0)

    out = inpainted(denoise, known, mask, noise)(x, sigma)
    np.testing.assert_array_equal(out[:, :2], known[:, :2])
    np.testing.assert_array_equal(out[:, 2:], jnp.full((4, 2, 3), 7.0))
    np.testing.assert_allclose(seen[0][:, :2], (known + 2 * noise)[:, :2], rtol=1e-6)
    np.testing.assert_array_equal(seen[0][:, 2:], x[:, 2:])

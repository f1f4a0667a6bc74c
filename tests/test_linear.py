"""Biases and look-ups: flax's own results, and gradients that are summed in float32."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.nn.linear import Conv1x1, Dense, Embed, add, look_up, sum_by_product, sum_by_scatter
from jaxdiff.runtime.mesh import batch_sharding, make_mesh

PLACES = 16_384
"""Tokens of a batch of 512 captions."""


@pytest.mark.parametrize(
    ("ours", "theirs", "x"),
    [
        (Dense(5), nn.Dense(5), np.ones((2, 3, 4), np.float32)),
        (Dense(5, use_bias=False), nn.Dense(5, use_bias=False), np.ones((2, 4), np.float32)),
        (Conv1x1(5), nn.Conv(5, (1, 1)), np.ones((2, 3, 3, 4), np.float32)),
        (Embed(7, 5), nn.Embed(7, 5), np.array([[0, 6, 3]])),
    ],
)
def test_layers_have_the_parameters_and_results_of_flax(ours, theirs, x):
    if x.dtype == np.float32:
        x = np.random.default_rng(0).normal(size=x.shape).astype(np.float32)
    x = jnp.asarray(x)
    params = jax.tree.map(lambda p: p + 0.5, theirs.init(jax.random.key(0), x)["params"])
    own = ours.init(jax.random.key(0), x)["params"]
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, params)
    np.testing.assert_allclose(
        ours.apply({"params": params}, x), theirs.apply({"params": params}, x), rtol=1e-6, atol=1e-6
    )


def test_what_is_added_to_every_pixel_has_a_gradient_summed_in_float32():
    """In bfloat16 a sum of 16,384 ones would stop at 256."""
    d = jnp.ones((64, 16, 16, 3), jnp.bfloat16)
    for shape, expected in [((3,), 16_384.0), ((64, 1, 1, 3), 256.0), ((16, 3), 1024.0)]:
        y, pull = jax.vjp(lambda bias: add(jnp.zeros(d.shape, jnp.bfloat16), bias), jnp.full(shape, 1 + 2**-9))
        assert y.dtype == jnp.bfloat16
        assert (y == 1).all()
        np.testing.assert_array_equal(pull(d)[0], np.full(shape, expected, np.float32))


@pytest.mark.parametrize("total", [sum_by_scatter, sum_by_product])
def test_rows_of_a_gradient_are_float32_sums_by_both_ways(total):
    rng = np.random.default_rng(0)
    numbers = np.where(rng.random(PLACES) < 0.8, 0, rng.integers(1, 50, PLACES)).astype(np.int32)
    d = jnp.asarray(rng.uniform(0.1, 0.3, (PLACES, 8)), jnp.bfloat16)
    expected = np.zeros((50, 8))
    np.add.at(expected, numbers, np.asarray(d, np.float64))
    assert expected[0].min() > 2000  # where bfloat16 counts in steps of 16
    np.testing.assert_allclose(jax.jit(total, static_argnames="rows")(numbers, d, rows=50), expected, rtol=2e-5)


def test_the_gradient_of_a_look_up_is_the_same_where_the_batch_is_spread():
    mesh = make_mesh(data=2, fsdp=4)
    table, numbers = jnp.arange(40.0).reshape(10, 4), jnp.arange(64).reshape(16, 4) % 7
    weights = jax.random.normal(jax.random.key(0), (16, 4, 4))

    def loss(table, numbers, weights):
        return (look_up(table, numbers, jnp.dtype("float32")) * weights).sum()

    expected = jax.grad(loss)(table, numbers, weights)
    spread = jax.device_put((numbers, weights), batch_sharding(mesh))
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(table, *spread), expected, rtol=1e-6)
    assert (np.asarray(expected[7:]) == 0).all()

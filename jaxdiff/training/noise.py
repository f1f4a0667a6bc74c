"""Randomness that belongs to a sample, not to its place in a batch or on a device."""

import jax
from jaxtyping import Array, Float, Int

from jaxdiff.types import Key


def sample_keys(key: Key, index: Int[Array, " b"]) -> Key:
    """One key for each global sample index."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)


def normal_like(key: Key, index: Int[Array, " b"], like: Float[Array, "b *s"]) -> Float[Array, "b *s"]:
    """Standard normal noise in the shape of `like`, row i drawn from (`key`, `index[i]`)."""
    return jax.vmap(lambda k: jax.random.normal(k, like.shape[1:]))(sample_keys(key, index))

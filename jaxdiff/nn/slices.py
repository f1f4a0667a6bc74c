"""A batch in slices, for memory that does not grow with it."""

import math
from collections.abc import Callable

import jax
from jaxtyping import Array, Float

SLICE = 64 * 64 * 4
"""Latent pixels that are decoded at a time: four images of 512x512 by Stable Diffusion's autoencoder."""


def in_slices(decode: Callable[[Array], Array], z: Float[Array, "b h w c"], most: int = SLICE) -> Array:
    """`decode` of each latent, `most` of their pixels at a time, or one latent: memory does not grow with the batch.

    The images are those of `jax.vmap(decode)`. Slices of one image would not be: GroupNorm looks at all of it.
    """
    return jax.lax.map(decode, z, batch_size=min(len(z), max(1, most // math.prod(z.shape[1:3]))))

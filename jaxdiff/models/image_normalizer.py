"""Noise for an image's embedding, as unCLIP has it (Ramesh et al. 2022, section 2.1); named as in diffusers."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdiff.nn.layers import timestep_embedding


class StableUnCLIPImageNormalizer(nn.Module):
    """sqrt(alpha_bar) x + sqrt(1 - alpha_bar) noise, in units in which embeddings have the mean 0 and the deviation 1;
    and behind it sinusoids of the noise's level.

    It computes in float32, whatever networks do.
    """

    dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b {self.dim}"],
        noise: Float[Array, "b {self.dim}"],
        level: Float[Array, ""],
        alpha_bar: Float[Array, ""],
    ) -> Float[Array, "b {2*self.dim}"]:
        mean = self.param("mean", nn.initializers.zeros_init(), (1, self.dim))
        std = self.param("std", nn.initializers.ones_init(), (1, self.dim))
        mean, std = (jnp.asarray(one, jnp.float32) for one in (mean, std))
        x = jnp.sqrt(alpha_bar) * (x - mean) / std + jnp.sqrt(1 - alpha_bar) * noise
        waves = timestep_embedding(jnp.full(len(x), level), self.dim, flip_sin_to_cos=True, freq_shift=0)
        return jnp.concatenate([x * std + mean, waves], axis=-1)

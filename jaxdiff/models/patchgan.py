"""A discriminator that judges an image's patches, each by itself (Isola et al. 2017, section 3.2.2 and 6.1.2)."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdiff.nn.conv import Conv

SLOPE = 0.2  # of leaky ReLUs below 0


class PatchDiscriminator(nn.Module):
    """Images in [-1, 1] to a map of verdicts, above 0 where a patch looks real.

    The paper's batch norms are left out: they would make an image's verdict depend on the others of its batch, and on
    how that is spread over devices.
    """

    channels: int = 64
    layers: int = 3
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 1"]:
        x = image.astype(self.dtype)
        for i in range(self.layers + 1):
            stride = 2 if i < self.layers else 1
            channels = self.channels * min(2**i, 8)
            x = nn.leaky_relu(Conv(channels, 4, stride, 1, self.dtype, name=f"conv_{i}")(x), SLOPE)
        return Conv(1, 4, 1, 1, self.dtype, name="conv_out")(x).astype(jnp.float32)


def smallest(layers: int) -> int:
    """Pixels along each side of the smallest image that has a verdict."""
    return 3 * 2**layers

"""A small classifier that is to tell two sets of images apart by their pixels."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.nn.conv import Conv3x3
from jaxdiff.nn.layers import GroupNorm
from jaxdiff.nn.linear import Dense


class Adversary(nn.Module):
    """Convolutions, each halving the sides and followed by a norm and a ReLU; means over the pixels; one logit.

    Patches decide and not the whole: what a decoder leaves in pixels is seen wherever it is.
    """

    channels: tuple[int, ...] = (32, 64, 128)

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, " b"]:
        x = images
        for i, channels in enumerate(self.channels):
            x = Conv3x3(channels, stride=2, name=f"conv_{i}")(x)
            x = nn.relu(GroupNorm(8, 1e-5, name=f"norm_{i}")(x))
        return Dense(1, name="head")(x.mean((1, 2)))[:, 0].astype(jnp.float32)

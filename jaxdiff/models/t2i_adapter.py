"""T2I-Adapter (Mou et al. 2024): an image's features for each level of a UNet, computed once; named as in diffusers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdiff.nn.conv import Conv3x3
from jaxdiff.nn.linear import Conv1x1

Features = Float[Array, "b h w c"]
KINDS = ("full_adapter", "full_adapter_xl", "light_adapter")


class AdapterResnet(nn.Module):
    """Convolution, ReLU, convolution, added; the second one is 1x1 unless the adapter is `light`."""

    light: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Features) -> Features:
        h = nn.relu(Conv3x3(x.shape[-1], dtype=self.dtype, name="block1")(x))
        second = Conv3x3 if self.light else Conv1x1
        return x + second(x.shape[-1], dtype=self.dtype, name="block2")(h)


class AdapterBlock(nn.Module):
    """Halves the sides where it is to, then residual blocks; those of a `light` adapter have a quarter of the width."""

    channels: int
    layers: int
    halves: bool
    light: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Features) -> Float[Array, "b h2 w2 c2"]:
        if self.halves:
            x = halved(x)
        width = self.channels // 4 if self.light else self.channels
        if self.light or x.shape[-1] != width:
            x = Conv1x1(width, dtype=self.dtype, name="in_conv")(x)
        for i in range(self.layers):
            x = AdapterResnet(self.light, self.dtype, name=f"resnets_{i}")(x)
        return Conv1x1(self.channels, dtype=self.dtype, name="out_conv")(x) if self.light else x


class Adapter(nn.Module):
    """Blocks one after another, each with features of its own."""

    kind: str
    channels: tuple[int, ...]
    layers: int
    factor: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: Float[Array, "b h2 w2 3"]) -> tuple[Features, ...]:
        x = unshuffled(image.astype(self.dtype), self.factor)
        light = self.kind == "light_adapter"
        if not light:
            x = Conv3x3(self.channels[0], dtype=self.dtype, name="conv_in")(x)
        features = ()
        for i, (channels, halves) in enumerate(blocks(self.kind, self.channels)):
            x = AdapterBlock(channels, self.layers, halves, light, self.dtype, name=f"body_{i}")(x)
            features += (x,)
        return features


class T2IAdapter(nn.Module):
    """The features that an image in [0, 1] adds to a UNet's, from the finest.

    `factor` is how many pixels along a side become one, by moving them into the channels. Those of "full_adapter" and
    "light_adapter" are halved from each to the next; of "full_adapter_xl" they are halved once, from the second to the
    third.
    """

    kind: str
    channels: tuple[int, ...]
    layers: int
    factor: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: Float[Array, "b h2 w2 3"]) -> tuple[Features, ...]:
        return Adapter(self.kind, self.channels, self.layers, self.factor, self.dtype, name="adapter")(image)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Channels of each of its features, and pixels to one of them along a side."""
        found, stride = [], self.factor
        for channels, halves in blocks(self.kind, self.channels):
            stride *= 2 if halves else 1
            found.append((channels, stride))
        return found


def blocks(kind: str, channels: tuple[int, ...]) -> list[tuple[int, bool]]:
    """Channels of each block, and whether it halves the sides."""
    if kind == "light_adapter":
        return [(width, i > 0) for i, width in enumerate((*channels, channels[-1]))]
    return [(width, i == 2 if kind == "full_adapter_xl" else i > 0) for i, width in enumerate(channels)]


def unshuffled(image: Float[Array, "b h2 w2 c"], factor: int) -> Float[Array, "b h w d"]:
    """Squares of pixels side by side in the channels: a channel's pixels row after row, then the next channel's."""
    b, h, w, c = image.shape
    squares = image.reshape(b, h // factor, factor, w // factor, factor, c)
    return squares.transpose(0, 1, 3, 5, 2, 4).reshape(b, h // factor, w // factor, c * factor**2)


def halved(x: Features) -> Float[Array, "b h2 w2 c"]:
    """Means of squares of 2 x 2, of which those at an odd edge have fewer pixels."""
    window = {"window_dimensions": (1, 2, 2, 1), "window_strides": (1, 2, 2, 1)}
    padding = [(0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)]
    total, count = (
        jax.lax.reduce_window(a, jnp.zeros((), a.dtype), jax.lax.add, padding=padding, **window)
        for a in (x, jnp.ones_like(x))
    )
    return total / count

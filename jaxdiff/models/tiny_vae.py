"""TAESD, a tiny autoencoder of the same latents (Bohan 2023): previews in little time; named as in diffusers."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdiff.nn.conv import Conv3x3
from jaxdiff.nn.layers import ACTIVATIONS, upsample_nearest

MOST = 3.0
"""Latents are bent to lie between minus this and this."""


class TinyBlock(nn.Module):
    """Three convolutions, added, and a ReLU."""

    activation: str
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        h = x
        for i in (0, 2, 4):
            h = Conv3x3(x.shape[-1], dtype=self.dtype, name=f"conv_{i}")(h)
            h = ACTIVATIONS[self.activation](h) if i < 4 else h
        return nn.relu(h + x)


class TinyHalf(nn.Module):
    """Levels of blocks, between which a convolution halves the sides, or follows a doubling."""

    out_channels: int
    channels: tuple[int, ...]
    blocks: tuple[int, ...]
    activation: str
    decodes: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        i = 0  # what has no params has a number, too

        def conv(x: Array, channels: int, **options: object) -> Array:
            return Conv3x3(channels, dtype=self.dtype, name=f"layers_{i}", **options)(x)  # pyright: ignore

        x = conv(x, self.channels[0])
        i += 1
        if self.decodes:
            x, i = ACTIVATIONS[self.activation](x), i + 1
        last = len(self.channels) - 1
        for level, (channels, count) in enumerate(zip(self.channels, self.blocks, strict=True)):
            if level and not self.decodes:
                x, i = conv(x, channels, stride=2, use_bias=False), i + 1
            for _ in range(count):
                x, i = TinyBlock(self.activation, self.dtype, name=f"layers_{i}")(x), i + 1
            if level < last and self.decodes:
                x = upsample_nearest(x, (2 * x.shape[1], 2 * x.shape[2]))
                i += 1
                x, i = conv(x, channels, use_bias=False), i + 1
        return conv(x, self.out_channels)


class AutoencoderTiny(nn.Module):
    """`encode` gives a latent at unit variance, `decode` an image in [-1, 1] of one."""

    latent_channels: int
    encoder_channels: tuple[int, ...]
    decoder_channels: tuple[int, ...]
    encoder_blocks: tuple[int, ...]
    decoder_blocks: tuple[int, ...]
    activation: str = "relu"
    scale: float = 1.0
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        shared = {"activation": self.activation, "dtype": self.dtype}
        self.encoder = TinyHalf(
            self.latent_channels, self.encoder_channels, self.encoder_blocks, decodes=False, **shared
        )  # fmt: skip
        self.decoder = TinyHalf(3, self.decoder_channels, self.decoder_blocks, decodes=True, **shared)

    def encode(self, image: Float[Array, "b h w 3"]) -> Float[Array, "b h2 w2 {self.latent_channels}"]:
        """Image in [-1, 1] to latent."""
        return self.scale * self.encoder(((image + 1) / 2).astype(self.dtype)).astype(jnp.float32)

    def decode(self, z: Float[Array, "b h w {self.latent_channels}"]) -> Float[Array, "b h2 w2 3"]:
        """Latent to image, which may overshoot [-1, 1]."""
        z = jnp.tanh(z / self.scale / MOST) * MOST
        return 2 * self.decoder(z.astype(self.dtype)).astype(jnp.float32) - 1

    def __call__(self, image: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
        """Encodes and decodes."""
        return self.decode(self.encode(image))

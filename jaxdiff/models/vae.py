"""The autoencoder between pixels and latents (Kingma & Welling 2014; Rombach et al. 2022, section 3.1)."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdiff.nn.blocks import AttentionMiddle, DownStage, UpStage
from jaxdiff.nn.conv import Conv3x3
from jaxdiff.nn.layers import GroupNorm, Remat
from jaxdiff.nn.linear import Conv1x1

EPS = 1e-6


class Encoder(nn.Module):
    """Image to twice the latent's channels; each level but the last halves the sides."""

    latent_channels: int
    channels: tuple[int, ...]
    layers: int
    groups: int
    dtype: DTypeLike = jnp.float32
    remat: Remat = "none"
    activation: str = "silu"
    attends: bool = True

    @nn.compact
    def __call__(self, image: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        x = Conv3x3(self.channels[0], dtype=self.dtype, name="conv_in")(image.astype(self.dtype))
        shared = {"groups": self.groups, "eps": EPS, "dtype": self.dtype, "remat": self.remat}
        shared |= {"activation": self.activation}
        for i, channels in enumerate(self.channels):
            down = DownStage(
                channels=channels,
                layers=self.layers,
                downsample=i < len(self.channels) - 1,
                pad_all_round=False,
                name=f"down_blocks_{i}",
                **shared,
            )
            x, _ = down(x)
        middle = AttentionMiddle(channels=self.channels[-1], layers=1, attends=self.attends, name="mid_block", **shared)
        x = middle(x)
        x = GroupNorm(self.groups, EPS, self.dtype, "silu", name="conv_norm_out")(x)
        return Conv3x3(2 * self.latent_channels, dtype=self.dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """Latent to image; each level but the finest doubles the sides."""

    out_channels: int
    channels: tuple[int, ...]
    layers: int
    groups: int
    dtype: DTypeLike = jnp.float32
    remat: Remat = "none"
    activation: str = "silu"
    attends: bool = True

    @nn.compact
    def __call__(self, z: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        x = Conv3x3(self.channels[-1], dtype=self.dtype, name="conv_in")(z.astype(self.dtype))
        shared = {"groups": self.groups, "eps": EPS, "dtype": self.dtype, "remat": self.remat}
        shared |= {"activation": self.activation}
        middle = AttentionMiddle(channels=self.channels[-1], layers=1, attends=self.attends, name="mid_block", **shared)
        x = middle(x)
        for i, channels in enumerate(reversed(self.channels)):
            size = (2 * x.shape[1], 2 * x.shape[2]) if i < len(self.channels) - 1 else None
            x = UpStage(channels=channels, layers=self.layers + 1, name=f"up_blocks_{i}", **shared)(x, size=size)
        x = GroupNorm(self.groups, EPS, self.dtype, "silu", name="conv_norm_out")(x)
        return Conv3x3(self.out_channels, dtype=self.dtype, name="conv_out")(x)


class AutoencoderKL(nn.Module):
    """`encode` gives the Gaussian of an image's latent, `decode` the image of a latent; both unscaled.

    The moments are the mean and the log-variance, side by side in the channels. Images lie in [-1, 1]. `activation` is
    that of the residual blocks, `attends` says whether their middles have attention, `quant` and `post_quant` whether a
    1x1 convolution follows the encoder and goes before the decoder.
    """

    out_channels: int
    latent_channels: int
    channels: tuple[int, ...]
    layers: int
    groups: int = 32
    activation: str = "silu"
    attends: bool = True
    quant: bool = True
    post_quant: bool = True
    dtype: DTypeLike = jnp.float32
    remat: Remat = "none"

    def setup(self) -> None:
        sizes = (self.channels, self.layers, self.groups, self.dtype, self.remat, self.activation, self.attends)
        self.encoder = Encoder(self.latent_channels, *sizes)
        self.decoder = Decoder(self.out_channels, *sizes)
        self.quant_conv = Conv1x1(2 * self.latent_channels, dtype=self.dtype) if self.quant else None
        self.post_quant_conv = Conv1x1(self.latent_channels, dtype=self.dtype) if self.post_quant else None

    def encode(self, image: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 {2*self.latent_channels}"]:
        """Image to moments: the latent's mean and log-variance."""
        moments = self.encoder(image)
        return (moments if self.quant_conv is None else self.quant_conv(moments)).astype(jnp.float32)

    def decode(self, z: Float[Array, "b h w {self.latent_channels}"]) -> Float[Array, "b h2 w2 {self.out_channels}"]:
        """Latent to image, which may overshoot [-1, 1]."""
        z = z.astype(self.dtype)
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z)).astype(jnp.float32)

    def __call__(self, image: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Encodes, takes the mean, decodes: what initialisation and reconstruction figures use."""
        return self.decode(self.encode(image)[..., : self.latent_channels])

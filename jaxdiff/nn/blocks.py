"""The residual block, and the down, middle and up stages that the UNet and the autoencoder are stacked from."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdiff.nn.attention import Attention, Transformer2D
from jaxdiff.nn.conv import Conv3x3
from jaxdiff.nn.layers import GroupNorm, Remat, remat, upsample_nearest
from jaxdiff.nn.linear import Conv1x1, Dense, add
from jaxdiff.types import Context

Features = Float[Array, "b h w c"]
Embedding = Float[Array, "b d"]


class ResnetBlock(nn.Module):
    """GroupNorm-SiLU-conv twice; the timestep embedding, where there is one, is added between them.

    The collection "rows" may say which row's features each row takes (`source`).
    """

    channels: int
    groups: int
    eps: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Features, emb: Embedding | None = None) -> Float[Array, "b h w c2"]:
        h = nn.silu(GroupNorm(self.groups, self.eps, self.dtype, name="norm1")(x))
        h = Conv3x3(self.channels, dtype=self.dtype, name="conv1")(h)
        if emb is not None:
            emb = Dense(self.channels, dtype=self.dtype, name="time_emb_proj")(nn.silu(emb))
            h = add(h, emb[:, None, None, :])
        h = nn.silu(GroupNorm(self.groups, self.eps, self.dtype, name="norm2")(h))
        h = Conv3x3(self.channels, dtype=self.dtype, name="conv2")(h)
        if self.has_variable("rows", "source"):
            h = h[self.get_variable("rows", "source")]
        if x.shape[-1] != self.channels:
            x = Conv1x1(self.channels, dtype=self.dtype, name="conv_shortcut")(x)
        return x + h


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2. The autoencoder pads right and bottom only; the UNet pads all round."""

    pad_all_round: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Features) -> Float[Array, "b h2 w2 c"]:
        padding = ((1, 1), (1, 1)) if self.pad_all_round else ((0, 1), (0, 1))
        return Conv3x3(x.shape[-1], stride=2, padding=padding, dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
    """Nearest-neighbour to `size`, then a 3x3 convolution."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Features, size: tuple[int, int]) -> Float[Array, "b h2 w2 c"]:
        return Conv3x3(x.shape[-1], dtype=self.dtype, name="conv")(upsample_nearest(x, size))


class Stage(nn.Module):
    """What the stages of one resolution share: their width, their norms and how they make their children.

    `depth` is the number of transformer blocks after each residual block; 0 means no attention. `remat` is what
    the backward pass computes again in each child: see `jaxdiff.nn.layers.remat`.
    """

    channels: int
    layers: int
    groups: int
    eps: float
    depth: int = 0
    heads: int = 1
    linear_projection: bool = False
    dtype: DTypeLike = jnp.float32
    remat: Remat = "none"

    def resnet(self, i: int) -> ResnetBlock:
        """Residual block number `i`."""
        cls = remat(ResnetBlock, self.remat)
        return cls(self.channels, self.groups, self.eps, self.dtype, name=f"resnets_{i}")

    def transformer(self, i: int) -> Transformer2D:
        """The transformer after residual block number `i`."""
        cls = remat(Transformer2D, self.remat)
        return cls(self.depth, self.heads, self.groups, self.linear_projection, self.dtype, name=f"attentions_{i}")


class DownStage(Stage):
    """Residual blocks (each with its transformer), then a halving; returns the features and every skip on the way."""

    downsample: bool = True
    pad_all_round: bool = True

    @nn.compact
    def __call__(
        self, x: Features, emb: Embedding | None = None, context: Context | None = None, first: int | None = None
    ) -> tuple[Array, tuple[Array, ...]]:
        skips = ()
        for i in range(self.layers if first is None else first):
            x = self.resnet(i)(x, emb)
            if self.depth:
                assert context is not None, "a stage with attention reads a prompt"
                x = self.transformer(i)(x, context)
            skips += (x,)
        if self.downsample and first is None:
            x = Downsample(self.pad_all_round, self.dtype, name="downsamplers_0")(x)
            skips += (x,)
        return x, skips


class UpStage(Stage):
    """Residual blocks that each take one skip (last first) where there are any, then a doubling to `size`.

    `part` takes some of the blocks alone, `first` of a `DownStage` the first ones.
    """

    @nn.compact
    def __call__(
        self,
        x: Features,
        emb: Embedding | None = None,
        context: Context | None = None,
        *,
        skips: Sequence[Array] = (),
        size: tuple[int, int] | None = None,
        part: range | None = None,
    ) -> Array:
        for i in range(self.layers) if part is None else part:
            if skips:
                x = jnp.concatenate([x, skips[self.layers - 1 - i]], axis=-1)
            x = self.resnet(i)(x, emb)
            if self.depth:
                assert context is not None, "a stage with attention reads a prompt"
                x = self.transformer(i)(x, context)
        if size is not None:
            x = Upsample(self.dtype, name="upsamplers_0")(x, size)
        return x


class CrossAttentionMiddle(Stage):
    """Residual block, then `layers` times a transformer and a residual block, at the UNet's lowest resolution."""

    @nn.compact
    def __call__(self, x: Features, emb: Embedding, context: Context) -> Features:
        x = self.resnet(0)(x, emb)
        for i in range(self.layers):
            x = self.resnet(i + 1)(self.transformer(i)(x, context), emb)
        return x


class AttentionMiddle(Stage):
    """Residual block, single-head attention over all pixels, residual block: the autoencoder's middle."""

    @nn.compact
    def __call__(self, x: Features) -> Features:
        x = self.resnet(0)(x)
        b, h, w, c = x.shape
        attention = Attention(1, qkv_bias=True, norm_groups=self.groups, dtype=self.dtype, name="attentions_0")
        return self.resnet(1)(x + attention(x.reshape(b, h * w, c)).reshape(b, h, w, c))

"""The residual block, and the down, middle and up stages that the UNet and the autoencoder are stacked from."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdiff.nn.attention import Attention, Transformer2D
from jaxdiff.nn.conv import Conv3x3
from jaxdiff.nn.layers import ACTIVATIONS, GroupNorm, Remat, remat, upsample_nearest
from jaxdiff.nn.linear import Conv1x1, Dense, add
from jaxdiff.types import Context

Features = Float[Array, "b h w c"]
Embedding = Float[Array, "b d"]


class ResnetBlock(nn.Module):
    """GroupNorm-activation-conv twice; the timestep embedding, where there is one, is added between them.

    With `scale_shift` the embedding scales and shifts what the second norm gives instead (Dhariwal & Nichol 2021,
    AdaGN). The sum is divided by `divisor`. The collection "rows" may say which row's features each row takes
    (`source`).
    """

    channels: int
    groups: int
    eps: float
    dtype: DTypeLike = jnp.float32
    activation: str = "silu"
    scale_shift: bool = False
    divisor: float = 1.0

    @nn.compact
    def __call__(self, x: Features, emb: Embedding | None = None) -> Float[Array, "b h w c2"]:
        act = ACTIVATIONS[self.activation]
        h = GroupNorm(self.groups, self.eps, self.dtype, self.activation, name="norm1")(x)
        h = Conv3x3(self.channels, dtype=self.dtype, name="conv1")(h)
        shifts = self.scale_shift and emb is not None
        norm2 = GroupNorm(self.groups, self.eps, self.dtype, None if shifts else self.activation, name="norm2")
        if emb is None:
            h = norm2(h)
        else:
            width = 2 * self.channels if self.scale_shift else self.channels
            emb = Dense(width, dtype=self.dtype, name="time_emb_proj")(act(emb))[:, None, None, :]
            if self.scale_shift:
                scale, shift = jnp.split(emb, 2, axis=-1)
                h = act(norm2(h) * (1 + scale) + shift)
            else:
                h = norm2(add(h, emb))
        h = Conv3x3(self.channels, dtype=self.dtype, name="conv2")(h)
        if self.has_variable("rows", "source"):
            h = h[self.get_variable("rows", "source")]
        if x.shape[-1] != self.channels:
            x = Conv1x1(self.channels, dtype=self.dtype, name="conv_shortcut")(x)
        return x + h if self.divisor == 1 else (x + h) / self.divisor


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
    the backward pass computes again in each child: see `jaxdiff.nn.layers.remat`. `activation` (of `ACTIVATIONS`),
    `scale_shift` and `divisor` are those of its residual blocks, `only_context` that of its transformers.
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
    activation: str = "silu"
    scale_shift: bool = False
    divisor: float = 1.0
    only_context: bool = False

    def resnet(self, i: int) -> ResnetBlock:
        """Residual block number `i`."""
        cls = remat(ResnetBlock, self.remat)
        act, scale_shift, divisor = self.activation, self.scale_shift, self.divisor
        return cls(self.channels, self.groups, self.eps, self.dtype, act, scale_shift, divisor, name=f"resnets_{i}")

    def transformer(self, i: int) -> Transformer2D:
        """The transformer after residual block number `i`."""
        cls = remat(Transformer2D, self.remat)
        sizes = self.depth, self.heads, self.groups, self.linear_projection, self.dtype, self.only_context
        return cls(*sizes, name=f"attentions_{i}")


class DownStage(Stage):
    """Residual blocks (each with its transformer), then a halving; returns the features and every skip on the way.

    `first` takes the first so many blocks alone. What is `added` (Mou et al. 2024, T2I-Adapter) goes to the last
    block's features where there is attention, else to those of the end, and so to a skip as well.
    """

    downsample: bool = True
    pad_all_round: bool = True

    @nn.compact
    def __call__(
        self,
        x: Features,
        emb: Embedding | None = None,
        context: Context | None = None,
        first: int | None = None,
        added: Float[Array, "b h2 w2 c2"] | None = None,
    ) -> tuple[Array, tuple[Array, ...]]:
        skips = ()
        for i in range(self.layers if first is None else first):
            x = self.resnet(i)(x, emb)
            if self.depth:
                assert context is not None, "a stage with attention reads a prompt"
                x = self.transformer(i)(x, context)
            if added is not None and self.depth and i == self.layers - 1:
                x += added.astype(x.dtype)
            skips += (x,)
        if self.downsample and first is None:
            x = Downsample(self.pad_all_round, self.dtype, name="downsamplers_0")(x)
            skips += (x,)
        if added is not None and not self.depth:
            x += added.astype(x.dtype)
            skips = (*skips[:-1], x)
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
    """Residual block, single-head attention over all pixels (unless `attends` is off), residual block: the
    autoencoder's middle."""

    attends: bool = True

    @nn.compact
    def __call__(self, x: Features) -> Features:
        x = self.resnet(0)(x)
        if self.attends:
            b, h, w, c = x.shape
            attention = Attention(1, qkv_bias=True, norm_groups=self.groups, dtype=self.dtype, name="attentions_0")
            x = x + attention(x.reshape(b, h * w, c)).reshape(b, h, w, c)
        return self.resnet(1)(x)

"""ControlNet (Zhang et al. 2023): a UNet's way down, whose features are added to another's; named as in diffusers."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdiff.models.unet import Added, UNet2DConditionModel
from jaxdiff.nn.conv import Conv3x3
from jaxdiff.nn.linear import Conv1x1
from jaxdiff.types import Context, Params


class ImageEmbedding(nn.Module):
    """Pixels to features of the latent's size: convolutions, of which every second one halves the sides."""

    channels: int
    hidden: tuple[int, ...]
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: Float[Array, "b h2 w2 c2"]) -> Float[Array, "b h w {self.channels}"]:
        x = nn.silu(Conv3x3(self.hidden[0], dtype=self.dtype, name="conv_in")(image.astype(self.dtype)))
        for i, (channels, wider) in enumerate(zip(self.hidden, self.hidden[1:], strict=False)):
            x = nn.silu(Conv3x3(channels, dtype=self.dtype, name=f"blocks_{2 * i}")(x))
            x = nn.silu(Conv3x3(wider, stride=2, dtype=self.dtype, name=f"blocks_{2 * i + 1}")(x))
        return Conv3x3(self.channels, dtype=self.dtype, name="conv_out")(x)


class ControlNetModel(UNet2DConditionModel):
    """What a UNet's skips and its middle have added to them, for an image to follow.

    `hidden` are the channels of the image's embedding. With `pools` the features are means over the image. With `bgr`
    the network reads colours in that order.
    """

    hidden: tuple[int, ...] = (16, 32, 96, 256)
    pools: bool = False
    bgr: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        context: Context,
        image: Float[Array, "b h2 w2 c2"] | None = None,
        features: Float[Array, "b h w d"] | None = None,
        *,
        pooled: Float[Array, "b p"] | None = None,
        numbers: Float[Array, "b k"] | None = None,
        guidance: Float[Array, " b"] | None = None,
    ) -> Added:
        """Features for a UNet that is given the same.

        Args:
            x: the noisy latent.
            t: the training step.
            context: the prompt's features.
            image: in [0, 1]; or in its place
            features: what `embed` made of it.
            pooled: a vector for the whole prompt, of a network that reads one.
            numbers: as the UNet's.
            guidance: as the UNet's.
        """
        emb, context = self.time_features(t, pooled, numbers, guidance), context.astype(self.dtype)
        if features is None:
            assert image is not None, "an image, or its features"
            embedding = ImageEmbedding(self.channels[0], self.hidden, self.dtype, name="controlnet_cond_embedding")
            features = embedding(image[..., ::-1] if self.bgr else image)
        x = self.first(x) + features.astype(self.dtype)
        skips = (x,)
        for i in range(len(self.channels)):
            x, new_skips = self.down(i)(x, emb, context)
            skips += new_skips
        x = self.middle()(x, emb, context)

        def out(features: Array, name: str) -> Array:
            y = Conv1x1(features.shape[-1], dtype=self.dtype, name=name)(features)
            return y.mean((1, 2), keepdims=True) if self.pools else y

        outs = tuple(out(skip, f"controlnet_down_blocks_{i}") for i, skip in enumerate(skips))
        return Added(outs, out(x, "controlnet_mid_block"))


def embed(net: ControlNetModel, params: Params, image: Float[Array, "b h2 w2 c2"]) -> Float[Array, "b h w d"]:
    """A network's features of an image in [0, 1], which are the same at every step."""
    module = ImageEmbedding(net.channels[0], net.hidden, net.dtype)
    variables = {"params": params["controlnet_cond_embedding"]}
    return module.apply(variables, image[..., ::-1] if net.bgr else image)  # pyright: ignore[reportReturnType]


def times(added: Added, scale: Float[Array, ""], rising: bool = False) -> Added:
    """The features times `scale`; where it is `rising`, ever more of them, from a tenth for the first."""
    n = len(added.skips)
    factors = [10 ** (i / n - 1) if rising else 1.0 for i in range(n + 1)]

    def weighed(x: Array, factor: float) -> Array:
        return x * (scale * factor).astype(x.dtype)

    assert added.middle is not None, "all that a ControlNet adds"
    return Added(tuple(map(weighed, added.skips, factors)), weighed(added.middle, factors[n]))

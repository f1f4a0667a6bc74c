"""IP-Adapter (Ye et al. 2023): an image as a prompt, by keys and values of its own in every cross-attention.

The parameters are named as in the authors' files, but for the resampler's (`jaxdiff.io.ip_adapter`).
"""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdiff.nn.attention import attend
from jaxdiff.nn.layers import LayerNorm
from jaxdiff.nn.linear import Dense

HEAD = 64
"""Channels of the resampler's heads, which its files do not say."""
KINDS = ("plain", "plus", "full")
KeysAndValues = tuple[Float[Array, "b t c"], Float[Array, "b t c"]]


class Projection(nn.Module):
    """An image's one vector to `tokens` vectors of `dim` features (section 3.2.1)."""

    tokens: int
    dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b {self.tokens} {self.dim}"]:
        x = Dense(self.tokens * self.dim, dtype=self.dtype, name="proj")(x)
        return LayerNorm(dtype=self.dtype, name="norm")(x.reshape(len(x), self.tokens, self.dim))


class FullProjection(nn.Module):
    """Each of an image's vectors to one of `dim` features."""

    dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t {self.dim}"]:
        h = nn.gelu(Dense(x.shape[-1], dtype=self.dtype, name="proj_0")(x), approximate=False)
        return LayerNorm(dtype=self.dtype, name="proj_3")(Dense(self.dim, dtype=self.dtype, name="proj_2")(h))


class ResamplerLayer(nn.Module):
    """Latents that attend to an image's vectors and themselves, then two dense layers; each behind a norm, each added
    (Alayrac et al. 2022, Flamingo, section 2.1)."""

    inner: int
    feedforward: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, latents: Float[Array, "b n d"], x: Float[Array, "b t d"]) -> Float[Array, "b n d"]:
        b, _, d = latents.shape

        def dense(features: int, name: str, x: Array) -> Array:
            return Dense(features, use_bias=False, dtype=self.dtype, name=name)(x)

        def heads(x: Array) -> Array:
            return x.reshape(b, -1, self.inner // HEAD, HEAD)

        h = LayerNorm(dtype=self.dtype, name="norm2")(latents)
        both = jnp.concatenate([LayerNorm(dtype=self.dtype, name="norm1")(x), h], axis=1)
        k, v = jnp.split(dense(2 * self.inner, "to_kv", both), 2, axis=-1)
        y = attend(heads(dense(self.inner, "to_q", h)), heads(k), heads(v))
        latents += dense(d, "to_out", y.reshape(b, -1, self.inner))
        h = dense(self.feedforward, "fc1", LayerNorm(dtype=self.dtype, name="norm3")(latents))
        return latents + dense(d, "fc2", nn.gelu(h, approximate=False))


class Resampler(nn.Module):
    """An image's vectors to `tokens` vectors of `dim` features, by `depth` layers of `hidden` features."""

    tokens: int
    dim: int
    hidden: int
    depth: int
    inner: int
    feedforward: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b {self.tokens} {self.dim}"]:
        latents = self.param("latents", nn.initializers.normal(self.hidden**-0.5), (1, self.tokens, self.hidden))
        latents = jnp.broadcast_to(jnp.asarray(latents, self.dtype), (len(x), self.tokens, self.hidden))
        x = Dense(self.hidden, dtype=self.dtype, name="proj_in")(x)
        for i in range(self.depth):
            latents = ResamplerLayer(self.inner, self.feedforward, self.dtype, name=f"layers_{i}")(latents, x)
        return LayerNorm(dtype=self.dtype, name="norm_out")(Dense(self.dim, dtype=self.dtype, name="proj_out")(latents))


class Layer(nn.Module):
    """Keys and values of one cross-attention."""

    channels: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> KeysAndValues:
        def project(name: str) -> Array:
            return Dense(self.channels, use_bias=False, dtype=self.dtype, name=name)(x)

        return project("to_k_ip"), project("to_v_ip")


class IPAdapter(nn.Module):
    """Keys and values of an image for each cross-attention of a UNet, in the order of `cross_attentions`.

    `kind` says which features of the image are read: "plain" its one embedding, "plus" and "full" those of its
    patches. `channels` are the cross-attentions'; `hidden` and what follows is the resampler's, of "plus".
    """

    kind: str
    channels: tuple[int, ...]
    dim: int
    tokens: int
    hidden: int = 0
    depth: int = 0
    inner: int = 0
    feedforward: int = 0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, features: Float[Array, "b *t d"]) -> tuple[KeysAndValues, ...]:
        if self.kind == "plain":
            tokens = Projection(self.tokens, self.dim, self.dtype, name="image_proj")(features)
        elif self.kind == "full":
            tokens = FullProjection(self.dim, self.dtype, name="image_proj")(features)
        else:
            sizes = self.tokens, self.dim, self.hidden, self.depth, self.inner, self.feedforward
            tokens = Resampler(*sizes, self.dtype, name="image_proj")(features)
        # The files count self-attentions, too, which have nothing there.
        return tuple(
            Layer(channels, self.dtype, name=f"ip_adapter_{2 * i + 1}")(tokens)
            for i, channels in enumerate(self.channels)
        )

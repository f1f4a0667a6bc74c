"""Attention, and the transformer that lets every pixel read the prompt."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from jaxdiff.nn.layers import Conv1x1, GroupNorm, LayerNorm
from jaxdiff.types import Context


def attend(
    q: Float[Array, "b q h d"],
    k: Float[Array, "b k h d"],
    v: Float[Array, "b k h d"],
    mask: Bool[Array, "q k"] | None = None,
) -> Float[Array, "b q h d"]:
    """softmax(q k^T / sqrt(d)) v, the softmax in float32 (Vaswani et al. 2017, eq. 1); `mask` is True where allowed."""
    # Heads before tokens: both products are then plain batched matrix products.
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))
    scores = jnp.einsum("bhqd,bhkd->bhqk", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.swapaxes(jnp.einsum("bhqk,bhkd->bhqd", weights, v), 1, 2)


class Attention(nn.Module):
    """Multi-head attention of `x` over `context` (itself if None), with diffusers' names for the projections.

    `norm_groups` above 0 puts a GroupNorm first, as the autoencoder wants it.
    """

    heads: int
    qkv_bias: bool = False
    norm_groups: int = 0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t c"], context: Context | None = None) -> Float[Array, "b t c"]:
        b, t, c = x.shape
        if self.norm_groups:
            x = GroupNorm(self.norm_groups, 1e-6, self.dtype, name="group_norm")(x)
        context = x if context is None else context

        def project(name: str, source: Array) -> Array:
            y = nn.Dense(c, use_bias=self.qkv_bias, dtype=self.dtype, name=name)(source)
            return y.reshape(b, -1, self.heads, c // self.heads)

        y = attend(project("to_q", x), project("to_k", context), project("to_v", context))
        return nn.Dense(c, dtype=self.dtype, name="to_out_0")(y.reshape(b, t, c))


class GEGLU(nn.Module):
    """A dense layer of which one half gates the other by GELU (Shazeer 2020, eq. 6)."""

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t {self.features}"]:
        x, gate = jnp.split(nn.Dense(2 * self.features, dtype=self.dtype, name="proj")(x), 2, axis=-1)
        return x * nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        c = x.shape[-1]
        return nn.Dense(c, dtype=self.dtype, name="net_2")(GEGLU(4 * c, self.dtype, name="net_0")(x))


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention on the prompt, feed-forward; each behind a norm, each added."""

    heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t c"], context: Context) -> Float[Array, "b t c"]:
        x += Attention(self.heads, dtype=self.dtype, name="attn1")(LayerNorm(dtype=self.dtype, name="norm1")(x))
        x += Attention(self.heads, dtype=self.dtype, name="attn2")(
            LayerNorm(dtype=self.dtype, name="norm2")(x), context
        )
        return x + FeedForward(self.dtype, name="ff")(LayerNorm(dtype=self.dtype, name="norm3")(x))


class Transformer2D(nn.Module):
    """A stack of transformer blocks over the pixels of a feature map (Rombach et al. 2022, section 3.3 and B)."""

    depth: int
    heads: int
    groups: int
    linear_projection: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], context: Context) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        y = GroupNorm(self.groups, 1e-6, self.dtype, name="norm")(x)
        if self.linear_projection:
            y = nn.Dense(c, dtype=self.dtype, name="proj_in")(y.reshape(b, h * w, c))
        else:
            y = Conv1x1(c, dtype=self.dtype, name="proj_in")(y).reshape(b, h * w, c)
        for i in range(self.depth):
            y = BasicTransformerBlock(self.heads, self.dtype, name=f"transformer_blocks_{i}")(y, context)
        if self.linear_projection:
            y = nn.Dense(c, dtype=self.dtype, name="proj_out")(y).reshape(b, h, w, c)
        else:
            y = Conv1x1(c, dtype=self.dtype, name="proj_out")(y.reshape(b, h, w, c))
        return x + y

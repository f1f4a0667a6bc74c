"""Attention, and the transformer that lets every pixel read the prompt."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from jaxdiff.nn.layers import KEPT, Conv1x1, GroupNorm, LayerNorm
from jaxdiff.types import Context

DENSE = 128 * 128
"""Up to so many scores a head, they are simply kept for the backward pass."""
BLOCK = 128
"""Queries that meet all the keys at a time, where there are more than that."""
KEYS = ("to_k", "to_v")
"""The projections of what is attended to."""


def attend(
    q: Float[Array, "b q h d"],
    k: Float[Array, "b k h d"],
    v: Float[Array, "b k h d"],
    mask: Bool[Array, "q k"] | None = None,
) -> Float[Array, "b q h d"]:
    """softmax(q k^T / sqrt(d)) v, the softmax in float32 (Vaswani et al. 2017, eq. 1); `mask` is True where allowed."""
    return (_dense if q.shape[1] * k.shape[1] <= DENSE else _blockwise)(q, k, v, mask)


# Heads before tokens: all products are then plain batched matrix products.
def _heads_first(x: Float[Array, "b t h d"]) -> Float[Array, "b h t d"]:
    return jnp.swapaxes(x, 1, 2)


def _scores(q: Float[Array, "b h q d"], k: Float[Array, "b h k d"], mask: Array | None) -> Float[Array, "b h q k"]:
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return scores if mask is None else jnp.where(mask, scores, jnp.finfo(jnp.float32).min)


def _dense(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    q, k, v = map(_heads_first, (q, k, v))
    weights = jax.nn.softmax(_scores(q, k, mask), axis=-1).astype(v.dtype)
    return _heads_first(jnp.einsum("bhqk,bhkd->bhqd", weights, v))


# A block of queries against all keys after the other, by loops that leave batch and heads whole, so that a mesh may
# split those. The scores are computed again in the backward pass (Dao 2023, FlashAttention-2, algorithms 1 and 2).


@jax.custom_vjp
def _blockwise(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    return _blockwise_fwd(q, k, v, mask)[0]


def _blockwise_fwd(q: Array, k: Array, v: Array, mask: Array | None) -> tuple[Array, tuple[Any, ...]]:
    n, t = _blocks(q, k), q.shape[1]
    k_, v_ = _heads_first(k), _heads_first(v)

    def block(rows: tuple[Array, Array | None]) -> tuple[Array, Array]:
        scores = _scores(rows[0], k_, rows[1])
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        out = jnp.einsum("bhqk,bhkd->bhqd", weights.astype(v.dtype), v_, preferred_element_type=jnp.float32) / total
        return out.astype(v.dtype), (top + jnp.log(total))[..., 0]

    out, logsumexp = jax.lax.map(block, (_split(q, n), _split_mask(mask, n)))
    out = checkpoint_name(_join(out, t), KEPT)
    logsumexp = checkpoint_name(logsumexp, KEPT)
    return out, (q, k, v, mask, out, logsumexp)


def _blockwise_bwd(kept: tuple[Any, ...], d_out: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, mask, out, logsumexp = kept
    n, t, scale = _blocks(q, k), q.shape[1], q.shape[-1] ** -0.5
    k_, v_ = _heads_first(k), _heads_first(v)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def block(sums: tuple[Array, Array], rows: tuple[Any, ...]) -> tuple[tuple[Array, Array], Array]:
        q, out, d_out, logsumexp, mask = rows
        weights = jnp.exp(_scores(q, k_, mask) - logsumexp[..., None])
        d_weights = product("bhqd,bhkd->bhqk", d_out, v_)
        inner = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1, keepdims=True)
        d_scores = (weights * (d_weights - inner)).astype(q.dtype)
        d_k = sums[0] + product("bhqk,bhqd->bhkd", d_scores, q)
        d_v = sums[1] + product("bhqk,bhqd->bhkd", weights.astype(v.dtype), d_out)
        return (d_k, d_v), (product("bhqk,bhkd->bhqd", d_scores, k_) * scale).astype(q.dtype)

    zeros = jnp.zeros_like(k_, jnp.float32), jnp.zeros_like(v_, jnp.float32)
    rows = (_split(q, n), _split(out, n), _split(d_out, n), logsumexp, _split_mask(mask, n))
    (d_k, d_v), d_q = jax.lax.scan(block, zeros, rows)
    return _join(d_q, t), _heads_first(d_k * scale).astype(k.dtype), _heads_first(d_v).astype(v.dtype), None


_blockwise.defvjp(_blockwise_fwd, _blockwise_bwd)


def _blocks(q: Array, k: Array) -> int:
    """At least two: the one pass of a loop would be merged with that of the other loop, and its scores kept."""
    return max(2, -(-q.shape[1] // BLOCK) if k.shape[1] > 2 * BLOCK else 1)


def _split(x: Float[Array, "b t h d"], n: int) -> Float[Array, "{n} b h r d"]:
    """Blocks of equal length; rows of zeros, which add nothing to any gradient, fill up the last."""
    b, t, h, d = x.shape
    rows = -(-t // n)
    x = jnp.pad(x, ((0, 0), (0, n * rows - t), (0, 0), (0, 0)))
    return x.reshape(b, n, rows, h, d).transpose(1, 0, 3, 2, 4)


def _join(x: Float[Array, "n b h r d"], t: int) -> Float[Array, "b {t} h d"]:
    n, b, h, rows, d = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(b, n * rows, h, d)[:, :t]


def _split_mask(mask: Bool[Array, "q k"] | None, n: int) -> Bool[Array, "{n} r k"] | None:
    if mask is None:
        return None
    rows = -(-mask.shape[0] // n)
    return jnp.pad(mask, ((0, n * rows - mask.shape[0]), (0, 0)), constant_values=True).reshape(n, rows, -1)


class Attention(nn.Module):
    """Multi-head attention of `x` over `context` (itself if None), with diffusers' names for the projections.

    `norm_groups` above 0 puts a GroupNorm first, as the autoencoder wants it. Keys and values are taken from the
    collection "prompt" where it holds any (`jaxdiff.models.unet.prompt_keys`).
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

        if self.has_variable("prompt", "to_k"):
            k, v = (self.get_variable("prompt", name).reshape(b, -1, self.heads, c // self.heads) for name in KEYS)
        else:
            k, v = (project(name, context) for name in KEYS)
        y = attend(project("to_q", x), k, v)
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

"""Normalisations and embeddings: NHWC, compute in `dtype`, statistics in float32."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdiff.nn.linear import Dense

M = TypeVar("M", bound=type[nn.Module])

Remat = Literal["none", "norms", "blocks"]
"""What a backward pass computes again instead of keeping it; see `remat`."""


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of arrays, whose backward pass keeps nothing but these and computes the rest of what it needs again.

    For what costs hardly any work but would keep several arrays of the size of its result: norms and activations.
    Arguments with a default keep it: left to themselves they would be traced like arrays.
    """

    @jax.jit  # traced and compiled once for all layers of a shape; so is the backward pass
    def f(*args: Any) -> Any:
        return function(*args)

    @jax.jit
    def pull(args: tuple[Array, ...], d: Any) -> Any:
        # Without the barrier the compiler sees that all this has been computed before, and keeps it, or does it early.
        args, d = jax.lax.optimization_barrier((args, d))
        return jax.vjp(f, *args)[1](d)

    kept = jax.custom_vjp(f)
    kept.defvjp(lambda *args: (f(*args), args), pull)
    return kept


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    **dict.fromkeys(("silu", "swish"), recomputed(nn.silu)),
    "mish": recomputed(jax.nn.mish),
    "relu": nn.relu,
    "gelu": recomputed(partial(nn.gelu, approximate=False)),
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh"), recomputed(nn.gelu)),  # by a hyperbolic tangent
    # the approximation that OpenAI's CLIP was trained with
    "quick_gelu": recomputed(lambda x: x * nn.sigmoid(1.702 * x)),
}
"""Activations, by the names that configs of diffusers and transformers have for them."""

KEPT = "costly"
"""The name (`jax.ad_checkpoint.checkpoint_name`) of what is costly to compute again, where no primitive tells."""


def remat(cls: M, policy: Remat) -> M:
    """The module class `cls`, with a backward pass that keeps less (Chen et al. 2016).

    "blocks" keeps the inputs alone and computes all else again. "norms" keeps the outputs of convolutions, matrix
    products and attention, too: what is left (norms, activations, sums) costs hardly any work. "none" is `cls` itself.
    """
    if policy == "none":
        return cls
    return nn.remat(cls, policy=_costly if policy == "norms" else None)  # pyright: ignore[reportReturnType]


def _costly(primitive: Any, *args: Any, **params: Any) -> bool:
    products = (jax.lax.dot_general_p, jax.lax.conv_general_dilated_p)
    named = jax.checkpoint_policies.save_only_these_names(KEPT)
    return primitive in products or bool(named(primitive, *args, **params))


class GroupNorm(nn.Module):
    """Normalises over pixels and groups of neighbouring channels (Wu & He 2018, eq. 1-7), before an activation (one of
    `ACTIVATIONS`) where there is one: a backward pass then keeps nothing between the two."""

    groups: int
    eps: float
    dtype: DTypeLike = jnp.float32
    activation: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b *hw c"]) -> Float[Array, "b *hw c"]:
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros_init(), (x.shape[-1],))
        normalise = _group_norm(self.groups, self.eps, jnp.dtype(self.dtype), self.activation)
        return normalise(x, _channel_moments(x), scale, bias)


@recomputed
def _channel_moments(x: Float[Array, "b *hw c"]) -> Float[Array, "2 b c"]:
    """Means over the pixels of the numbers and of their squares, in float32.

    Sums for each channel first, groups after: one pass over the pixels that every backend vectorises.
    """
    x, pixels = x.astype(jnp.float32), tuple(range(1, x.ndim - 1))
    return jnp.stack([x.mean(pixels), jnp.square(x).mean(pixels)])


@cache
def _group_norm(groups: int, eps: float, dtype: Any, activation: str | None) -> Callable[..., Any]:
    """(x, its channels' moments, scale, bias) -> what `GroupNorm` gives."""

    def normalised(x: Array, moments: Array, scale: Array, bias: Array) -> Array:
        b, *hw, c = x.shape
        mean, square = moments.reshape(2, b, groups, c // groups).mean(-1)
        inverse_std = jax.lax.rsqrt(jnp.maximum(square - jnp.square(mean), 0.0) + eps)
        mean, inverse_std = (jnp.repeat(v, c // groups, axis=-1) for v in (mean, inverse_std))
        gain = inverse_std * scale.astype(jnp.float32)[None]
        shape = (b, *(1 for _ in hw), c)
        shift = bias.astype(jnp.float32)[None] - mean * gain
        y = (x.astype(jnp.float32) * gain.reshape(shape) + shift.reshape(shape)).astype(dtype)
        return y if activation is None else ACTIVATIONS[activation](y)

    return recomputed(normalised)


class LayerNorm(nn.Module):
    """Normalises each token over its features, with statistics in float32. Parameters are `flax.linen.LayerNorm`'s."""

    eps: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros_init(), (x.shape[-1],))
        return _layer_norm(self.eps, jnp.dtype(self.dtype))(x, scale, bias)


@cache
def _layer_norm(eps: float, dtype: Any) -> Callable[..., Any]:
    def normalised(x: Array, scale: Array, bias: Array) -> Array:
        x = x.astype(jnp.float32)
        scale, bias = (v.astype(jnp.float32).reshape(*(1,) * (x.ndim - 1), -1) for v in (scale, bias))
        mean = x.mean(-1, keepdims=True)
        variance = jnp.maximum(jnp.square(x).mean(-1, keepdims=True) - jnp.square(mean), 0.0)
        gain = jax.lax.rsqrt(variance + eps) * scale
        return ((x - mean) * gain + bias).astype(dtype)

    return recomputed(normalised)


def timestep_embedding(
    t: Float[Array, " b"], dim: int, *, flip_sin_to_cos: bool, freq_shift: int
) -> Float[Array, "b {dim}"]:
    """Sinusoids of the step number at geometric frequencies (Vaswani et al. 2017, section 3.5; Ho et al. 2020, B)."""
    half = dim // 2
    frequencies = jnp.exp(-jnp.log(10_000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift))
    angles = jnp.outer(t.astype(jnp.float32), frequencies)
    waves = (jnp.cos(angles), jnp.sin(angles)) if flip_sin_to_cos else (jnp.sin(angles), jnp.cos(angles))
    return jnp.pad(jnp.concatenate(waves, axis=-1), ((0, 0), (0, dim % 2)))


class TimestepMLP(nn.Module):
    """Two dense layers that turn sinusoids into the embedding which every residual block reads.

    A projection of `condition` is added to the sinusoids.
    """

    dim: int
    dtype: DTypeLike = jnp.float32
    activation: str = "silu"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b d"], condition: Float[Array, "b d2"] | None = None
    ) -> Float[Array, "b {self.dim}"]:
        if condition is not None:
            x += Dense(x.shape[-1], use_bias=False, dtype=self.dtype, name="cond_proj")(condition)
        x = Dense(self.dim, dtype=self.dtype, name="linear_1")(x)
        return Dense(self.dim, dtype=self.dtype, name="linear_2")(ACTIVATIONS[self.activation](x))


def upsample_nearest(x: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b h2 w2 c"]:
    """Doubles each side, then crops to `size`: an odd side comes back from its rounded-up half."""
    x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    return x[:, : size[0], : size[1]]

"""Normalisations and embeddings: NHWC, compute in `dtype`, statistics in float32."""

from collections.abc import Callable
from functools import partial
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

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    **dict.fromkeys(("silu", "swish"), nn.silu),
    "mish": jax.nn.mish,
    "relu": nn.relu,
    "gelu": partial(nn.gelu, approximate=False),
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh"), nn.gelu),  # by a hyperbolic tangent
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # the approximation that OpenAI's CLIP was trained with
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
    """Normalises over pixels and groups of neighbouring channels (Wu & He 2018, eq. 1-7)."""

    groups: int
    eps: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b *hw c"]) -> Float[Array, "b *hw c"]:
        b, *hw, c = x.shape
        scale = self.param("scale", nn.initializers.ones_init(), (c,))
        bias = self.param("bias", nn.initializers.zeros_init(), (c,))
        x, scale, bias = (v.astype(jnp.float32) for v in (x, scale, bias))
        # Sums for each channel first, groups after: one pass over the pixels that every backend vectorises.
        pixels = tuple(range(1, x.ndim - 1))
        moments = jnp.stack([x.mean(pixels), jnp.square(x).mean(pixels)])
        mean, square = moments.reshape(2, b, self.groups, c // self.groups).mean(-1)
        inverse_std = jax.lax.rsqrt(jnp.maximum(square - jnp.square(mean), 0.0) + self.eps)
        mean, inverse_std = (jnp.repeat(v, c // self.groups, axis=-1) for v in (mean, inverse_std))
        gain = inverse_std * scale[None]
        shape = (b, *(1 for _ in hw), c)
        return (x * gain.reshape(shape) + (bias[None] - mean * gain).reshape(shape)).astype(self.dtype)


def LayerNorm(*, eps: float = 1e-5, dtype: DTypeLike, name: str) -> Callable[[Array], Array]:
    """Normalises each token over its features; statistics in float32 (linen's own rule)."""
    norm = nn.LayerNorm(epsilon=eps, dtype=dtype, name=name)

    def normalise(x: Array) -> Array:
        with jax.numpy_dtype_promotion("standard"):  # linen subtracts float32 means from bfloat16 numbers
            return norm(x)

    return normalise


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

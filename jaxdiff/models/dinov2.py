"""DINOv2's vision transformer (Oquab et al. 2023), named as in transformers, as features of images."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdiff.models.clip import CLIPMLP
from jaxdiff.nn.attention import attend
from jaxdiff.nn.layers import ACTIVATIONS, LayerNorm
from jaxdiff.nn.linear import Dense, add
from jaxdiff.types import Params


class Dinov2Model(nn.Module):
    """Images, standardised, to the class token after the last norm: one vector each.

    The grid of patches must be the one that the position embeddings are for (`positions_for`).
    """

    hidden_size: int
    layers: int
    heads: int
    mlp_ratio: int
    patch_size: int
    activation: str = "gelu"
    swiglu: bool = False
    qkv_bias: bool = True
    registers: int = 0
    eps: float = 1e-6
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        x = Embeddings(self.hidden_size, self.patch_size, self.registers, self.dtype, name="embeddings")(image)
        x = Encoder(
            self.layers,
            self.heads,
            self.mlp_ratio,
            self.activation,
            self.swiglu,
            self.qkv_bias,
            self.eps,
            self.dtype,
            name="encoder",
        )(x)
        return LayerNorm(eps=self.eps, dtype=self.dtype, name="layernorm")(x[:, 0]).astype(jnp.float32)


class Embeddings(nn.Module):
    """A token for each patch with its place, after the class token; registers, which have no place, between."""

    hidden_size: int
    patch_size: int
    registers: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, image: Float[Array, "b h w 3"]) -> Float[Array, "b t d"]:
        b, h, w, _ = image.shape
        p, d = self.patch_size, self.hidden_size
        patches = image.reshape(b, h // p, p, w // p, p, 3).transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, p * p * 3)
        x = PatchEmbeddings(d, p, self.dtype, name="patch_embeddings")(patches)
        normal = nn.initializers.normal(0.02)
        first = self.param("cls_token", normal, (1, 1, d)).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(first, (b, 1, d)), x], axis=1)
        x = add(x, self.param("position_embeddings", normal, (1, x.shape[1], d)))
        if not self.registers:
            return x
        registers = self.param("register_tokens", normal, (1, self.registers, d)).astype(self.dtype)
        return jnp.concatenate([x[:, :1], jnp.broadcast_to(registers, (b, self.registers, d)), x[:, 1:]], axis=1)


class PatchEmbeddings(nn.Module):
    """The convolution whose stride is its size, as the matrix product over patches that it is."""

    hidden_size: int
    patch_size: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, patches: Float[Array, "b t p"]) -> Float[Array, "b t d"]:
        return PatchProjection(self.hidden_size, self.patch_size, self.dtype, name="projection")(patches)


class PatchProjection(nn.Module):
    """A kernel [p, p, 3, d] and a bias, for flat patches."""

    hidden_size: int
    patch_size: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, patches: Float[Array, "b t p"]) -> Float[Array, "b t d"]:
        p, d = self.patch_size, self.hidden_size
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (p, p, 3, d)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), (d,))
        return add(patches.astype(self.dtype) @ kernel.reshape(-1, d), bias)


class Encoder(nn.Module):
    """The stack of layers."""

    layers: int
    heads: int
    mlp_ratio: int
    activation: str
    swiglu: bool
    qkv_bias: bool
    eps: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        for i in range(self.layers):
            x = Layer(
                self.heads,
                self.mlp_ratio,
                self.activation,
                self.swiglu,
                self.qkv_bias,
                self.eps,
                self.dtype,
                name=f"layer_{i}",
            )(x)
        return x


class Layer(nn.Module):
    """Attention and MLP, each behind a norm, scaled for each channel (Touvron et al. 2021, eq. 3) and added."""

    heads: int
    mlp_ratio: int
    activation: str
    swiglu: bool
    qkv_bias: bool
    eps: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        d = x.shape[-1]
        h = LayerNorm(eps=self.eps, dtype=self.dtype, name="norm1")(x)
        h = Attention(self.heads, self.qkv_bias, self.dtype, name="attention")(h)
        x += LayerScale(self.dtype, name="layer_scale1")(h)
        h = LayerNorm(eps=self.eps, dtype=self.dtype, name="norm2")(x)
        if self.swiglu:
            h = SwiGLU(d, swiglu_width(d, self.mlp_ratio), self.dtype, name="mlp")(h)
        else:
            h = CLIPMLP(d * self.mlp_ratio, self.activation, self.dtype, name="mlp")(h)
        return x + LayerScale(self.dtype, name="layer_scale2")(h)


class Attention(nn.Module):
    """Multi-head self-attention, nested as transformers nests it."""

    heads: int
    qkv_bias: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        y = SelfAttention(self.heads, self.qkv_bias, self.dtype, name="attention")(x)
        return AttentionOutput(self.dtype, name="output")(y)


class SelfAttention(nn.Module):
    """Queries, keys and values, and the sums of the latter."""

    heads: int
    qkv_bias: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        b, t, d = x.shape

        def project(name: str) -> Array:
            y = Dense(d, use_bias=self.qkv_bias, dtype=self.dtype, name=name)(x)
            return y.reshape(b, t, self.heads, d // self.heads)

        return attend(project("query"), project("key"), project("value")).reshape(b, t, d)


class AttentionOutput(nn.Module):
    """The last projection."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return Dense(x.shape[-1], dtype=self.dtype, name="dense")(x)


class LayerScale(nn.Module):
    """A factor for each channel."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        scale = self.param("lambda1", nn.initializers.ones_init(), (x.shape[-1],))
        return x * scale.astype(self.dtype)[None, None]


class SwiGLU(nn.Module):
    """One half of a dense layer gates the other (Shazeer 2020, eq. 6): that of the giant model."""

    channels: int
    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        gate, value = jnp.split(Dense(2 * self.width, dtype=self.dtype, name="weights_in")(x), 2, axis=-1)
        return Dense(self.channels, dtype=self.dtype, name="weights_out")(ACTIVATIONS["silu"](gate) * value)


def swiglu_width(hidden_size: int, mlp_ratio: int) -> int:
    """Two thirds of a plain MLP's width, rounded up to a multiple of 8."""
    return (hidden_size * mlp_ratio * 2 // 3 + 7) // 8 * 8


def positions_for(params: Params, side: int) -> Params:
    """Params whose position embeddings are for a grid of side x side patches, by PyTorch's bicubic interpolation.

    Raises:
        ValueError: where those that are there are for no square.
    """
    table = np.asarray(params["embeddings"]["position_embeddings"], np.float64)
    own = round((table.shape[1] - 1) ** 0.5)
    if own**2 != table.shape[1] - 1:
        raise ValueError(f"There are embeddings of {table.shape[1] - 1} patches' positions, which are no square.")
    if own == side:
        return params
    matrix = _bicubic(own, side)
    grid = np.einsum("iy,jx,yxd->ijd", matrix, matrix, table[0, 1:].reshape(own, own, -1), optimize=True)
    table = np.concatenate([table[:, :1], grid.reshape(1, side * side, -1)], axis=1).astype(np.float32)
    return {**params, "embeddings": {**params["embeddings"], "position_embeddings": table}}


def _bicubic(n: int, size: int) -> np.ndarray:
    """[size, n]: the cubic kernel of a = -0.75 (Keys 1981, eq. 5 with another a), edges repeated, no antialiasing."""
    a = -0.75
    centres = (np.arange(size) + 0.5) * (n / size) - 0.5
    matrix = np.zeros((size, n))
    for row, centre in zip(matrix, centres, strict=True):
        for place in np.floor(centre).astype(int) + np.arange(-1, 3):
            t = abs(place - centre)
            near = (a + 2) * t**3 - (a + 3) * t**2 + 1
            far = a * (t**3 - 5 * t**2 + 8 * t - 4)
            row[min(max(place, 0), n - 1)] += near if t <= 1 else far if t < 2 else 0
    return matrix

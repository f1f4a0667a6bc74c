"""CLIP's text transformer (Radford et al. 2021, section 2.4), named as in transformers."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxdiff.nn.attention import attend
from jaxdiff.nn.layers import ACTIVATIONS, LayerNorm, Remat, remat
from jaxdiff.nn.linear import Dense, Embed, add


class CLIPAttention(nn.Module):
    """Causal multi-head self-attention."""

    heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        b, t, d = x.shape

        def project(name: str) -> Array:
            return Dense(d, dtype=self.dtype, name=name)(x).reshape(b, t, self.heads, d // self.heads)

        y = attend(project("q_proj"), project("k_proj"), project("v_proj"), jnp.tril(jnp.ones((t, t), bool)))
        return Dense(d, dtype=self.dtype, name="out_proj")(y.reshape(b, t, d))


class CLIPMLP(nn.Module):
    """Dense, activation, dense."""

    intermediate_size: int
    activation: str
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        h = ACTIVATIONS[self.activation](Dense(self.intermediate_size, dtype=self.dtype, name="fc1")(x))
        return Dense(x.shape[-1], dtype=self.dtype, name="fc2")(h)


class CLIPEncoderLayer(nn.Module):
    """Attention and MLP, each behind a norm, each added."""

    heads: int
    intermediate_size: int
    activation: str
    eps: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        h = LayerNorm(eps=self.eps, dtype=self.dtype, name="layer_norm1")(x)
        x += CLIPAttention(self.heads, self.dtype, name="self_attn")(h)
        h = LayerNorm(eps=self.eps, dtype=self.dtype, name="layer_norm2")(x)
        return x + CLIPMLP(self.intermediate_size, self.activation, self.dtype, name="mlp")(h)


class CLIPEmbeddings(nn.Module):
    """Token and position embeddings, added."""

    vocab_size: int
    hidden_size: int
    max_positions: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        x = Embed(self.vocab_size, self.hidden_size, self.dtype, name="token_embedding")(tokens)
        positions = jnp.arange(tokens.shape[-1])
        return add(x, Embed(self.max_positions, self.hidden_size, self.dtype, name="position_embedding")(positions))


class CLIPEncoder(nn.Module):
    """The stack of layers; the last `skip_layers` of them are left out of the computation."""

    layers: int
    skip_layers: int
    heads: int
    intermediate_size: int
    activation: str
    eps: float
    dtype: DTypeLike = jnp.float32
    remat: Remat = "none"

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        layer = remat(CLIPEncoderLayer, self.remat)
        for i in range(self.layers - self.skip_layers):
            x = layer(self.heads, self.intermediate_size, self.activation, self.eps, self.dtype, name=f"layers_{i}")(x)
        return x


class CLIPTextTransformer(nn.Module):
    """Embeddings, encoder, final norm."""

    vocab_size: int
    hidden_size: int
    max_positions: int
    layers: int
    heads: int
    intermediate_size: int
    activation: str = "quick_gelu"
    eps: float = 1e-5
    skip_layers: int = 0
    dtype: DTypeLike = jnp.float32
    remat: Remat = "none"

    @nn.compact
    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        x = CLIPEmbeddings(self.vocab_size, self.hidden_size, self.max_positions, self.dtype, name="embeddings")(tokens)
        x = CLIPEncoder(
            self.layers,
            self.skip_layers,
            self.heads,
            self.intermediate_size,
            self.activation,
            self.eps,
            self.dtype,
            self.remat,
            name="encoder",
        )(x)
        return LayerNorm(eps=self.eps, dtype=self.dtype, name="final_layer_norm")(x)


class CLIPTextModel(CLIPTextTransformer):
    """Tokens to one feature vector each: the last layer's output (or, with `skip_layers` 1, the penultimate's), normed.

    The parameters lie under `text_model`, where transformers keeps them.
    """

    @nn.compact
    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        fields = {f: getattr(self, f) for f in CLIPTextTransformer.__dataclass_fields__ if f not in ("parent", "name")}
        return CLIPTextTransformer(**fields, name="text_model")(tokens).astype(jnp.float32)

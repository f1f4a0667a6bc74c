"""CLIP's text transformer (Radford et al. 2021, section 2.4), named as in transformers."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxdiff.nn.attention import attend
from jaxdiff.nn.layers import ACTIVATIONS, LayerNorm, Remat, remat
from jaxdiff.nn.linear import Dense, Embed, add


class CLIPAttention(nn.Module):
    """Multi-head self-attention, of each token over those before it and itself, or where not `causal` over all."""

    heads: int
    dtype: DTypeLike = jnp.float32
    causal: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        b, t, d = x.shape

        def project(name: str) -> Array:
            return Dense(d, dtype=self.dtype, name=name)(x).reshape(b, t, self.heads, d // self.heads)

        mask = jnp.tril(jnp.ones((t, t), bool)) if self.causal else None
        y = attend(project("q_proj"), project("k_proj"), project("v_proj"), mask)
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
    causal: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        h = LayerNorm(eps=self.eps, dtype=self.dtype, name="layer_norm1")(x)
        x += CLIPAttention(self.heads, self.dtype, self.causal, name="self_attn")(h)
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
    """The stack of layers: the features after each of these numbers of layers, of which there are one or two."""

    after: tuple[int, ...]
    heads: int
    intermediate_size: int
    activation: str
    eps: float
    dtype: DTypeLike = jnp.float32
    remat: Remat = "none"
    causal: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> tuple[Float[Array, "b t d"], ...]:
        layer = remat(CLIPEncoderLayer, self.remat)
        sizes = self.heads, self.intermediate_size, self.activation, self.eps, self.dtype, self.causal
        features = [x]
        for i in range(max(self.after)):
            x = layer(*sizes, name=f"layers_{i}")(x)
            features.append(x)
        return tuple(features[n] for n in self.after)


class CLIPTextTransformer(nn.Module):
    """Embeddings, encoder, final norm.

    The last `skip_layers` layers are left out. With `penultimate` there is no norm: the features before the last layer
    of those that are left are the result. With `whole` the normed features of all layers are there, too.
    """

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
    penultimate: bool = False
    whole: bool = False

    @nn.compact
    def __call__(self, tokens: Int[Array, "b t"]) -> tuple[Float[Array, "b t d"], ...]:
        x = CLIPEmbeddings(self.vocab_size, self.hidden_size, self.max_positions, self.dtype, name="embeddings")(tokens)
        last = self.layers - self.skip_layers - self.penultimate
        features = CLIPEncoder(
            (last, self.layers) if self.whole else (last,),
            self.heads,
            self.intermediate_size,
            self.activation,
            self.eps,
            self.dtype,
            self.remat,
            name="encoder",
        )(x)
        norm = LayerNorm(eps=self.eps, dtype=self.dtype, name="final_layer_norm")
        first = features[0] if self.penultimate else norm(features[0])
        return (first, norm(features[1])) if self.whole else (first,)


class CLIPTextModel(CLIPTextTransformer):
    """Tokens to one feature vector each: the last layer's output (or, with `skip_layers` 1, the penultimate's), normed.

    The parameters lie under `text_model`, where transformers keeps them.
    """

    @nn.compact
    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        return _transformer(self)(tokens)[0].astype(jnp.float32)


class CLIPTextModelWithProjection(CLIPTextTransformer):
    """Tokens to one feature vector each, as `CLIPTextModel`, and to a vector [projection_dim] for the whole text.

    That is the projection of the last layer's normed output at the end token: the first of number `end_id`; in a text
    without it, the one with the largest number of those below `vocab_size`.
    """

    projection_dim: int = 0
    end_id: int | None = None

    @nn.compact
    def __call__(self, tokens: Int[Array, "b t"]) -> tuple[Float[Array, "b t d"], Float[Array, "b p"]]:
        features, last = _transformer(self, whole=True)(tokens)
        end = jnp.argmax(jnp.where(tokens < self.vocab_size, tokens, -1), axis=-1)
        if self.end_id is not None:
            is_end = tokens == self.end_id
            end = jnp.where(is_end.any(-1), jnp.argmax(is_end, axis=-1), end)
        at_end = jnp.take_along_axis(last, end[:, None, None], axis=1)[:, 0]
        pooled = Dense(self.projection_dim, use_bias=False, dtype=self.dtype, name="text_projection")(at_end)
        return features.astype(jnp.float32), pooled.astype(jnp.float32)


def _transformer(model: CLIPTextTransformer, **others: Any) -> CLIPTextTransformer:
    """The network under `text_model`, with the model's fields and others."""
    names = CLIPTextTransformer.__dataclass_fields__.keys() - {"parent", "name"}
    fields: dict[str, Any] = {name: getattr(model, name) for name in names}
    return CLIPTextTransformer(**fields | others, name="text_model")

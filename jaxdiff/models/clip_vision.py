"""CLIP's vision tower (Radford et al. 2021, section 2.4; Dosovitskiy et al. 2021), named as in transformers."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdiff.models.clip import CLIPEncoder
from jaxdiff.nn.layers import LayerNorm
from jaxdiff.nn.linear import Dense, Embed, add

Pixels = Float[Array, "b h w 3"]


class ImageFeatures(NamedTuple):
    """What CLIP makes of images."""

    embedding: Float[Array, "b p"]
    """A vector for the image, in the space that it shares with texts."""
    pooled: Float[Array, "b d"]
    """The class token's features, which that is a projection of."""
    penultimate: Float[Array, "b t d"]
    """The class token's and each patch's features before the last layer, without a norm."""


class CLIPVisionEmbeddings(nn.Module):
    """A vector for each patch, row after row, behind the class token's; the positions' are added."""

    hidden_size: int
    patch_size: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: Pixels) -> Float[Array, "b t d"]:
        (b, h, w, _), p = image.shape, self.patch_size
        first = self.param("class_embedding", nn.initializers.normal(0.02), (self.hidden_size,))
        patches = image.reshape(b, h // p, p, w // p, p, 3).swapaxes(2, 3).reshape(b, -1, p, p, 3)
        x = PatchEmbedding(self.hidden_size, self.dtype, name="patch_embedding")(patches)
        first = jnp.broadcast_to(jnp.asarray(first, self.dtype), (b, 1, self.hidden_size))
        x = jnp.concatenate([first, x], axis=1)
        positions = Embed(x.shape[1], self.hidden_size, self.dtype, name="position_embedding")
        return add(x, positions(jnp.arange(x.shape[1])))


class PatchEmbedding(nn.Module):
    """A convolution whose stride is its size, as the matrix product that it is. Parameters are those of the former."""

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, patches: Float[Array, "b t p p 3"]) -> Float[Array, "b t {self.features}"]:
        *b, p, _, channels = patches.shape
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (p, p, channels, self.features))
        kernel = jnp.asarray(kernel, self.dtype).reshape(-1, self.features)
        return patches.astype(self.dtype).reshape(*b, -1) @ kernel


class CLIPVisionTransformer(nn.Module):
    """Embeddings, norm, encoder: the features before the last layer, and the class token's after it, normed."""

    hidden_size: int
    image_size: int
    patch_size: int
    layers: int
    heads: int
    intermediate_size: int
    activation: str = "quick_gelu"
    eps: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: Pixels) -> tuple[Float[Array, "b t d"], Float[Array, "b d"]]:
        x = CLIPVisionEmbeddings(self.hidden_size, self.patch_size, self.dtype, name="embeddings")(image)
        x = LayerNorm(eps=self.eps, dtype=self.dtype, name="pre_layrnorm")(x)  # so it is spelled in all files
        encoder = CLIPEncoder(
            (self.layers - 1, self.layers),
            self.heads,
            self.intermediate_size,
            self.activation,
            self.eps,
            self.dtype,
            causal=False,
            name="encoder",
        )
        penultimate, last = encoder(x)
        return penultimate, LayerNorm(eps=self.eps, dtype=self.dtype, name="post_layernorm")(last[:, 0])


class CLIPVisionModelWithProjection(nn.Module):
    """Images, as `jaxdiff.io.image_encoder` prepares them, to their features. The fields are the transformer's."""

    hidden_size: int
    image_size: int
    patch_size: int
    layers: int
    heads: int
    intermediate_size: int
    activation: str = "quick_gelu"
    eps: float = 1e-5
    projection_dim: int = 512
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: Pixels) -> ImageFeatures:
        tower = CLIPVisionTransformer(
            self.hidden_size,
            self.image_size,
            self.patch_size,
            self.layers,
            self.heads,
            self.intermediate_size,
            self.activation,
            self.eps,
            self.dtype,
            name="vision_model",
        )
        penultimate, pooled = tower(image)
        embedding = Dense(self.projection_dim, use_bias=False, dtype=self.dtype, name="visual_projection")(pooled)
        return ImageFeatures(*(x.astype(jnp.float32) for x in (embedding, pooled, penultimate)))

"""The vocabulary that every room shares: array shapes, parameter trees and the one function everything wraps."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
from jaxtyping import Array, Float, Int

# A nested dict of arrays, as `module.init(key, ...)["params"]` returns it; a path such as
# ("down_blocks_0", "resnets_1", "conv1", "kernel") names a leaf.
Params: TypeAlias = dict[str, Any]

# A typed JAX key (`jax.random.key`). Used once: `fold_in` for time, `split` for parts.
Key: TypeAlias = jax.Array

# Shape letters: b images, h w c height, width and channels, t tokens, d features. A context spells its own out, since
# an attention layer has other tokens and features beside it.
Latent: TypeAlias = Float[Array, "*b h w c"]
Image: TypeAlias = Float[Array, "*b h w 3"]  # in [-1, 1]
Context: TypeAlias = Float[Array, "*b tokens features"]
Sigma: TypeAlias = Float[Array, ""]


class Conditioning(NamedTuple):
    """What a denoiser is told of a prompt, with any leading axes. What a family does not use is None."""

    context: Float[Array, "*b tokens features"]
    """A feature vector for each token, for cross-attention."""
    pooled: Float[Array, "*b features2"] | None = None
    """One vector for the whole prompt."""
    extra: Float[Array, "*b numbers"] | None = None
    """Further numbers, such as the size and crop that an image is to look like."""


class Tokens(NamedTuple):
    """Texts as a text encoder reads them, in chunks of as many tokens as it takes."""

    ids: Int[Array, "*b chunks length"]
    weights: Float[Array, "*b chunks length"]
    """Each token's weight; 1 takes it as it is."""
    empty: Int[Array, " length"]
    """The tokens of the empty text."""


# (x, sigma) -> the model's guess of the clean x_0, where x = x_0 + sigma * eps and eps is standard normal.
DenoiseFn: TypeAlias = Callable[[Latent, Sigma], Latent]
